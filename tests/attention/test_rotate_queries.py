"""Attention by rotating queries equals softmax attention over keys at their positions in the prompt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from blockft.attention.cached_context import build_query_rotation
from blockft.attention.rope import RotaryEmbedding
from blockft.attention.rotate_queries import attend_reference, merge_partial_attention
from tests.attention.cases import Case, make_case


def build_rotary(num_rotated: int) -> RotaryEmbedding:
    return RotaryEmbedding(1.0 / 10000.0 ** (torch.arange(0, num_rotated, 2) / num_rotated))


def attend_densely(case: Case) -> torch.Tensor:
    """Return the same attention as one softmax over keys at their positions: (B, H, T, D)."""
    context, window = case.context, case.window
    group = case.q_BHTD.shape[1] // case.cache_S2KD.shape[2]
    out = torch.empty_like(case.q_BHTD)
    for b, q_HTD in enumerate(case.q_BHTD):
        keys, values, key_positions = [], [], []
        chunks = (context.slots[b], context.lengths[b], context.starts[b], context.offsets[b])
        for slot, length, start, offset in torch.stack(chunks, dim=1).tolist():
            cached = case.cache_S2KD[slot : slot + length]
            keys.append(case.rotary.shift(cached[:, 0], offset))
            values.append(cached[:, 1])
            key_positions.append(offset + start + torch.arange(length))
        pad_len, query_start = int(context.pad_lens[b]), int(context.query_start)
        shift = int(context.position_shifts[b])
        num_queries = q_HTD.shape[1]
        own = case.final_BS2KD[b, pad_len : query_start + num_queries]
        positions = query_start + shift + torch.arange(num_queries)
        keys.append(own[:, 0])
        values.append(own[:, 1])
        key_positions.append(pad_len + shift + torch.arange(len(own)))
        k, v = (
            torch.cat(chunks).repeat_interleave(group, dim=1).transpose(0, 1) for chunks in (keys, values)
        )
        distance = positions[:, None] - torch.cat(key_positions)
        allowed = (distance >= 0) & (distance < (window or 10**6))
        scores = (q_HTD @ k.transpose(1, 2) * case.scaling).masked_fill(~allowed, float("-inf"))
        out[b] = scores.softmax(dim=-1) @ v
    return out


@pytest.mark.parametrize("window", [None, 7, 30])
@pytest.mark.parametrize("num_rotated", [16, 8])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_rotated_queries_give_softmax_attention_over_shifted_keys(
    window: int | None, num_rotated: int, num_queries: int
) -> None:
    for seed in range(5):
        case = make_case(seed, window=window, num_rotated=num_rotated, num_queries=num_queries)
        expected, got = attend_densely(case), case.attend(attend_reference)
        for b in range(len(got)):
            # the output of queries that are padding is undefined
            real = slice(max(0, int(case.context.pad_lens[b]) - int(case.context.query_start)), None)
            assert_close(got[b, :, real], expected[b, :, real], rtol=1e-5, atol=1e-5)


def test_slots_outside_the_chunks_are_never_read() -> None:
    case = make_case(3)
    before = case.attend(attend_reference)
    used = torch.zeros(len(case.cache_S2KD), dtype=torch.bool)
    for slot, length in zip(case.context.slots.flatten(), case.context.lengths.flatten(), strict=True):
        used[slot : slot + length] = True
    case.cache_S2KD[~used] = 1e30
    assert torch.equal(case.attend(attend_reference), before)


def test_rotating_queries_equals_shifting_them_back() -> None:
    q_HTD = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([[0, 1, 4099, 100_000]], dtype=torch.int32)
    for num_rotated in (16, 8):
        rotation = build_query_rotation(build_rotary(num_rotated), offsets)
        assert torch.equal(rotation.rotate(q_HTD, 0, 0), q_HTD)
        for n, offset in enumerate(offsets[0].tolist()):
            shifted = build_rotary(num_rotated).shift(q_HTD, -offset)
            assert_close(rotation.rotate(q_HTD, 0, n), shifted, rtol=1e-6, atol=1e-6)


def attend_to(scores_HTS: torch.Tensor, values_HSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax attention to a set of keys, and its log-sum-exp. For an empty set: 0 and -inf."""
    lse = scores_HTS.logsumexp(dim=-1)
    weights = scores_HTS.softmax(dim=-1) if scores_HTS.shape[-1] else scores_HTS
    return weights @ values_HSD, lse


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any),
    spread=st.sampled_from([1.0, 30.0, 3000.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_merging_partial_results_gives_attention_over_all_keys(
    sizes: list[int], spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, sum(sizes), generator=generator, dtype=torch.float64) * spread
    values = torch.randn(2, sum(sizes), 4, generator=generator, dtype=torch.float64)
    expected, _ = attend_to(scores, values)
    sets = zip(scores.split(sizes, -1), values.split(sizes, 1), strict=True)
    partial = [attend_to(*keys) for keys in sets]
    got = merge_partial_attention(*(torch.stack(tensors) for tensors in zip(*partial, strict=True)))
    assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_merging_one_result_changes_nothing_and_merging_empty_sets_gives_zeros() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    assert torch.equal(merge_partial_attention(out, lse), out[0])
    assert torch.equal(
        merge_partial_attention(torch.zeros(2, 2, 3, 4), torch.full((2, 2, 3), -torch.inf)),
        torch.zeros(2, 3, 4),
    )


def test_merging_survives_the_largest_scores() -> None:
    outs, lses = torch.randn(2, 1, 1, 4), torch.tensor([3e38, -3e38]).view(2, 1, 1)
    assert torch.equal(merge_partial_attention(outs, lses), outs[0])
