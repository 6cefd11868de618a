"""Prefetch rows: a thread collates the next rows while the device computes."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.utils.data import Dataset, Subset


class PrefetchedRows(Dataset[dict[str, torch.Tensor]]):
    """The same rows in the same order. `prefetch` lets a thread collate those that are read next.

    `close` ends the thread.

    rows       the rows of all ranks
    stride     the distance between two rows of a rank, which is the number of ranks
    num_ahead  how many rows are collated ahead
    pinned     whether the thread also copies them to pinned memory, from which copies to a GPU do not wait
    """

    def __init__(
        self, rows: Subset[dict[str, torch.Tensor]], *, stride: int, num_ahead: int, pinned: bool
    ) -> None:
        self._rows, self._stride, self._num_ahead, self._pinned = rows, stride, num_ahead, pinned
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: dict[int, Future[dict[str, torch.Tensor]]] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a row.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        self._next = index + self._stride
        future = self._pending.pop(index, None)
        return future.result() if future else self._collate(index)

    def prefetch(self) -> None:
        """Begin to collate the rows after the one that was read last, unless that has begun already.

        Call it when the device is busy, because the thread takes time from the one that launches kernels.
        """
        stop = min(self._next + self._stride * self._num_ahead, len(self))
        wanted = range(self._next, stop, self._stride)
        # a run that resumes skips rows
        self._pending = {i: future for i, future in self._pending.items() if i in wanted}
        for i in wanted:
            if i not in self._pending:
                self._pending[i] = self._pool.submit(self._collate, i)

    def close(self) -> None:
        """End the thread after the row that it collates. An error does not wait for a slow disk."""
        self._pending.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _collate(self, index: int) -> dict[str, torch.Tensor]:
        row = self._rows[index]
        return {name: ids.pin_memory() for name, ids in row.items()} if self._pinned else row
