"""Law 11: moves of a cached block add up, and a move by 0 changes nothing."""

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.positions import RotaryEmbedding

ROTATION = RotaryEmbedding(1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16))
KEYS = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("a", "b"), [(1, 2), (37, 4001), (50_000, 50_000), (99_999, 1), (100_000, -100_000)])
def test_law_11_moves_add_up(a: int, b: int) -> None:
    twice = ROTATION.shift(ROTATION.shift(KEYS, by=a), by=b)
    assert_close(twice, ROTATION.shift(KEYS, by=a + b), rtol=1e-5, atol=1e-5)


def test_law_11_moving_by_0_changes_no_bit() -> None:
    keys = KEYS.clone()
    keys[0, 0, 0, 0] = -0.0
    moved = ROTATION.shift(keys.bfloat16(), by=0)
    assert torch.equal(moved.view(torch.int16), keys.bfloat16().view(torch.int16))


def test_dimensions_beyond_the_rotated_ones_stay() -> None:
    partial = RotaryEmbedding(ROTATION.inv_freq[:4])
    moved = partial.shift(KEYS, by=1234)
    assert torch.equal(moved[..., 8:], KEYS[..., 8:])
    assert not torch.equal(moved[..., :8], KEYS[..., :8])


def test_angles_are_exact_far_away() -> None:
    """Against the rotation computed wholly in float64, at a position where float32 angles are off by 3e-3."""
    by = 100_000
    low, high = KEYS.double().chunk(2, dim=-1)
    angles = ROTATION.inv_freq * by
    exact = torch.cat(
        (low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), dim=-1
    )
    assert_close(ROTATION.shift(KEYS, by=by).double(), exact, rtol=1e-6, atol=1e-6)
