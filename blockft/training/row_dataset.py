"""The rows of a whole run, in the order in which they are trained on."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.data import Dataset, Subset

from blockft.data.collate import collate_row
from blockft.data.encoder import IGNORE_INDEX, Example
from blockft.data.packing import complete_last_batch, fill_ratio, list_example_modes, plan_rows


class RowDataset(Dataset[dict[str, torch.Tensor]]):
    """Every row of every epoch, a multiple of `batch_rows` each.

    Each process derives them from (seed, epoch) alone, so their order is that of a run with any other number
    of processes, and that of a run that was interrupted. An example of a single block has its full view only.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Subset[Example],
        modes: Sequence[str],
        *,
        row_len: int,
        batch_rows: int,
        epochs: int,
        seed: int,
        pad_id: int,
        reencoded: bool = True,
        with_full: bool = False,
    ) -> None:
        self._examples, self._row_len = examples, row_len
        self._row = partial(
            collate_row, row_len=row_len, pad_id=pad_id, reencoded=reencoded, with_full=with_full
        )
        has_local_blocks = [examples[index].has_local_blocks for index in range(len(examples))]
        self.items = list_example_modes(has_local_blocks, modes)
        self._lengths = [len(examples[index]) for index, _ in self.items]
        self.epochs = [
            complete_last_batch(plan_rows(self._lengths, row_len, seed, epoch), batch_rows)
            for epoch in range(epochs)
        ]
        self._rows = [row for epoch in self.epochs for row in epoch]
        self.num_tokens = sum(self._lengths)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chosen = [self.items[item] for item in self._rows[index]]
        return self._row([(self._examples[i], mode) for i, mode in chosen])

    @property
    def fill(self) -> float:
        """The share of the first epoch's rows that is not padding."""
        return fill_ratio(self.epochs[0], self._lengths, self._row_len)

    @property
    def num_labels(self) -> int:
        """Label tokens in an epoch."""
        return sum(int((self._examples[index].labels != IGNORE_INDEX).sum()) for index, _ in self.items)
