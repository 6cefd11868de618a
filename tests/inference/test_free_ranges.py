"""Free ranges: what is taken never overlaps, and neighbours that are given back become one range."""

import random

from blockft.inference.free_ranges import FreeRanges


def test_ranges_that_are_taken_do_not_overlap() -> None:
    rng, free, taken = random.Random(0), FreeRanges(100), dict[int, int]()
    for _ in range(500):
        length = rng.randint(1, 20)
        start = free.take(length)
        if start is None:
            free.give_back(*taken.popitem())
            continue
        slots = [slot for begin, size in taken.items() for slot in range(begin, begin + size)]
        assert not {*slots} & {*range(start, start + length)} and start + length <= 100
        taken[start] = length
        if rng.random() < 0.3:
            begin = rng.choice([*taken])
            free.give_back(begin, taken.pop(begin))
    while taken:
        free.give_back(*taken.popitem())
    assert free.take(100) == 0 and free.take(1) is None
