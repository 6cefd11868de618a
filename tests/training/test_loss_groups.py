"""The losses by mode and source are the means over their labels, for any packing and number of ranks."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from blockft.data.encoder import IGNORE_INDEX
from blockft.data.prepared import ExampleColumns
from blockft.training.loss_groups import LossGroups, find_groups
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import label_loss
from blockft.training.row_dataset import RowDataset
from tests.tiny import build_model
from tests.training.test_objectives import make_examples

CPU = torch.device("cpu")
NUM_SOURCES = 3


def build_rows(row_len: int) -> RowDataset:
    """Return rows of examples of two of three sources in both modes."""
    examples = make_examples(12)
    columns = ExampleColumns.of_examples(examples)
    columns.sources[:] = np.arange(12) % 2 * 2
    return RowDataset(
        examples,
        columns,
        np.arange(12),
        ["block", "full"],
        row_len=row_len,
        batch_rows=1,
        epochs=1,
        seed=0,
        pad_id=0,
    )


def sum_losses(rows: RowDataset, groups: LossGroups, indices: range) -> torch.Tensor:
    """Add the losses of some rows to their groups and return their sum."""
    model, total = build_model("llama"), torch.zeros(())
    for index in indices:
        row = rows[index]
        outputs = model(**build_model_inputs(row, model.config))
        labels = row["shift_labels"][None]
        total += label_loss(
            outputs,
            labels,
            1,
            lambda losses, labels, row=row: groups.add(row["label_groups"], losses, labels),
        ).detach()
    return total


def count_labels(rows: RowDataset) -> dict[str, int]:
    """Return the number of labels by mode and by source, from the examples of the rows."""
    (epoch,) = rows.epochs
    numbers = rows._columns.num_labels[epoch.examples]
    sources = rows._columns.sources[epoch.examples]
    counts = {"block": numbers[epoch.is_block].sum(), "full": numbers[~epoch.is_block].sum()}
    counts |= {f"source_{i}": numbers[sources == i].sum() for i in range(NUM_SOURCES)}
    return {f"loss_{name}": int(count) for name, count in counts.items()}


def test_the_means_do_not_depend_on_packing_and_add_up_to_the_loss() -> None:
    means = {}
    for row_len in (32, 64, 300):
        rows, groups = build_rows(row_len), LossGroups(NUM_SOURCES, CPU)
        total = sum_losses(rows, groups, range(len(rows)))
        means[row_len] = groups.take()
        assert list(means[row_len]) == ["loss_block", "loss_full", "loss_source_0", "loss_source_2"]
        counts = count_labels(rows)
        for names in (["loss_block", "loss_full"], ["loss_source_0", "loss_source_2"]):
            assert_close(
                sum(counts[name] * means[row_len][name] for name in names), float(total), rtol=1e-5, atol=0
            )
    for row_len in (64, 300):
        assert_close(means[row_len], means[32], rtol=1e-5, atol=0)
    assert groups.take() == {}, "the sums start again"


def test_the_group_of_each_label_is_the_mode_and_the_source_of_its_example() -> None:
    rows = build_rows(64)
    (epoch,) = rows.epochs
    for index in range(len(rows)):
        row = rows[index]
        groups_of_labels = row["label_groups"][row["shift_labels"] != IGNORE_INDEX].tolist()
        expected = [
            [2 * int(rows._columns.sources[epoch.examples[i]]) + (not epoch.is_block[i])]
            * int(rows._columns.num_labels[epoch.examples[i]])
            for i in epoch.rows[index]
        ]
        assert groups_of_labels == list(itertools.chain(*expected))
    assert find_groups(np.array([0, 0, 2]), np.array([True, False, False])).tolist() == [0, 1, 5]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_sums_that_are_restored_continue_exactly_on_the_same_number_of_ranks(num_ranks: int) -> None:
    rows = build_rows(32)
    half = len(rows) // 2
    groups = LossGroups(NUM_SOURCES, CPU)
    sum_losses(rows, groups, range(half))
    gathered = groups.gather()
    assert len(gathered) == 1
    resumed = [LossGroups(NUM_SOURCES, CPU) for _ in range(num_ranks)]
    for rank, continued in enumerate(resumed):
        continued.restore(gathered, rank, num_ranks)
    for continued in (groups, resumed[0]):
        sum_losses(rows, continued, range(half, len(rows)))
    assert resumed[0].take() == groups.take()
    assert all(other.take() == {} for other in resumed[1:])
