"""Rows: which examples, in which view, are trained on together."""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

Row = list[int]
"""Indices of the items in a row."""

PACKING_WINDOW = 4096
"""Items packed together. A whole epoch at once would put the same items together in every epoch."""


def list_example_modes(splits: Sequence[bool], modes: Sequence[str]) -> list[tuple[int, str]]:
    """Each example of an epoch by its index, once per view; only in `full` if it does not split."""
    return [(index, mode) for index, split in enumerate(splits) for mode in (modes if split else ("full",))]


def plan_rows(lengths: Sequence[int], row_len: int, seed: int, epoch: int) -> list[Row]:
    """Pack items of the given lengths into rows, every item once; the order depends on (seed, epoch) alone.

    Items are shuffled, then each window of them is packed longest first, each into the row that it fills
    best; the rows are shuffled in turn. Takes O(n log n).

    Raises:
        ValueError: an item is longer than a row.
    """
    if lengths and max(lengths) > row_len:
        raise ValueError(f"an item of {max(lengths)} tokens does not fit into a row of {row_len}")
    shuffler = random.Random(f"{seed}:{epoch}")
    items = list(range(len(lengths)))
    shuffler.shuffle(items)
    rows = [
        row
        for start in range(0, len(items), PACKING_WINDOW)
        for row in _best_fit(items[start : start + PACKING_WINDOW], lengths, row_len)
    ]
    shuffler.shuffle(rows)
    return rows


def complete_last_batch(rows: Sequence[Row], batch_rows: int) -> list[Row]:
    """The rows, and as many empty ones as the last batch lacks: never repeats."""
    return [*rows, *([] for _ in range(-len(rows) % batch_rows))]


def fill_ratio(rows: Sequence[Row], lengths: Sequence[int], row_len: int) -> float:
    """The share of the rows' tokens that is not padding."""
    return sum(lengths[item] for row in rows for item in row) / max(1, len(rows) * row_len)


def _best_fit(items: Sequence[int], lengths: Sequence[int], row_len: int) -> list[Row]:
    """Best-fit decreasing: `room` lists (free tokens, row), the fullest row first."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []
    for item in sorted(items, key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[item], 0))
        if at == len(room):
            rows.append([])
            free, row = row_len, len(rows) - 1
        else:
            free, row = room.pop(at)
        rows[row].append(item)
        if free > lengths[item]:
            insort(room, (free - lengths[item], row))
    return rows
