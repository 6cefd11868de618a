"""The mask rule of Block-Attention, and every mask that is derived from it.

Shapes: B rows of a batch, T query tokens, S key tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from blockft.attention.layout import AttentionMetadata, Layout, build_metadata

Index = Any  # an int or an integer tensor


def may_attend(
    q: Index,
    k: Index,
    example_ids: torch.Tensor,
    block_ids: torch.Tensor,
    is_final: torch.Tensor,
    is_copy: torch.Tensor,
) -> torch.Tensor:
    """Return whether token `q` may attend to token `k` (Ma et al. 2025, figure 2).

    ::

        lengths (2, 2, 2):  # . . . . .
                            # # . . . .       causal, within one example, and
                            . . # . . .       within one block, or from a final block to a local block
                            . . # # . .
                            # # # # # .
                            # # # # # #

        lengths (1, 2, 2) with a copy (c) of the first block:

                            # . . . . .
                       c    . # . . . .       a copy and the block after it are one block;
                            . # # . . .       a final block does not see the copy
                            . # # # . .
                            # . # # # .
                            # . # # # #

    `q` and `k` are indices into the four (T,) tensors. They broadcast against each other.
    """
    same_block = block_ids[q] == block_ids[k]
    reads_context = is_final[q] & ~is_final[k] & ~is_copy[k]
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
    is_final, is_copy = metadata.is_final.flatten(), metadata.is_copy.flatten()
    position_ids = metadata.position_ids.flatten()

    def mask_mod(b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        q, k = b * num_tokens + first_query + q, b * num_tokens + k
        allowed = may_attend(q, k, example_ids, block_ids, is_final, is_copy)
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


@dataclass(frozen=True)
class KeyRanges:
    """The mask of rows in two numbers for each token, both (B, T) int32 indices into the row.

    Query q may attend to key k if ``first_keys[q] <= k <= q <= last_queries[k]``. This equals `may_attend`
    for the rows of `build_metadata`, where examples and blocks are contiguous and final blocks follow the
    local blocks of their example. It needs fewer reads and comparisons.

    ::

        block lengths   (2, 2, 2)        (2, 2, 2) with two final blocks        (1, 2, 2) with a copy
        first_keys      0 0 2 2 0 0      0 0 0 0 0 0                            0 1 1 1 0 0
        last_queries    5 5 5 5 5 5      5 5 3 3 5 5                            5 3 5 5 5 5

    `context_ends` holds, for tokens of final blocks, the index after the last local block of the example,
    and for other tokens the start of the example. `block_starts` holds the first token of each token's block.
    `is_copy` is that of the metadata.
    """

    first_keys: torch.Tensor
    last_queries: torch.Tensor
    context_ends: torch.Tensor
    block_starts: torch.Tensor
    is_copy: torch.Tensor

    @classmethod
    def of_metadata(cls, metadata: AttentionMetadata) -> "KeyRanges":
        """Return the ranges of rows, computed on their device. The CPU does not wait for the result."""
        is_final = metadata.is_final
        example_starts, example_ends = _run_bounds(metadata.example_ids)
        block_starts, block_ends = _run_bounds(metadata.block_ids)
        context_ends, _ = _run_bounds(2 * metadata.example_ids + is_final)
        return cls(
            first_keys=torch.where(is_final, example_starts, block_starts),
            last_queries=torch.where(is_final | metadata.is_copy, block_ends, example_ends),
            context_ends=context_ends,
            block_starts=block_starts,
            is_copy=metadata.is_copy,
        )


def _run_bounds(ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the first and the last token of each token's run of equal ids, (B, T) int32."""
    num_tokens = ids_BT.shape[1]
    index_T = torch.arange(num_tokens, dtype=torch.int32, device=ids_BT.device)
    changes = ids_BT[:, 1:] != ids_BT[:, :-1]
    starts = torch.where(F.pad(changes, (1, 0), value=True), index_T, 0).cummax(dim=1).values
    ends = torch.where(F.pad(changes, (0, 1), value=True), index_T, num_tokens - 1)
    return starts, ends.flip(1).cummin(dim=1).values.flip(1)


