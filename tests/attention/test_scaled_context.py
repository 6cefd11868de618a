"""Attention with a temperature and a scale over the context, against its formula."""

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.backends import AttentionMasks, block_sdpa
from blockft.attention.layout import Layout, build_metadata
from blockft.attention.scaled_context import ScaledContextAttention

LAYOUT = Layout((3, 4, 5))


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, keys, values = (torch.randn(1, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    return q[:, :, 7:], keys, values


def attention(masks: AttentionMasks, temperature: float, scale: float) -> ScaledContextAttention:
    is_context = ~masks.metadata.is_final
    return ScaledContextAttention(masks=masks, is_context_BS=is_context, temperature=temperature, scale=scale)


@pytest.mark.parametrize("window", [None, 2, 6])
def test_without_temperature_and_scale_it_is_plain_attention(window: int | None) -> None:
    masks = AttentionMasks(build_metadata([LAYOUT]))
    q, keys, values = tensors()
    got = attention(masks, 1, 1).attend(0, q, keys, values, 0.3, window)
    expected, _ = block_sdpa(
        torch.nn.Module(), q, keys, values, None, scaling=0.3, sliding_window=window, block_masks=masks
    )
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 1), (1, 0.7), (0.4, 0.8), (2, 1.5)])
@pytest.mark.parametrize("window", [None, 2, 6])
def test_the_weight_of_the_context_is_the_power_of_its_sum(
    temperature: float, scale: float, window: int | None
) -> None:
    masks = AttentionMasks(build_metadata([LAYOUT]))
    q, keys, values = tensors()
    got = attention(masks, temperature, scale).attend(0, q, keys, values, 0.3, window)
    for query in range(5):
        for head in range(4):
            mean, weight = torch.zeros(8), torch.tensor(0.0)
            seen = [k for k in range(8 + query) if window is None or 7 + query - k < window]
            scores = {k: 0.3 * q[0, head, query] @ keys[0, head // 2, k] for k in seen}
            context = {k: (score / temperature).exp() for k, score in scores.items() if k < 7}
            for k, exp in context.items():
                share = exp / sum(context.values()) * sum(context.values()) ** scale
                mean, weight = mean + share * values[0, head // 2, k], weight + share
            for k in scores.keys() - context.keys():
                mean, weight = mean + scores[k].exp() * values[0, head // 2, k], weight + scores[k].exp()
            assert_close(got[0, query, head], mean / weight, rtol=1e-4, atol=1e-5)
