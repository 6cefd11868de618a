"""Position re-encoding: cached keys moved by RoPE to where their block stands (Ma et al. 2025, section 2.3).

Shapes: B batch, K key/value heads, S key tokens, D head size, R rotated dimensions of a head (R <= D).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryEmbedding:
    """The rotary embedding of one layer, in Llama's half-split convention: dimension i turns with i + R / 2.

    inv_freq: (R / 2,) radians per position, kept in float64. Any scaling of the attention that a RoPE kind
    applies to its cosines and sines (yarn) is already in the keys and is none of a shift's business.
    """

    inv_freq: torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "inv_freq", self.inv_freq.detach().double())

    def shift(self, keys_BKSD: torch.Tensor, by: int) -> torch.Tensor:
        """The keys as if their tokens stood `by` positions later (equation 3 of the paper).

        Angles are computed in float64 and the rotation in float32, since float32 angles are off by 3e-3 at
        position 32,000; shifting by 0 returns the keys themselves.
        """
        if by == 0:
            return keys_BKSD
        half = self.inv_freq.shape[0]
        angles = self.inv_freq.to(keys_BKSD.device) * by
        cos, sin = angles.cos().float(), angles.sin().float()
        keys = keys_BKSD.float()
        low, high, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        turned = torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
        return turned.to(keys_BKSD.dtype)
