"""The one mask rule, and every form of it.

Shapes: B rows of a batch, T query tokens, S key tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from blockft.attention.layout import AttentionMetadata, Layout, build_metadata

Index = Any  # an int or an integer tensor; the rule is the same for both


def may_attend(
    q: Index, k: Index, example_ids: torch.Tensor, block_ids: torch.Tensor, is_final: torch.Tensor
) -> torch.Tensor:
    """Whether token `q` may attend to token `k`: the rule of Block-Attention (Ma et al. 2025, figure 2).

    ::

        lengths (2, 2, 2):  # . . . . .
                            # # . . . .       causal, inside one example, and
                            . . # . . .       inside one block, or from a final block to a local one
                            . . # # . .
                            # # # # # .
                            # # # # # #

    `q` and `k` index the three one-dimensional vectors; indices broadcast against each other.
    """
    same_block = block_ids[q] == block_ids[k]
    reads_context = is_final[q] & ~is_final[k]
    allowed: torch.Tensor = (q >= k) & (example_ids[q] == example_ids[k]) & (same_block | reads_context)
    return allowed


def within_window(q: Index, k: Index, position_ids: torch.Tensor, window: int) -> torch.Tensor:
    """Whether `k` lies in the sliding window of `q`, by position in the example, not by place in the row."""
    return position_ids[q] - position_ids[k] < window


def build_mask_mod(
    metadata: AttentionMetadata, window: int | None = None, first_query: int = 0
) -> Callable[..., torch.Tensor]:
    """The rule of a batch, `rule(b, h, q, k)` over its rows `b`, as FlexAttention calls it; heads are alike.

    Queries are counted from the row's token `first_query` on: with cached keys only the last tokens of a row
    ask.
    """
    num_tokens = metadata.example_ids.shape[1]
    example_ids, block_ids = metadata.example_ids.flatten(), metadata.block_ids.flatten()
    is_final, position_ids = metadata.is_final.flatten(), metadata.position_ids.flatten()

    def rule(b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        q, k = b * num_tokens + first_query + q, b * num_tokens + k
        allowed = may_attend(q, k, example_ids, block_ids, is_final)
        return allowed if window is None else allowed & within_window(q, k, position_ids, window)

    return rule


def build_dense_mask(
    metadata: AttentionMetadata, window: int | None = None, num_queries: int | None = None
) -> torch.Tensor:
    """The rule written out, the oracle of every backend: (B, 1, T, S) bool, true where attention is allowed.

    S is the tokens of a row, T the last `num_queries` of them (all by default).
    """
    num_rows, num_keys = metadata.example_ids.shape
    num_queries = num_keys if num_queries is None else num_queries
    device = metadata.example_ids.device
    rule = build_mask_mod(metadata, window, first_query=num_keys - num_queries)
    b = torch.arange(num_rows, device=device)[:, None, None, None]
    q = torch.arange(num_queries, device=device)[:, None]
    return rule(b, 0, q, torch.arange(num_keys, device=device))


def tile_occupancy(
    metadata: AttentionMetadata, window: int | None, tile: int, strip: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles of (tile, tile) tokens have allowed pairs, and which have no others.

    Two (B, T / tile, T / tile) bool tensors, rounded up. The mask is written out `strip` queries at a time,
    and no farther back than their first example begins: memory and time grow with T, not with its square.
    """
    num_rows, num_tokens = metadata.example_ids.shape
    device, num_tiles = metadata.example_ids.device, -(-num_tokens // tile)
    assert strip % tile == 0
    rule = build_mask_mod(metadata, window)
    b = torch.arange(num_rows, device=device)[:, None, None]
    tokens = torch.arange(num_tokens, device=device)
    some = torch.zeros(num_rows, num_tiles, num_tiles, dtype=torch.bool, device=device)
    every = torch.zeros_like(some)
    # of each strip's first query the first token of its example, in any row
    own = metadata.example_ids[:, ::strip, None] == metadata.example_ids[:, None]
    lowest = own.to(torch.uint8).argmax(dim=2).amin(dim=0).tolist()
    for start, low in zip(range(0, num_tokens, strip), lowest, strict=True):
        end, low = min(start + strip, num_tokens), low // tile * tile
        allowed = rule(b, 0, tokens[start:end, None], tokens[low:end])
        padding = -end % tile
        allowed = torch.nn.functional.pad(allowed, (0, padding, 0, padding))
        tiles = allowed.reshape(num_rows, -1, tile, allowed.shape[2] // tile, tile)
        place = (slice(None), slice(start // tile, -(-end // tile)), slice(low // tile, -(-end // tile)))
        some[place] = tiles.any(dim=4).any(dim=2)
        every[place] = tiles.all(dim=4).all(dim=2)
    return some, every


def example_mask(block_lengths: Sequence[int], num_final: int = 1, window: int | None = None) -> torch.Tensor:
    """The (T, T) bool mask of one example, true where row token may attend to column token.

    Raises:
        ValueError: see `Layout`.
    """
    return build_dense_mask(build_metadata([Layout(tuple(block_lengths), num_final)]), window)[0, 0]
