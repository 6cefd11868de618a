"""The dataset of a run: all rows of all epochs in training order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from blockft.data.collate import collate_row
from blockft.data.encoder import Example
from blockft.data.mixture import Mixture
from blockft.data.packing import PackedRows, list_example_modes, plan_rows
from blockft.data.prepared import ExampleColumns
from blockft.training.loss_groups import find_groups


@dataclass(frozen=True, eq=False)
class Epoch:
    """The items of an epoch and the rows that they are packed into. An item is an example in one mode.

    examples  the index of the example of each item
    is_block  whether each item is in block mode
    lengths   the number of tokens that each item takes in a row, copies of the first block included
    rows      the rows of item indices, a multiple of the rows of a batch
    """

    examples: NDArray[np.int64]
    is_block: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    rows: PackedRows


class RowDataset(Dataset[dict[str, torch.Tensor]]):
    """All rows of all epochs; each epoch is a multiple of `batch_rows` rows.

    Every process derives the rows from (seed, epoch) alone, so that their order does not depend on the number
    of processes or on interruptions. An example of a single block is trained in full mode only. The groups of
    a row are those of `LossGroups`.

    examples: where the examples of the rows are read; `columns` describes all of them.
    chosen: the indices of the examples that the rows hold, in order.
    mixture: how often they occur in an epoch; None is once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        columns: ExampleColumns,
        chosen: NDArray[np.int64],
        modes: Sequence[str],
        *,
        row_len: int,
        batch_rows: int,
        epochs: int,
        seed: int,
        pad_id: int,
        mixture: Mixture | None = None,
        reencoded: bool = True,
        local_sees_first: bool = False,
        with_full: bool = False,
    ) -> None:
        self._examples, self._columns = examples, columns
        self._row_len, self._batch_rows = row_len, batch_rows
        self._local_sees_first = local_sees_first
        self._collate = partial(
            collate_row,
            row_len=row_len,
            pad_id=pad_id,
            reencoded=reencoded,
            local_sees_first=local_sees_first,
            with_full=with_full,
        )
        self.epochs = [self._plan_epoch(chosen, mixture, modes, seed, epoch) for epoch in range(epochs)]
        self._ends = np.cumsum([len(epoch.rows) for epoch in self.epochs])

    def _plan_epoch(
        self,
        chosen: NDArray[np.int64],
        mixture: Mixture | None,
        modes: Sequence[str],
        seed: int,
        epoch: int,
    ) -> Epoch:
        if mixture is not None:
            chosen = mixture.draw(chosen, self._columns.sources[chosen], seed, epoch)
        places, is_block = list_example_modes(self._columns.has_local_blocks[chosen], modes)
        examples = chosen[places]
        lengths = self._columns.row_lengths(examples, is_block, local_sees_first=self._local_sees_first)
        rows = plan_rows(lengths, self._row_len, seed, epoch).complete_last_batch(self._batch_rows)
        return Epoch(examples, is_block, lengths, rows)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        epoch = self.epochs[number]
        row = epoch.rows[int(index - self._ends[number]) + len(epoch.rows)]
        examples, is_block = epoch.examples[row], epoch.is_block[row]
        return self._collate(
            [
                (self._examples[int(example)], "block" if block else "full")
                for example, block in zip(examples, is_block, strict=True)
            ],
            groups=find_groups(self._columns.sources[examples], is_block).tolist(),
        )

    def choose_examples(self, number: int) -> list[tuple[Example, int]]:
        """Return up to `number` examples of the first epoch, evenly spaced, and the index of their source."""
        indices = np.unique(self.epochs[0].examples)
        places = np.linspace(0, len(indices) - 1, min(number, len(indices))).round().astype(int)
        return [
            (self._examples[index], int(self._columns.sources[index])) for index in indices[places].tolist()
        ]

    @property
    def num_items(self) -> int:
        """Number of examples of the first epoch, counted per mode."""
        return len(self.epochs[0].examples)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the first epoch, padding and copies of the first block excluded."""
        return int(self._columns.lengths[self.epochs[0].examples].sum())

    @property
    def num_copied_tokens(self) -> int:
        """Number of tokens in copies of the first block in the first epoch."""
        return int(self.epochs[0].lengths.sum()) - self.num_tokens

    @property
    def num_labels(self) -> int:
        """Number of label tokens of the first epoch."""
        return int(self._columns.num_labels[self.epochs[0].examples].sum())

    def max_row_labels(self) -> int:
        """Return the number of label tokens of the row with the most."""
        num_labels = self._columns.num_labels
        return max(int(e.rows.count_tokens(num_labels[e.examples]).max(initial=0)) for e in self.epochs)

    def count_by_source(self, num_sources: int) -> list[tuple[int, int]]:
        """Return the number of examples (per mode) and of tokens of each source in the first epoch."""
        epoch = self.epochs[0]
        sources = self._columns.sources[epoch.examples]
        num_items = np.bincount(sources, minlength=num_sources)
        lengths = self._columns.lengths[epoch.examples]
        num_tokens = np.bincount(sources, weights=lengths, minlength=num_sources)
        return [(int(items), int(tokens)) for items, tokens in zip(num_items, num_tokens, strict=True)]

    def sum_by_batch(self, block: NDArray[Any], full: NDArray[Any]) -> NDArray[Any]:
        """Return the sum over each batch of a figure that all examples have, in training order.

        `block` and `full` hold the figure of each example of the data in block mode and in full mode.
        """
        sums = []
        for epoch in self.epochs:
            figures = np.where(epoch.is_block, block[epoch.examples], full[epoch.examples])
            # the sum over each row; `reduceat` cannot sum over the empty rows that complete a batch
            ends = np.concatenate([[0], np.cumsum(figures[epoch.rows.items])])
            sums.append(np.diff(ends[epoch.rows.starts]))
        return np.concatenate(sums).reshape(-1, self._batch_rows).sum(axis=1)

    def list_batch_tokens(self) -> list[int]:
        """Return the number of tokens of each batch in training order, without padding and copies."""
        batch_tokens: list[int] = self.sum_by_batch(self._columns.lengths, self._columns.lengths).tolist()
        return batch_tokens
