"""Prefetched rows are the rows themselves, also after a jump; errors reach the reader."""

import threading

import pytest
import torch
from torch.utils.data import Dataset, Subset

from blockft.training.prefetch import PrefetchedRows


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Ten rows that record in which thread they are collated."""

    def __init__(self) -> None:
        self.collated: list[int] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 9:
            raise ValueError("row 9 is damaged")
        self.collated.append(index)
        self.threads.add(threading.current_thread().name)
        return {"input_ids": torch.tensor([index])}


def read(prefetched: PrefetchedRows, index: int) -> int:
    """Read a row as a training does: the next rows are prefetched after it."""
    row = int(prefetched[index]["input_ids"])
    prefetched.prefetch()
    return row


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("num_ahead", [1, 3, 20])
def test_rows_are_those_of_the_dataset_and_each_is_collated_once(stride: int, num_ahead: int) -> None:
    rows = Rows()
    prefetched = PrefetchedRows(Subset(rows, range(9)), stride=stride, num_ahead=num_ahead, pinned=False)
    indices = list(range(1, 9, stride))
    assert [read(prefetched, i) for i in indices] == indices
    assert rows.collated == indices
    assert len(rows.threads - {threading.current_thread().name}) == 1


def test_rows_are_right_without_prefetching_and_after_a_jump() -> None:
    prefetched = PrefetchedRows(Subset(Rows(), range(9)), stride=1, num_ahead=3, pinned=False)
    assert [int(prefetched[i]["input_ids"]) for i in (0, 1, 2)] == [0, 1, 2]
    assert [read(prefetched, i) for i in (3, 7, 8, 2, 2)] == [3, 7, 8, 2, 2]


def test_an_error_is_raised_when_its_row_is_read() -> None:
    prefetched = PrefetchedRows(Subset(Rows(), range(10)), stride=1, num_ahead=3, pinned=False)
    assert read(prefetched, 8) == 8
    with pytest.raises(ValueError, match="row 9 is damaged"):
        prefetched[9]
    with pytest.raises(IndexError, match="row 10 of 10"):
        prefetched[10]


def test_closing_ends_the_thread_and_drops_the_rows_that_are_waiting() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class SlowRows(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                go_on.wait(600)
            return super().__getitem__(index)

    rows = SlowRows()
    before = set(threading.enumerate())
    prefetched = PrefetchedRows(Subset(rows, range(9)), stride=1, num_ahead=5, pinned=False)
    assert read(prefetched, 0) == 0
    entered.wait(600)
    prefetched.close()  # does not wait for row 1
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(600)
        assert not thread.is_alive()
    assert rows.collated == [0, 1], "only the row that was begun is collated"
