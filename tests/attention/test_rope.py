"""Shifts of cached keys add up, a shift by 0 is exact, and angles are exact at far positions."""

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.rope import RotaryEmbedding

ROTARY = RotaryEmbedding(1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16))
KEYS = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("a", "b"), [(1, 2), (37, 4001), (50_000, 50_000), (99_999, 1), (100_000, -100_000)])
def test_shifts_add_up(a: int, b: int) -> None:
    twice = ROTARY.shift(ROTARY.shift(KEYS, a), b)
    assert_close(twice, ROTARY.shift(KEYS, a + b), rtol=1e-5, atol=1e-5)


def test_a_shift_by_0_changes_no_bit() -> None:
    keys = KEYS.clone()
    keys[0, 0, 0, 0] = -0.0
    shifted = ROTARY.shift(keys.bfloat16(), 0)
    assert torch.equal(shifted.view(torch.int16), keys.bfloat16().view(torch.int16))


def test_dimensions_that_are_not_rotated_stay_unchanged() -> None:
    partial = RotaryEmbedding(ROTARY.inv_freq[:4])
    shifted = partial.shift(KEYS, 1234)
    assert torch.equal(shifted[..., 8:], KEYS[..., 8:])
    assert not torch.equal(shifted[..., :8], KEYS[..., :8])


def test_angles_are_exact_at_far_positions() -> None:
    """Compare with a rotation in float64, at a position where float32 angles are off by 3e-3 or more."""
    distance = 100_000
    low, high = KEYS.double().chunk(2, dim=-1)
    angles = ROTARY.inv_freq * distance
    exact = torch.cat(
        (low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), dim=-1
    )
    assert_close(ROTARY.shift(KEYS, distance).double(), exact, rtol=1e-6, atol=1e-6)


def test_keys_may_have_distances_of_their_own() -> None:
    distances = torch.tensor([0, 3, 3, 700, 99_999])
    shifted = ROTARY.shift(KEYS, distances)
    for token, distance in enumerate(distances.tolist()):
        assert torch.equal(shifted[:, :, token], ROTARY.shift(KEYS, distance)[:, :, token])
