"""The dataset of a run: all rows of all epochs in training order."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.data import Dataset, Subset

from blockft.data.collate import collate_row
from blockft.data.encoder import IGNORE_INDEX, Example
from blockft.data.packing import complete_last_batch, fill_ratio, list_example_modes, plan_rows


class RowDataset(Dataset[dict[str, torch.Tensor]]):
    """All rows of all epochs; each epoch is a multiple of `batch_rows` rows.

    Every process derives the rows from (seed, epoch) alone, so that their order does not depend on the number
    of processes or on interruptions. An example of a single block is trained in full mode only.

    `items` lists (example index, mode) of an epoch; `epochs` lists each epoch's rows of item indices.
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
        self._examples, self._row_len, self._batch_rows = examples, row_len, batch_rows
        self._collate = partial(
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
        return self._collate([(self._examples[i], mode) for i, mode in chosen])

    @property
    def fill(self) -> float:
        """Share of the tokens of the first epoch's rows that are not padding."""
        return fill_ratio(self.epochs[0], self._lengths, self._row_len)

    @property
    def num_labels(self) -> int:
        """Number of label tokens in an epoch."""
        return sum(int((self._examples[index].labels != IGNORE_INDEX).sum()) for index, _ in self.items)

    def list_batch_tokens(self) -> list[int]:
        """Return the number of tokens of each batch, padding excluded, in training order."""
        row_tokens = [sum(self._lengths[item] for item in row) for row in self._rows]
        size = self._batch_rows
        return [sum(row_tokens[start : start + size]) for start in range(0, len(row_tokens), size)]
