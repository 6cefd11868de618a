import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.data import packing
from blockft.data.advice import RowFill
from blockft.data.packing import PACKING_WINDOW, PackedRows, list_example_modes, plan_rows


def lengths(number: int, longest: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randint(1, longest) for _ in range(number)]


def to_lists(rows: PackedRows) -> list[list[int]]:
    return [row.tolist() for row in rows]


def pack_plainly(lengths: list[int], row_len: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the rows of `plan_rows`, by the simplest code that follows its description."""
    rng = random.Random(f"{seed}:{epoch}")
    items = list(range(len(lengths)))
    rng.shuffle(items)
    rows = []
    for start in range(0, len(items), packing.PACKING_WINDOW):
        window: list[list[int]] = []
        room: list[int] = []
        for item in sorted(items[start : start + packing.PACKING_WINDOW], key=lambda i: -lengths[i]):
            fitting = [row for row in range(len(window)) if room[row] >= lengths[item]]
            if not fitting:
                fitting = [len(window)]
                window.append([])
                room.append(row_len)
            row = min(fitting, key=lambda row: room[row])
            window[row].append(item)
            room[row] -= lengths[item]
        rows += window
    rng.shuffle(rows)
    return rows


@given(
    st.lists(st.integers(1, 30) | st.sampled_from([7, 15, 30]), max_size=120),
    st.integers(30, 70),
    st.integers(1, 50),
    st.integers(0, 3),
)
def test_rows_are_those_of_plain_best_fit(lengths: list[int], row_len: int, window: int, epoch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACKING_WINDOW", window)
        assert to_lists(plan_rows(lengths, row_len, 3, epoch)) == pack_plainly(lengths, row_len, 3, epoch)


@pytest.mark.parametrize("number", [0, 1, 50, PACKING_WINDOW + 500])
def test_every_item_is_in_one_row_and_no_row_is_too_long(number: int) -> None:
    items = lengths(number, 100)
    rows = plan_rows(items, 128, seed=1, epoch=0)
    assert sorted(item for row in rows for item in row) == list(range(number))
    assert all(sum(items[item] for item in row) <= 128 for row in rows)


def test_rows_are_well_filled() -> None:
    items = lengths(5000, 400)
    assert RowFill.of_rows(plan_rows(items, 1024, seed=1, epoch=0), items, 1024).fill > 0.98
    assert RowFill.of_rows(plan_rows([], 8, seed=0, epoch=0), [], 8).fill == 0


def test_an_item_that_fills_a_row_is_alone() -> None:
    rows = to_lists(plan_rows([8, 8, 3, 5], 8, seed=0, epoch=0))
    assert sorted(rows, key=len)[:2] in ([[0], [1]], [[1], [0]])


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    items = lengths(300, 100)
    plans = [to_lists(plan_rows(items, 256, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert plans[0] == to_lists(plan_rows(items, 256, seed=0, epoch=0))
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_an_item_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens"):
        plan_rows([3, 9], 8, seed=0, epoch=0)


def test_the_last_batch_is_completed_with_empty_rows() -> None:
    rows = PackedRows(np.arange(4), np.array([0, 2, 3, 4]))
    assert to_lists(rows.complete_last_batch(2)) == [[0, 1], [2], [3], []]
    assert to_lists(rows.complete_last_batch(3)) == [[0, 1], [2], [3]]
    assert rows.complete_last_batch(5).count_tokens([5, 6, 7, 8]).tolist() == [11, 7, 8, 0, 0]
    assert rows[-1].tolist() == [3]


def test_only_examples_with_local_blocks_are_in_block_mode() -> None:
    for modes, examples, is_block in (
        (["block", "full"], [0, 0, 1], [True, False, False]),
        (["full", "block"], [0, 0, 1], [False, True, False]),
        (["block"], [0, 1], [True, False]),
        (["full"], [0, 1], [False, False]),
    ):
        found = list_example_modes([True, False], modes)
        assert [array.tolist() for array in found] == [examples, is_block]
