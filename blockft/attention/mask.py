"""The mask rule of Block-Attention, and every mask that is derived from it.

Shapes: B rows of a batch, T query tokens, S key tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from blockft.attention.layout import AttentionMetadata, Layout, build_metadata

Index = Any  # an int or an integer tensor


def may_attend(
    q: Index, k: Index, example_ids: torch.Tensor, block_ids: torch.Tensor, is_final: torch.Tensor
) -> torch.Tensor:
    """Return whether token `q` may attend to token `k` (Ma et al. 2025, figure 2).

    ::

        lengths (2, 2, 2):  # . . . . .
                            # # . . . .       causal, within one example, and
                            . . # . . .       within one block, or from a final block to a local block
                            . . # # . .
                            # # # # # .
                            # # # # # #

    `q` and `k` are indices into the three (T,) tensors. They broadcast against each other.
    """
    same_block = block_ids[q] == block_ids[k]
    reads_context = is_final[q] & ~is_final[k]
    allowed: torch.Tensor = (q >= k) & (example_ids[q] == example_ids[k]) & (same_block | reads_context)
    return allowed


def within_window(q: Index, k: Index, position_ids: torch.Tensor, window: int) -> torch.Tensor:
    """Return whether `k` is in the sliding window of `q`. Positions count, not indices in the row."""
    return position_ids[q] - position_ids[k] < window


def build_mask_mod(
    metadata: AttentionMetadata, window: int | None = None, first_query: int = 0
) -> Callable[..., torch.Tensor]:
    """Build the mask function `mask_mod(b, h, q, k)` of a batch, as FlexAttention calls it.

    b is the row; h, the head, is ignored. Query 0 is the row's token `first_query`: with cached keys, only
    the last tokens of a row are queries.
    """
    num_tokens = metadata.example_ids.shape[1]
    example_ids, block_ids = metadata.example_ids.flatten(), metadata.block_ids.flatten()
    is_final, position_ids = metadata.is_final.flatten(), metadata.position_ids.flatten()

    def mask_mod(b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        q, k = b * num_tokens + first_query + q, b * num_tokens + k
        allowed = may_attend(q, k, example_ids, block_ids, is_final)
        return allowed if window is None else allowed & within_window(q, k, position_ids, window)

    return mask_mod


def build_dense_mask(
    metadata: AttentionMetadata, window: int | None = None, num_queries: int | None = None
) -> torch.Tensor:
    """Build the dense mask, the reference for every backend: (B, 1, T, S) bool, true where allowed.

    The keys are the S tokens of a row. The queries are the last `num_queries` of them (all by default).
    """
    num_rows, num_keys = metadata.example_ids.shape
    num_queries = num_keys if num_queries is None else num_queries
    device = metadata.example_ids.device
    mask_mod = build_mask_mod(metadata, window, first_query=num_keys - num_queries)
    b = torch.arange(num_rows, device=device)[:, None, None, None]
    q = torch.arange(num_queries, device=device)[:, None]
    return mask_mod(b, 0, q, torch.arange(num_keys, device=device))


def tile_occupancy(
    metadata: AttentionMetadata, window: int | None, tile: int, strip: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tiles of (tile, tile) tokens have any allowed pair, and which have only allowed pairs.

    Both are (B, ceil(T / tile), ceil(T / tile)) bool tensors. The mask is computed for `strip` queries at a
    time, and for no key before the start of their first example. Memory and time therefore grow with T, not
    with its square.
    """
    num_rows, num_tokens = metadata.example_ids.shape
    device, num_tiles = metadata.example_ids.device, -(-num_tokens // tile)
    assert strip % tile == 0
    mask_mod = build_mask_mod(metadata, window)
    b = torch.arange(num_rows, device=device)[:, None, None]
    tokens = torch.arange(num_tokens, device=device)
    any_allowed = torch.zeros(num_rows, num_tiles, num_tiles, dtype=torch.bool, device=device)
    all_allowed = torch.zeros_like(any_allowed)
    # for each strip, the first token of the example of its first query, the smallest of all rows
    same_example = metadata.example_ids[:, ::strip, None] == metadata.example_ids[:, None]
    first_keys = same_example.to(torch.uint8).argmax(dim=2).amin(dim=0).tolist()
    for start, first_key in zip(range(0, num_tokens, strip), first_keys, strict=True):
        end, low = min(start + strip, num_tokens), first_key // tile * tile
        allowed = mask_mod(b, 0, tokens[start:end, None], tokens[low:end])
        padding = -end % tile
        allowed = torch.nn.functional.pad(allowed, (0, padding, 0, padding))
        tiles = allowed.reshape(num_rows, -1, tile, allowed.shape[2] // tile, tile)
        region = (slice(None), slice(start // tile, -(-end // tile)), slice(low // tile, -(-end // tile)))
        any_allowed[region] = tiles.any(dim=4).any(dim=2)
        all_allowed[region] = tiles.all(dim=4).all(dim=2)
    return any_allowed, all_allowed


def example_mask(block_lengths: Sequence[int], num_final: int = 1, window: int | None = None) -> torch.Tensor:
    """Build the (T, T) bool mask of one example, true where the row's token may attend to the column's.

    Raises:
        ValueError: see `Layout`.
    """
    return build_dense_mask(build_metadata([Layout(tuple(block_lengths), num_final)]), window)[0, 0]
