"""Inputs of attention over cached blocks: the chunks of each prompt, and the rotation of its queries.

Shapes: B prompts, N chunks of a prompt's context, P Triton programs per prompt, T query tokens, H query
heads, D head size, R rotated dimensions of a head (R <= D).
"""

from dataclasses import dataclass

import torch

from blockft.attention.rope import RotaryEmbedding

TILE_PADDING = 128
"""Unused tokens after the last one of a cache and of a final block, because kernels load whole tiles."""


@dataclass(frozen=True)
class CachedContext:
    """The cached blocks that each prompt of a batch reads, as int32 tensors on the device of the cache.

    A chunk is a whole block or a part of a long block. The tokens of a final block are left padded: query t
    of the current forward pass is in column `query_start + t` of its final block.

    slots            (B, N) slot of the chunk's first token in the cache
    lengths          (B, N) tokens of the chunk; 0 where a prompt has fewer chunks
    starts           (B, N) index of the chunk's first token in its block
    offsets          (B, N) position of the block's first token in the prompt
    program_bounds   (B, P + 1) program p reads chunks program_bounds[p] to program_bounds[p + 1] - 1
    query_start      (1,) column of the first query
    pad_lens         (B,) columns of padding before the final block's first token
    position_shifts  (B,) a column plus this number is the position of its token
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    offsets: torch.Tensor
    program_bounds: torch.Tensor
    query_start: torch.Tensor
    pad_lens: torch.Tensor
    position_shifts: torch.Tensor


@dataclass(frozen=True)
class QueryRotation:
    """The rotation of queries by minus the offset of each chunk's block: (B, N, R / 2) float32 each."""

    cos: torch.Tensor
    sin: torch.Tensor

    def rotate(self, q_HTD: torch.Tensor, b: int, n: int) -> torch.Tensor:
        """Return the queries of prompt `b`, rotated for chunk `n` of its context, in float32: (H, T, D)."""
        cos, sin = self.cos[b, n], self.sin[b, n]
        half, q = len(cos), q_HTD.float()
        low, high, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
        return torch.cat((low * cos + high * sin, high * cos - low * sin, rest), dim=-1)


def build_query_rotation(rotary: RotaryEmbedding, offsets_BN: torch.Tensor) -> QueryRotation:
    """Build the rotation of queries by minus each offset. Angles are computed in float64."""
    angles = offsets_BN[..., None].double() * rotary.inv_freq.to(offsets_BN.device)
    return QueryRotation(angles.cos().float(), angles.sin().float())
