"""The free parts of a row of slots or bytes."""


class FreeRanges:
    """Free ranges of 0..length-1. At first all is free.

    An exception or interrupt at any line leaves ranges that are free, or that are lost until the next one is
    given back, and never a range that is both free and taken.
    """

    def __init__(self, length: int) -> None:
        self._ranges = [(0, length)]

    def take(self, length: int) -> int | None:
        """Return the start of `length` slots from the first free range that is long enough, or None."""
        for i, (start, size) in enumerate(self._ranges):
            if size >= length:
                self._ranges[i : i + 1] = [(start + length, size - length)] if size > length else []
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Free a range that was taken."""
        self._ranges.append((start, length))
        self._ranges = _merge(self._ranges)


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges (start, length) sorted, with adjacent ranges merged."""
    merged: list[tuple[int, int]] = []
    for start, size in sorted(ranges):
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((start, size))
    return merged
