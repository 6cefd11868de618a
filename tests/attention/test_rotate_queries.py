"""Queries that turn to cached blocks attend as softmax attention over keys that were moved to their place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from blockft.attention.positions import RotaryEmbedding
from blockft.attention.rotate_queries import attend_reference, build_query_rotation, merge_partial_attention
from tests.attention.cases import Case, make_case


def rotation(num_rotated: int) -> RotaryEmbedding:
    return RotaryEmbedding(1.0 / 10000.0 ** (torch.arange(0, num_rotated, 2) / num_rotated))


def attend_densely(case: Case) -> torch.Tensor:
    """The same attention with keys where they stand, one softmax over all of them: (B, H, T, D)."""
    context, window = case.context, case.window
    group = case.q_BHTD.shape[1] // case.cache_S2KD.shape[2]
    out = torch.empty_like(case.q_BHTD)
    for b, q_HTD in enumerate(case.q_BHTD):
        keys, values, places = [], [], []
        facts = (context.slots[b], context.lengths[b], context.starts[b], context.offsets[b])
        for slot, length, start, offset in torch.stack(facts, dim=1).tolist():
            cached = case.cache_S2KD[slot : slot + length]
            keys.append(case.rotation.shift(cached[:, 0], by=offset))
            values.append(cached[:, 1])
            places.append(offset + start + torch.arange(length))
        first, column, shift = int(context.first[b]), int(context.column), int(context.shift[b])
        num_queries = q_HTD.shape[1]
        own = case.final_BS2KD[b, first : column + num_queries]
        positions = column + shift + torch.arange(num_queries)
        keys.append(own[:, 0])
        values.append(own[:, 1])
        places.append(first + shift + torch.arange(len(own)))
        k, v = (torch.cat(part).repeat_interleave(group, dim=1).transpose(0, 1) for part in (keys, values))
        distance = positions[:, None] - torch.cat(places)
        allowed = (distance >= 0) & (distance < (window or 10**6))
        scores = (q_HTD @ k.transpose(1, 2) * case.scaling).masked_fill(~allowed, float("-inf"))
        out[b] = scores.softmax(dim=-1) @ v
    return out


@pytest.mark.parametrize("window", [None, 7, 30])
@pytest.mark.parametrize("num_rotated", [16, 8])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_it_is_softmax_attention_over_moved_keys(
    window: int | None, num_rotated: int, num_queries: int
) -> None:
    for seed in range(5):
        case = make_case(seed, window=window, num_rotated=num_rotated, num_queries=num_queries)
        want, got = attend_densely(case), case.attend(attend_reference)
        for b in range(len(got)):
            # what stands before the first column is padding, and gets anything
            real = slice(max(0, int(case.context.first[b]) - int(case.context.column)), None)
            assert_close(got[b, :, real], want[b, :, real], rtol=1e-5, atol=1e-5)


def test_what_lies_between_blocks_is_never_read() -> None:
    case = make_case(3)
    before = case.attend(attend_reference)
    used = torch.zeros(len(case.cache_S2KD), dtype=torch.bool)
    for slot, length in zip(case.context.slots.flatten(), case.context.lengths.flatten(), strict=True):
        used[slot : slot + length] = True
    case.cache_S2KD[~used] = 1e30
    assert torch.equal(case.attend(attend_reference), before)


def test_law_11_a_query_that_turns_is_one_that_was_moved_back() -> None:
    q_HTD = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([[0, 1, 4099, 100_000]], dtype=torch.int32)
    for num_rotated in (16, 8):
        turned = build_query_rotation(rotation(num_rotated), offsets)
        assert torch.equal(turned.rotate(q_HTD, 0, 0), q_HTD)
        for n, offset in enumerate(offsets[0].tolist()):
            moved = rotation(num_rotated).shift(q_HTD, by=-offset)
            assert_close(turned.rotate(q_HTD, 0, n), moved, rtol=1e-6, atol=1e-6)


def attend_to(scores_HTS: torch.Tensor, values_HSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention to a set of keys, and its log-sum-exp; nothing for an empty set."""
    lse = scores_HTS.logsumexp(dim=-1)
    weights = scores_HTS.softmax(dim=-1) if scores_HTS.shape[-1] else scores_HTS
    return weights @ values_HSD, lse


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any),
    spread=st.sampled_from([1.0, 30.0, 3000.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_merged_parts_are_the_whole(sizes: list[int], spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, sum(sizes), generator=generator, dtype=torch.float64) * spread
    values = torch.randn(2, sum(sizes), 4, generator=generator, dtype=torch.float64)
    want, _ = attend_to(scores, values)
    parts = [attend_to(*part) for part in zip(scores.split(sizes, -1), values.split(sizes, 1), strict=True)]
    got = merge_partial_attention(*(torch.stack(part) for part in zip(*parts, strict=True)))
    assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_one_part_stays_as_it_is_and_none_is_nothing() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    assert torch.equal(merge_partial_attention(out, lse), out[0])
    assert torch.equal(
        merge_partial_attention(torch.zeros(2, 2, 3, 4), torch.full((2, 2, 3), -torch.inf)),
        torch.zeros(2, 3, 4),
    )


def test_merging_survives_the_largest_scores() -> None:
    outs, lses = torch.randn(2, 1, 1, 4), torch.tensor([3e38, -3e38]).view(2, 1, 1)
    assert torch.equal(merge_partial_attention(outs, lses), outs[0])
