"""Packing: assign examples, each in a mode, to rows of a fixed length.

Shapes: N items, R rows. An item is an example in one mode.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PACKING_WINDOW = 4096
"""Number of items packed together.

Packing a whole epoch at once would put the same items together in every epoch.
"""


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of items.

    items   (N,) the indices of the items, row after row
    starts  (R + 1,) where each row starts in `items`; the last entry is N
    """

    items: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        """Return the items of a row."""
        row = range(len(self))[row]
        return self.items[self.starts[row] : self.starts[row + 1]]

    def count_tokens(self, lengths: ArrayLike) -> NDArray[np.int64]:
        """Return the number of tokens of each row, padding excluded, from the lengths of the items."""
        ends = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64)[self.items])])
        return np.diff(ends[self.starts])

    def complete_last_batch(self, batch_rows: int) -> "PackedRows":
        """Return the rows, followed by empty rows that complete the last batch. No row is repeated."""
        num_added = -len(self) % batch_rows
        return PackedRows(self.items, np.pad(self.starts, (0, num_added), mode="edge"))


def list_example_modes(
    has_local_blocks: ArrayLike, modes: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the items of an epoch: each example once per mode.

    Examples without local blocks are the same in both modes, so they occur in mode `full` only.

    Returns:
        The index of the example of each item (N,), and whether the item is in block mode (N,).
    """
    has_local = np.asarray(has_local_blocks, bool)[:, None]
    is_block = has_local & (np.array(modes) == "block")
    # an example without local blocks is one item, whatever the modes
    is_item = has_local | (np.arange(len(modes)) == 0)
    return np.nonzero(is_item)[0], is_block[is_item]


def plan_rows(lengths: ArrayLike, row_len: int, seed: int, epoch: int) -> PackedRows:
    """Pack items of the given lengths into rows, each item once. The result depends on (seed, epoch) only.

    The items are shuffled. Each window of `PACKING_WINDOW` items is then packed by best-fit decreasing: the
    longest item first, into the row that has the least room for it. The rows are shuffled at the end. The
    time is O(n log n).

    Raises:
        ValueError: an item is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.max() > row_len:
        raise ValueError(f"an item of {lengths.max()} tokens does not fit into a row of {row_len}")
    rng = random.Random(f"{seed}:{epoch}")
    shuffled = list(range(len(lengths)))
    rng.shuffle(shuffled)
    items = np.array(shuffled, np.int64)
    rows = np.zeros(len(items), np.int64)
    num_rows = 0
    for start in range(0, len(items), PACKING_WINDOW):
        window = slice(start, start + PACKING_WINDOW)
        items[window] = items[window][np.argsort(-lengths[items[window]], kind="stable")]
        rows_of_window = _best_fit(lengths[items[window]].tolist(), row_len)
        rows[window] = num_rows + np.array(rows_of_window)
        num_rows += max(rows_of_window) + 1
    order = list(range(num_rows))
    rng.shuffle(order)
    places = np.empty(num_rows, np.int64)
    places[order] = np.arange(num_rows)
    by_row = np.argsort(places[rows], kind="stable")
    counts = np.bincount(places[rows], minlength=num_rows)
    return PackedRows(items[by_row], np.concatenate([[0], np.cumsum(counts)]))


def _best_fit(lengths: Sequence[int], row_len: int) -> list[int]:
    """Return the row of each item. Lengths decrease; each item goes into the row with the least room for it.

    Of rows with equal room the first one is taken.
    """
    rows: list[int] = []
    num_rows = 0
    # free tokens * step + row of each row that has room for the shortest item, sorted: the fullest row first
    room: list[int] = []
    step = len(lengths)
    for length in lengths:
        needed = length * step
        if not room or room[-1] < needed:
            rows.append(num_rows)
            if row_len - length >= lengths[-1]:
                # lengths decrease, so no other row has more room
                room.append((row_len - length) * step + num_rows)
            num_rows += 1
            continue
        left = room.pop(bisect_left(room, needed)) - needed
        rows.append(left % step)
        if left // step >= lengths[-1]:
            insort(room, left)
    return rows
