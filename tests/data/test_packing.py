import random

import pytest

from blockft.data.packing import (
    PACKING_WINDOW,
    complete_last_batch,
    fill_ratio,
    list_example_modes,
    plan_rows,
)


def lengths(number: int, longest: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randint(1, longest) for _ in range(number)]


@pytest.mark.parametrize("number", [0, 1, 50, PACKING_WINDOW + 500])
def test_every_item_is_in_one_row_and_no_row_is_too_long(number: int) -> None:
    items = lengths(number, 100)
    rows = plan_rows(items, 128, seed=1, epoch=0)
    assert sorted(item for row in rows for item in row) == list(range(number))
    assert all(sum(items[item] for item in row) <= 128 for row in rows)


def test_rows_are_well_filled() -> None:
    items = lengths(5000, 400)
    assert fill_ratio(plan_rows(items, 1024, seed=1, epoch=0), items, 1024) > 0.98
    assert fill_ratio([], [], 8) == 0


def test_an_item_that_fills_a_row_is_alone() -> None:
    assert sorted(plan_rows([8, 8, 3, 5], 8, seed=0, epoch=0), key=len)[:2] in ([[0], [1]], [[1], [0]])


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    items = lengths(300, 100)
    plans = [plan_rows(items, 256, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert plans[0] == plan_rows(items, 256, seed=0, epoch=0)
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_an_item_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens"):
        plan_rows([3, 9], 8, seed=0, epoch=0)


def test_the_last_batch_is_completed_with_empty_rows() -> None:
    assert complete_last_batch([[0], [1], [2]], 2) == [[0], [1], [2], []]
    assert complete_last_batch([[0], [1]], 2) == [[0], [1]]


def test_only_examples_with_local_blocks_are_in_block_mode() -> None:
    assert list_example_modes([True, False], ["block", "full"]) == [(0, "block"), (0, "full"), (1, "full")]
    assert list_example_modes([True, False], ["block"]) == [(0, "block"), (1, "full")]