def build_range_mask_mod(
    ranges: KeyRanges, metadata: AttentionMetadata, window: int | None = None
) -> Callable[..., torch.Tensor]:
    """Build a mask function that equals that of `build_mask_mod`, and is faster on a GPU."""
    num_tokens = metadata.example_ids.shape[1]
    first_keys, last_queries = ranges.first_keys.flatten(), ranges.last_queries.flatten()
    position_ids = metadata.position_ids.flatten()

    def mask_mod(b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        row = b * num_tokens
        allowed: torch.Tensor = (first_keys[row + q] <= k) & (k <= q) & (q <= last_queries[row + k])
        return allowed if window is None else allowed & within_window(row + q, row + k, position_ids, window)

    return mask_mod


def tile_occupancy(
    metadata: AttentionMetadata,
    window: int | None,
    tile: int,
    *,
    ranges: KeyRanges | None = None,
    strip: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tiles of (tile, tile) tokens have any allowed pair, and which have only allowed pairs.

    Both are (B, ceil(T / tile), ceil(T / tile)) bool tensors. A tile that reaches beyond the row has pairs
    that are not allowed. `ranges` are those of `metadata`, if they are known. Under a sliding window, the
    mask is computed for `strip` queries at a time.
    """
    if window is None:
        return _tile_occupancy_of_ranges(ranges or KeyRanges.of_metadata(metadata), tile)
    return _tile_occupancy_in_window(metadata, window, tile, strip)


def _tile_occupancy_of_ranges(ranges: KeyRanges, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the occupancy from the ranges alone, in time that grows with T. The CPU does not wait for it.

    A query sees one range of keys, or two: the local blocks of its example without copies, and its own block.
    """
    num_rows, num_tokens = ranges.first_keys.shape
    device, num_tiles = ranges.first_keys.device, -(-num_tokens // tile)
    q = torch.arange(num_tokens, dtype=torch.int32, device=device)
    offsets = q // tile * (num_tiles + 1)
    padding = (0, -num_tokens % tile)

    def tiles_in_ranges(first: torch.Tensor, last: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        # for each tile of queries: how many ranges start in a tile of keys, minus those that end before it
        changes = torch.zeros(num_rows, num_tiles * (num_tiles + 1), dtype=torch.int32, device=device)
        changes.scatter_add_(1, (offsets + first // tile).long(), count)
        changes.scatter_add_(1, (offsets + last // tile + 1).long(), -count)
        return changes.view(num_rows, num_tiles, -1).cumsum(dim=2)[:, :, :-1] > 0

    has_context = (ranges.first_keys < ranges.context_ends).int()
    in_context = tiles_in_ranges(ranges.first_keys, ranges.context_ends - 1, has_context)
    # a context starts and ends with tokens that are no copies: a tile of copies alone lies inside of it
    is_copied_tile = F.pad(ranges.is_copy, padding, value=True).view(num_rows, 1, num_tiles, tile).all(dim=3)
    in_block = tiles_in_ranges(ranges.block_starts, q.expand(num_rows, -1), torch.ones_like(has_context))
    any_allowed = in_context & ~is_copied_tile | in_block
    # all pairs satisfy a chain of inequalities if its extreme pairs do
    first_keys = F.pad(ranges.first_keys, padding, value=num_tokens).view(num_rows, num_tiles, tile)
    last_queries = F.pad(ranges.last_queries, padding, value=-1).view(num_rows, num_tiles, tile)
    starts = torch.arange(num_tiles, device=device) * tile
    ends = starts + tile - 1
    all_allowed = (
        (first_keys.amax(dim=2)[:, :, None] <= starts)
        & (ends <= starts[:, None])
        & (ends[:, None] <= last_queries.amin(dim=2)[:, None])
    )
    return any_allowed, all_allowed


def _tile_occupancy_in_window(
    metadata: AttentionMetadata, window: int, tile: int, strip: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the occupancy under a sliding window, from the mask itself.

    The mask is computed for `strip` queries at a time, and for no key before the start of their first
    example. Memory and time therefore grow with T, not with its square.
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
        allowed = F.pad(allowed, (0, padding, 0, padding))
        tiles = allowed.reshape(num_rows, -1, tile, allowed.shape[2] // tile, tile)
        region = (slice(None), slice(start // tile, -(-end // tile)), slice(low // tile, -(-end // tile)))
        any_allowed[region] = tiles.any(dim=4).any(dim=2)
        all_allowed[region] = tiles.all(dim=4).all(dim=2)
    return any_allowed, all_allowed


def example_mask(
    block_lengths: Sequence[int],
    num_final: int = 1,
    window: int | None = None,
    *,
    local_sees_first: bool = False,
) -> torch.Tensor:
    """Build the (T, T) bool mask of one example, true where the row's token may attend to the column's.

    With `local_sees_first` the tokens are those of a row, with copies of the first block.

    Raises:
        ValueError: see `Layout`.
    """
    layout = Layout(tuple(block_lengths), num_final, local_sees_first)
    return build_dense_mask(build_metadata([layout]), window)[0, 0]
