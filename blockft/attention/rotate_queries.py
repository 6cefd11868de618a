"""Attention over cached blocks that rotates queries: cached keys stay unchanged, queries rotate per block.

For a block at offset d, with R the rotation of RoPE,

    (R(t) q) . (R(d + j) k)  =  (R(t - d) q) . (R(j) k).

The scores of a final block's queries over a cached block therefore need its keys as they were cached, at
positions 0..n-1. Attention over each block gives a partial result and its log-sum-exp. Merging these gives
softmax attention over all keys exactly.

Shapes: B prompts, N chunks of a prompt's context, T query tokens, S key tokens, H query heads, K key/value
heads, D head size, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blockft.attention.cached_context import CachedContext, QueryRotation


@dataclass(frozen=True, kw_only=True)
class CachedAttention:
    """Attention of one forward pass over a batch of final blocks; every layer calls it (see `backends`).

    cache_LS2KD      keys and values of all cached blocks
    final_LBS2KD     keys and values of the final blocks; each layer writes its new ones at
                     `context.query_start`
    context          the cached blocks that each prompt reads
    layer_rotations  the rotation of queries, per layer
    use_triton       compute with the Triton kernels, which need a GPU, or with `attend_reference`
    wait_for_layer   called with a layer's index before the layer's part of the cache is read
    """

    cache_LS2KD: torch.Tensor
    final_LBS2KD: torch.Tensor
    context: CachedContext
    layer_rotations: Sequence[QueryRotation]
    use_triton: bool
    wait_for_layer: Callable[[int], None] | None = None

    def attend(
        self,
        layer: int,
        q_BHTD: torch.Tensor,
        keys_BKTD: torch.Tensor,
        values_BKTD: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Store the new keys and values, then return the attention output: (B, T, H, D)."""
        final_BS2KD, cache_S2KD = self.final_LBS2KD[layer], self.cache_LS2KD[layer]
        settings: dict[str, Any] = {"scaling": scaling, "window": window}
        if self.wait_for_layer:
            self.wait_for_layer(layer)
        if self.use_triton:
            from blockft.attention import triton_launch  # builds of PyTorch for CPUs have no Triton

            triton_launch.append_keys_values(keys_BKTD, values_BKTD, final_BS2KD, self.context.query_start)
            return triton_launch.attend_cached(
                q_BHTD, cache_S2KD, final_BS2KD, self.context, self.layer_rotations[layer], **settings
            )
        columns = int(self.context.query_start) + torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
        final_BS2KD[:, columns] = torch.stack((keys_BKTD, values_BKTD), dim=2).permute(0, 3, 2, 1, 4)
        out_BHTD = attend_reference(
            q_BHTD, cache_S2KD, final_BS2KD, self.context, self.layer_rotations[layer], **settings
        )
        return out_BHTD.transpose(1, 2).contiguous()


def attend_reference(
    q_BHTD: torch.Tensor,
    cache_S2KD: torch.Tensor,
    final_BS2KD: torch.Tensor,
    context: CachedContext,
    rotation: QueryRotation,
    *,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Return the attention of final blocks over cached blocks, computed chunk by chunk: (B, H, T, D).

    Every kernel is compared with this function. `cache_S2KD` holds a layer's keys and values of cached
    blocks, `final_BS2KD` those of the final blocks, the queries' own tokens included. The output of queries
    that are padding is undefined.
    """
    group = q_BHTD.shape[1] // cache_S2KD.shape[2]
    out = torch.empty_like(q_BHTD)
    for b, q_HTD in enumerate(q_BHTD):
        columns = int(context.query_start) + torch.arange(q_HTD.shape[1], device=q_HTD.device)
        positions = columns + context.position_shifts[b]
        partial = []
        for n, (slot, length, first_position) in enumerate(_chunks(context, b)):
            rotated_q = rotation.rotate(q_HTD, b, n)
            key_positions = first_position + torch.arange(length, device=q_HTD.device)
            allowed = _within_window(positions, key_positions, window)
            chunk = cache_S2KD[slot : slot + length]
            partial.append(_partial_attention(rotated_q, chunk, allowed, scaling, group))
        keys = torch.arange(final_BS2KD.shape[1], device=q_HTD.device)
        is_causal = (keys <= columns[:, None]) & (keys >= context.pad_lens[b])
        allowed = is_causal & _within_window(columns, keys, window)
        partial.append(_partial_attention(q_HTD, final_BS2KD[b], allowed, scaling, group))
        out[b] = merge_partial_attention(*(torch.stack(tensors) for tensors in zip(*partial, strict=True)))
    return out


def merge_partial_attention(outs_NHTD: torch.Tensor, lses_NHT: torch.Tensor) -> torch.Tensor:
    """Return softmax attention over all keys, from attention over N disjoint sets of keys: (H, T, D).

    `lses_NHT` are the log-sum-exp of each set's scores; -inf for an empty set.
    """
    highest = lses_NHT.amax(dim=0).clamp(min=torch.finfo(lses_NHT.dtype).min)
    weights = (lses_NHT - highest).exp()
    weights = weights / weights.sum(dim=0).clamp(min=torch.finfo(lses_NHT.dtype).tiny)
    return (outs_NHTD * weights[..., None]).sum(dim=0).to(outs_NHTD.dtype)


def _partial_attention(
    q_HTD: torch.Tensor, kv_S2KD: torch.Tensor, allowed_TS: torch.Tensor, scaling: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention over one set of keys and its log-sum-exp, in float32: (H, T, D) and (H, T)."""
    keys, values = (kv_S2KD[:, i].transpose(0, 1).float().repeat_interleave(group, dim=0) for i in (0, 1))
    scores = (q_HTD.float() @ keys.transpose(1, 2)) * scaling
    scores = scores.masked_fill(~allowed_TS, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
    return weights @ torch.nan_to_num(values), lse


def _within_window(
    q_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Return which keys are within the sliding window of each query: (T, S) bool."""
    distance = q_positions[:, None] - key_positions
    return distance < window if window is not None else torch.ones_like(distance, dtype=torch.bool)


def _chunks(context: CachedContext, b: int) -> list[tuple[int, int, int]]:
    """Return slot, length and first position of each chunk of a prompt's context."""
    positions = context.offsets[b] + context.starts[b]
    rows = torch.stack((context.slots[b], context.lengths[b], positions), dim=1).tolist()
    return [(slot, length, position) for slot, length, position in rows if length]
