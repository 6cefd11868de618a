import os
from collections.abc import Iterator

import pytest

from blockft.data.parallel import map_in_order


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_are_in_order_for_any_number_of_workers(num_workers: int) -> None:
    offset = 1
    assert list(map_in_order(lambda n: n + offset, range(50), num_workers)) == list(range(1, 51))
    assert list(map_in_order(lambda n: n, [], num_workers)) == []


def test_only_a_few_tasks_are_taken_ahead() -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for n in range(1000):
            taken = n
            yield n

    results = map_in_order(lambda n: os.getpid(), tasks(), 2)
    assert next(results) != os.getpid()
    assert taken < 10
    results.close()  # type: ignore[attr-defined]


def test_an_error_in_tasks_or_work_is_raised() -> None:
    def broken() -> Iterator[int]:
        yield from range(9)
        raise ValueError("source")

    with pytest.raises(ValueError, match="source"):
        list(map_in_order(lambda n: n, broken(), 2))
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(lambda n: 1 // (n - 5), range(9), 2))
