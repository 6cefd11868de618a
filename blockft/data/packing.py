"""Packing: assign examples, each in a mode, to rows of a fixed length."""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

Row = list[int]
"""The indices of the items in a row. An item is an example in one mode."""

PACKING_WINDOW = 4096
"""Number of items packed together.

Packing a whole epoch at once would put the same items together in every epoch.
"""


def list_example_modes(has_local_blocks: Sequence[bool], modes: Sequence[str]) -> list[tuple[int, str]]:
    """Return the items of an epoch, (example index, mode): each example once per mode.

    Examples without local blocks are the same in both modes, so they occur in mode `full` only.
    """
    return [
        (index, mode)
        for index, has_local in enumerate(has_local_blocks)
        for mode in (modes if has_local else ("full",))
    ]


def plan_rows(lengths: Sequence[int], row_len: int, seed: int, epoch: int) -> list[Row]:
    """Pack items of the given lengths into rows, each item once. The result depends on (seed, epoch) only.

    The items are shuffled. Each window of `PACKING_WINDOW` items is then packed by best-fit decreasing: the
    longest item first, into the row that has the least room for it. The rows are shuffled at the end. The
    time is O(n log n).

    Raises:
        ValueError: an item is longer than a row.
    """
    if lengths and max(lengths) > row_len:
        raise ValueError(f"an item of {max(lengths)} tokens does not fit into a row of {row_len}")
    rng = random.Random(f"{seed}:{epoch}")
    items = list(range(len(lengths)))
    rng.shuffle(items)
    rows = [
        row
        for start in range(0, len(items), PACKING_WINDOW)
        for row in _best_fit(items[start : start + PACKING_WINDOW], lengths, row_len)
    ]
    rng.shuffle(rows)
    return rows


def complete_last_batch(rows: Sequence[Row], batch_rows: int) -> list[Row]:
    """Return the rows, followed by empty rows that complete the last batch. No row is repeated."""
    return [*rows, *([] for _ in range(-len(rows) % batch_rows))]


def fill_ratio(rows: Sequence[Row], lengths: Sequence[int], row_len: int) -> float:
    """Return the share of the rows' tokens that are not padding, 0 to 1."""
    return sum(lengths[item] for row in rows for item in row) / max(1, len(rows) * row_len)


def _best_fit(items: Sequence[int], lengths: Sequence[int], row_len: int) -> list[Row]:
    """Pack items by best-fit decreasing."""
    rows: list[Row] = []
    # (free tokens, row index) of each row with free tokens, sorted: the fullest row first
    room: list[tuple[int, int]] = []
    for item in sorted(items, key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[item], 0))
        if place == len(room):
            rows.append([])
            num_free, row = row_len, len(rows) - 1
        else:
            num_free, row = room.pop(place)
        rows[row].append(item)
        if num_free > lengths[item]:
            insort(room, (num_free - lengths[item], row))
    return rows
