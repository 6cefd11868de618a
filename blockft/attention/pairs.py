"""The number of pairs of tokens that the mask of a layout allows, for many layouts at once.

Shapes: N layouts, M blocks of all layouts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockft.attention.layout import Layout

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayoutArrays:
    """Many layouts as flat arrays.

    block_lengths  (M,) of all blocks, layout after layout; the final blocks of a layout are its last ones
    num_blocks     (N,)
    num_final      (N,)
    """

    block_lengths: Counts
    num_blocks: Counts
    num_final: Counts

    @classmethod
    def of(cls, layouts: Iterable[Layout]) -> "LayoutArrays":
        """Return layouts as flat arrays."""
        layouts = list(layouts)
        return cls(
            np.array([length for layout in layouts for length in layout.block_lengths], np.int64),
            np.array([len(layout.block_lengths) for layout in layouts], np.int64),
            np.array([layout.num_final for layout in layouts], np.int64),
        )

    @property
    def is_final(self) -> NDArray[np.bool_]:
        """Whether each block is a final one: (M,)."""
        ends = np.repeat(np.cumsum(self.num_blocks), self.num_blocks)
        return ends - np.arange(len(self.block_lengths)) <= np.repeat(self.num_final, self.num_blocks)

    @property
    def local_lengths(self) -> Counts:
        """The lengths of all local blocks."""
        return self.block_lengths[~self.is_final]

    @property
    def final_lengths(self) -> Counts:
        """The lengths of all final blocks."""
        return self.block_lengths[self.is_final]

    @property
    def num_local(self) -> Counts:
        """The number of local blocks of each layout: (N,)."""
        num_local: Counts = self.num_blocks - self.num_final
        return num_local

    @property
    def first_lengths(self) -> Counts:
        """The length of the first block of each layout: (N,)."""
        first_lengths: Counts = self.block_lengths[np.cumsum(self.num_blocks) - self.num_blocks]
        return first_lengths

    @property
    def copy_lens(self) -> Counts:
        """The tokens of all copies of the first block, if local blocks see it: (N,); see `Layout`."""
        copy_lens: Counts = self.first_lengths * np.maximum(self.num_local - 1, 0)
        return copy_lens

    @property
    def num_tokens(self) -> Counts:
        """The number of tokens of each layout without copies: (N,)."""
        ends = np.concatenate([[0], np.cumsum(self.block_lengths)])
        num_tokens: Counts = np.diff(ends[np.concatenate([[0], np.cumsum(self.num_blocks)])])
        return num_tokens


def count_pairs(
    layouts: LayoutArrays,
    window: int | None = None,
    *,
    reencoded: bool = True,
    local_sees_first: bool = False,
) -> tuple[Counts, Counts]:
    """Return the number of allowed pairs of each layout in block mode and in full mode: (N,) and (N,).

    A pair is a query and a key that `may_attend` and, with a sliding window, `within_window` allow.
    `reencoded` is an option of `build_metadata`, and `local_sees_first` one of `Layout`: the pairs of copies
    are then counted, too.
    """
    num_layouts = len(layouts.num_blocks)
    final, local = layouts.final_lengths, layouts.local_lengths
    final_of = np.repeat(np.arange(num_layouts), layouts.num_final)
    local_of = np.repeat(np.arange(num_layouts), layouts.num_local)

    def total(counts: Counts, of: Counts) -> Counts:
        # sums of float64 are exact up to 2**53
        return np.bincount(of, counts, num_layouts).astype(np.int64)

    context = total(local, local_of)
    if window is None:  # as wide as the longest layout
        window = int(layouts.num_tokens.max(initial=1))
    own = total(_pairs_of_block(final, window), final_of)
    reads_context = total(_pairs_with_earlier(final, context[final_of], 0, window), final_of)
    full = own + _pairs_of_block(context, window) + reads_context
    if reencoded:
        block_reads = reads_context
    else:
        block_reads = total(_pairs_with_each_local(layouts, context, window), final_of)
    block = own + total(_pairs_of_block(local, window), local_of) + block_reads
    if local_sees_first:
        is_after_first = np.diff(local_of, prepend=-1) == 0
        copies, readers = layouts.first_lengths[local_of], local[is_after_first]
        copies, local_of = copies[is_after_first], local_of[is_after_first]
        of_copies = _pairs_of_block(copies, window) + _pairs_with_earlier(readers, copies, 0, window)
        block = block + total(of_copies, local_of)
    return block, full


def _pairs_with_each_local(layouts: LayoutArrays, context: Counts, window: int) -> Counts:
    """Return the pairs of each final block with the local blocks, which all start at position 0.

    `context` (N,) is the number of tokens in local blocks.
    """
    final, local = layouts.final_lengths, layouts.local_lengths
    layout_of = np.repeat(np.arange(len(context)), layouts.num_final)
    num_local = layouts.num_local
    num_read = num_local[layout_of]
    # every pair of a final block and a local block of the same layout
    reader = np.repeat(np.arange(len(final)), num_read)
    index = np.arange(len(reader)) - np.repeat(np.cumsum(num_read) - num_read, num_read)
    read = local[(np.cumsum(num_local) - num_local)[layout_of[reader]] + index]
    # a shorter block ends farther before the final block
    gap = context[layout_of[reader]] - read
    pairs = _pairs_with_earlier(final[reader], read, gap, window)
    return np.bincount(reader, pairs, len(final)).astype(np.int64)


def _pairs_of_block(lengths: Counts, window: int) -> Counts:
    """Return the pairs within causal blocks: token i has min(i + 1, window) keys."""
    return _triangle(lengths) - _triangle(lengths - window)


def _pairs_with_earlier(queries: Counts, keys: Counts, gap: Counts | int, window: int) -> Counts:
    """Return the pairs of blocks of queries with earlier blocks of keys, `gap` positions before them.

    Query j has all keys that are fewer than `window` positions away: window - 1 - gap - j of them, at least 0
    and at most all.
    """
    most = window - 1 - gap  # of the first query
    in_reach = _triangle(most) - _triangle(most - queries)
    beyond = _triangle(most - keys) - _triangle(most - keys - queries)
    return in_reach - beyond


def _triangle(n: Counts | int) -> Counts:
    """Return 1 + 2 + ... + n, and 0 for n below 1."""
    n = np.maximum(n, 0)
    return n * (n + 1) // 2
