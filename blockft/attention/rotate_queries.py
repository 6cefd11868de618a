"""The query side: cached keys stay where they are, and the few queries turn to each block instead.

For a block that stands at position d, with RoPE as the rotation R,

    (R(t) q) . (R(d + j) k)  =  (R(t - d) q) . (R(j) k),

so the scores of a final block's queries over a cached block need its keys as they were encoded, at positions
0..n-1. Each block gives a partial result and its log-sum-exp, and these merge to softmax attention exactly.

Shapes: B prompts, N pieces of a prompt's context, T query tokens, S key tokens, H query heads, K key/value
heads, D head size, L layers. Tokens of a prompt are left padded: query t stands in column `column + t` of
its final block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blockft.attention.positions import RotaryEmbedding

SLACK = 128
"""Tokens that have to follow the last one in a cache and in a final block: kernels load whole tiles."""


@dataclass(frozen=True)
class CachedContext:
    """Which cached blocks each prompt of a batch reads; int32 tensors on the device of the cache.

    slots     (B, N) place of a piece's first token in the cache; a piece is a block or a part of a long one
    lengths   (B, N) its tokens; 0 where a prompt has fewer pieces
    starts    (B, N) the place of its first token in its block
    offsets   (B, N) the position at which its block stands
    shares    (B, P + 1) which pieces each of P programs reads: from one entry to the next
    column    (1,) the column of the first query in the final block
    first     (B,) the first column that is no padding
    shift     (B,) what to add to a column to get its position
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    offsets: torch.Tensor
    shares: torch.Tensor
    column: torch.Tensor
    first: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True)
class QueryRotation:
    """By how much queries turn back to each block: (B, N, R / 2) float32, R rotated dimensions of a head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def rotate(self, q_HTD: torch.Tensor, b: int, n: int) -> torch.Tensor:
        """Queries of prompt `b` turned to piece `n` of its context; see `Rotation.shift`."""
        cos, sin = self.cos[b, n], self.sin[b, n]
        half, q = len(cos), q_HTD.float()
        low, high, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
        return torch.cat((low * cos + high * sin, high * cos - low * sin, rest), dim=-1)


def build_query_rotation(rotation: RotaryEmbedding, offsets_BN: torch.Tensor) -> QueryRotation:
    """Turning back by each offset; angles in float64."""
    angles = offsets_BN[..., None].double() * rotation.inv_freq.to(offsets_BN.device)
    return QueryRotation(angles.cos().float(), angles.sin().float())


@dataclass(frozen=True, kw_only=True)
class CachedAttention:
    """Attention of one forward pass over a batch of final blocks, called by every layer (see `backends`).

    cache_LS2KD   keys and values of all cached blocks
    final_LBS2KD  those of the final blocks' tokens; each layer adds its new ones at `context.column`
    layer_turns   by how much the queries of each layer turn
    ready         called with a layer's number before its part of the cache is read
    """

    cache_LS2KD: torch.Tensor
    final_LBS2KD: torch.Tensor
    context: CachedContext
    layer_turns: Sequence[QueryRotation]
    use_kernel: bool
    ready: Callable[[int], None] | None = None

    def attend(
        self,
        layer: int,
        q_BHTD: torch.Tensor,
        keys_BKTD: torch.Tensor,
        values_BKTD: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Returns (B, T, H, D)."""
        final_BS2KD, cache_S2KD = self.final_LBS2KD[layer], self.cache_LS2KD[layer]
        settings: dict[str, Any] = {"scaling": scaling, "window": window}
        if self.ready:
            self.ready(layer)
        if self.use_kernel:
            from blockft.attention import triton_launch  # Triton comes with PyTorch for GPUs alone

            triton_launch.append_keys_values(keys_BKTD, values_BKTD, final_BS2KD, self.context.column)
            return triton_launch.attend_cached(
                q_BHTD, cache_S2KD, final_BS2KD, self.context, self.layer_turns[layer], **settings
            )
        columns = int(self.context.column) + torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
        final_BS2KD[:, columns] = torch.stack((keys_BKTD, values_BKTD), dim=2).permute(0, 3, 2, 1, 4)
        out_BHTD = attend_reference(
            q_BHTD, cache_S2KD, final_BS2KD, self.context, self.layer_turns[layer], **settings
        )
        return out_BHTD.transpose(1, 2).contiguous()


def attend_reference(
    q_BHTD: torch.Tensor,
    cache_S2KD: torch.Tensor,
    final_BS2KD: torch.Tensor,
    context: CachedContext,
    turned: QueryRotation,
    *,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of final blocks over cached ones, block by block: what every kernel is compared with.

    `cache_S2KD` holds a layer's keys and values of cached blocks, `final_BS2KD` those of the final blocks,
    the queries' own tokens among them. Returns (B, H, T, D); queries that are padding get anything.
    """
    group = q_BHTD.shape[1] // cache_S2KD.shape[2]
    out = torch.empty_like(q_BHTD)
    for b, q_HTD in enumerate(q_BHTD):
        columns = int(context.column) + torch.arange(q_HTD.shape[1], device=q_HTD.device)
        positions = columns + context.shift[b]
        parts = []
        for n, (slot, length, position) in enumerate(_pieces(context, b)):
            turned_q = turned.rotate(q_HTD, b, n)
            at = position + torch.arange(length, device=q_HTD.device)
            allowed = _in_window(positions, at, window)
            parts.append(
                _partial_attention(turned_q, cache_S2KD[slot : slot + length], allowed, scaling, group)
            )
        keys = torch.arange(final_BS2KD.shape[1], device=q_HTD.device)
        allowed = (keys <= columns[:, None]) & (keys >= context.first[b]) & _in_window(columns, keys, window)
        parts.append(_partial_attention(q_HTD, final_BS2KD[b], allowed, scaling, group))
        out[b] = merge_partial_attention(*(torch.stack(part) for part in zip(*parts, strict=True)))
    return out


def merge_partial_attention(outs_NHTD: torch.Tensor, lses_NHT: torch.Tensor) -> torch.Tensor:
    """Softmax attention over all keys from that over N sets of them; an empty set has log-sum-exp -inf."""
    highest = lses_NHT.amax(dim=0).clamp(min=torch.finfo(lses_NHT.dtype).min)
    weights = (lses_NHT - highest).exp()
    weights = weights / weights.sum(dim=0).clamp(min=torch.finfo(lses_NHT.dtype).tiny)
    return (outs_NHTD * weights[..., None]).sum(dim=0).to(outs_NHTD.dtype)


def _partial_attention(
    q_HTD: torch.Tensor, kv_S2KD: torch.Tensor, allowed_TS: torch.Tensor, scaling: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one set of keys and its log-sum-exp, in float32: (H, T, D) and (H, T)."""
    keys, values = (kv_S2KD[:, i].transpose(0, 1).float().repeat_interleave(group, dim=0) for i in (0, 1))
    scores = (q_HTD.float() @ keys.transpose(1, 2)) * scaling
    scores = scores.masked_fill(~allowed_TS, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
    return weights @ torch.nan_to_num(values), lse


def _in_window(positions: torch.Tensor, at: torch.Tensor, window: int | None) -> torch.Tensor:
    distance = positions[:, None] - at
    return distance < window if window is not None else torch.ones_like(distance, dtype=torch.bool)


def _pieces(context: CachedContext, b: int) -> list[tuple[int, int, int]]:
    """Slot, length and position of each piece of a prompt's context."""
    positions = context.offsets[b] + context.starts[b]
    rows = torch.stack((context.slots[b], context.lengths[b], positions), dim=1).tolist()
    return [(slot, length, position) for slot, length, position in rows if length]
