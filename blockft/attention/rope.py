"""Rotary embedding: shift cached keys to the positions of their block (Ma et al. 2025, section 2.3).

Shapes: B batch, K key/value heads, S key tokens, D head size, R rotated dimensions of a head (R <= D).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryEmbedding:
    """The rotary embedding of one layer, in Llama's convention: dimensions i and i + R / 2 are a pair.

    inv_freq: (R / 2,) radians per position, kept in float64. Attention scaling, which yarn applies to cosines
    and sines, is already in the cached keys, so a shift does not apply it again.
    """

    inv_freq: torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "inv_freq", self.inv_freq.detach().double())

    def shift(self, keys_BKSD: torch.Tensor, distance: int | torch.Tensor) -> torch.Tensor:
        """Return the keys of the same tokens `distance` positions later (equation 3 of the paper).

        A tensor holds a distance for each key; it has the shape of the keys without D, or one that broadcasts
        to it. Keys of any shape (..., D) are allowed.

        The rotation is computed in float32; see `cos_sin` for its angles. A shift by 0 returns the keys
        unchanged.
        """
        if isinstance(distance, int) and distance == 0:
            return keys_BKSD
        return rotate(keys_BKSD, *self.cos_sin(distance, keys_BKSD.device))

    def cos_sin(
        self, distance: int | torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines of a shift by `distance` positions: (..., R / 2) each, in float32.

        Angles are computed in float64, because float32 angles are off by 3e-3 at position 32,000.
        """
        inv_freq = self.inv_freq.to(device)
        angles = inv_freq * (distance if isinstance(distance, int) else distance[..., None])
        return angles.cos().float(), angles.sin().float()


def rotate(keys_BKSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return keys (..., D), rotated in float32 by the angles with these cosines and sines (..., R / 2)."""
    half = cos.shape[-1]
    keys = keys_BKSD.float()
    low, high, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
    return rotated.to(keys_BKSD.dtype)
