"""The rows of a run are those of a plain loop over the examples, in the same order."""

import random

import numpy as np
import pytest
import torch

from blockft.data.collate import collate_row
from blockft.data.prepared import ExampleColumns
from blockft.training.plan import hold_out_examples
from tests.data.test_packing import pack_plainly
from tests.training.test_objectives import build_rows, make_examples


@pytest.mark.parametrize("batch_rows", [1, 4, 7])
def test_every_epoch_holds_every_example_once_per_mode_in_full_batches(batch_rows: int) -> None:
    examples = make_examples(12)
    rows = build_rows(examples, row_len=64, batch_rows=batch_rows, epochs=3, seed=1)
    expected = {(i, False) for i in range(12)} | {
        (i, True) for i in range(12) if examples[i].has_local_blocks
    }
    for epoch in rows.epochs:
        assert len(epoch.rows) % batch_rows == 0
        assert sorted(item for row in epoch.rows for item in row) == list(range(rows.num_items))
        found = list(zip(epoch.examples.tolist(), epoch.is_block.tolist(), strict=True))
        assert set(found) == expected and len(found) == len(expected)
    assert rows.epochs[0].rows.items.tolist() != rows.epochs[1].rows.items.tolist()
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("sees_first", [False, True])
@pytest.mark.parametrize("modes", [["block", "full"], ["full", "block"], ["block"], ["full"]])
def test_the_rows_are_those_of_a_plain_loop(modes: list[str], sees_first: bool) -> None:
    examples = make_examples(40)
    row_len = 96 if sees_first else 64
    rows = build_rows(
        examples, modes, row_len=row_len, batch_rows=4, epochs=3, seed=5, local_sees_first=sees_first
    )
    items = [
        (example, mode) for example in examples for mode in (modes if example.has_local_blocks else ["full"])
    ]
    groups = [int(mode == "full") for _, mode in items]  # of the only source
    lengths = [
        example.layout_in_mode(mode, local_sees_first=sees_first).num_row_tokens for example, mode in items
    ]
    expected = []
    for epoch in range(3):
        packed = pack_plainly(lengths, row_len, 5, epoch)
        packed += [[] for _ in range(-len(packed) % 4)]
        expected += [
            collate_row(
                [items[i] for i in row],
                row_len,
                0,
                groups=[groups[i] for i in row],
                local_sees_first=sees_first,
            )
            for row in packed
        ]
    assert len(rows) == len(expected)
    for i, tensors in enumerate(expected):
        row = rows[i]
        assert row.keys() == tensors.keys() and all(torch.equal(row[name], tensors[name]) for name in row)
    num_tokens = sum(len(example) for example, _ in items)
    assert rows.num_tokens == num_tokens and rows.num_items == len(items)
    assert rows.num_copied_tokens == sum(lengths) - num_tokens
    assert bool(rows.num_copied_tokens) == (sees_first and "block" in modes)
    real = [int(((row["example_ids"] >= 0) & ~row["is_copy"]).sum()) for row in expected]
    assert rows.list_batch_tokens() == [sum(real[i : i + 4]) for i in range(0, len(real), 4)]
    assert rows.count_by_source(1) == [(len(items), num_tokens)]
    assert rows.num_labels == sum(example.num_labels for example, _ in items)


@pytest.mark.parametrize("num_held_out", [0, 1, 7])
def test_held_out_examples_split_into_blocks_and_are_those_of_a_plain_loop(num_held_out: int) -> None:
    examples = make_examples(40)
    training, held_out = hold_out_examples(ExampleColumns.of_examples(examples), num_held_out, seed=3)
    candidates = [i for i, example in enumerate(examples) if example.has_local_blocks]
    assert held_out.tolist() == sorted(random.Random("3:held out").sample(candidates, num_held_out))
    assert np.array_equal(np.sort([*training, *held_out]), np.arange(40))
    assert training.tolist() == sorted(training)
