"""The loss is the mean over the label tokens, however they are packed into rows and batches."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.testing import assert_close

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import AttentionMetadata
from blockft.data.encoder import IGNORE_INDEX, Example
from blockft.data.prepared import ExampleColumns
from blockft.training.objectives import label_loss
from blockft.training.row_dataset import RowDataset
from tests.tiny import build_model, random_ids, random_layout


def make_examples(num_examples: int) -> list[Example]:
    rng = random.Random(0)
    examples = []
    for _ in range(num_examples):
        layout = random_layout(rng, rng.randint(12, 30), rng.randint(1, 4))
        ids = random_ids(rng, layout.num_tokens).numpy().astype(np.int32)
        num_labels = rng.randint(1, layout.block_lengths[-1]) - 1
        spans = ((len(ids) - num_labels, len(ids)),)
        examples.append(Example(input_ids=ids, label_spans=spans, block_lengths=layout.block_lengths))
    return examples


METADATA = ("position_ids", "example_ids", "block_ids", "is_final", "is_copy")


def build_rows(
    examples: list[Example], modes: Sequence[str] = ("block", "full"), **options: Any
) -> RowDataset:
    """Return the rows of all examples: one epoch in batches of one row, unless the options say otherwise."""
    columns = ExampleColumns.of_examples(examples)
    options = {"batch_rows": 1, "epochs": 1, "seed": 0, "pad_id": 0, **options}
    return RowDataset(examples, columns, np.arange(len(examples)), modes, **options)


def loss_and_gradient(row_len: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and gradient of all examples in both modes: one batch, summed over its rows."""
    model, examples = build_model("llama"), make_examples(12)
    rows = build_rows(examples, row_len=row_len, **options)
    num_labels = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
    total = torch.zeros(())
    for row in rows:
        metadata = AttentionMetadata(*(row[n] for n in METADATA))
        outputs = model(
            input_ids=row["input_ids"],
            position_ids=metadata.position_ids,
            block_masks=AttentionMasks(metadata),
            logits_to_keep=row["logits_to_keep"],
            use_cache=False,
        )
        total = total + label_loss(outputs, row["shift_labels"][None], num_labels)
    total.backward()
    return total.detach(), model.base_model.embed_tokens.weight.grad


def test_the_loss_does_not_depend_on_packing() -> None:
    loss, gradient = loss_and_gradient(row_len=32)
    for row_len in (64, 300):
        other_loss, other_gradient = loss_and_gradient(row_len)
        assert_close(other_loss, loss, rtol=1e-5, atol=0)
        assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-5)


def plain_row(example: Example) -> tuple[list[int], list[int], list[list[bool]]]:
    """Return ids, positions and mask of an example whose local blocks see a copy of the first, in lists."""
    ids, positions, blocks, copies = [], [], [], []
    first, position = example.blocks[0].tolist(), 0
    for number, block in enumerate(example.blocks):
        is_final = number == len(example.blocks) - 1
        copy = first if number and not is_final else []
        ids += copy + block.tolist()
        positions += range(position - len(copy), position + len(block))
        blocks += [(number, is_final)] * (len(copy) + len(block))
        copies += [True] * len(copy) + [False] * len(block)
        position += len(block)
    mask = [
        [k <= q and (blocks[q] == blocks[k] or blocks[q][1] and not copies[k]) for k in range(len(ids))]
        for q in range(len(ids))
    ]
    return ids, positions, mask


def test_blocks_that_see_the_first_have_the_loss_of_a_plain_dense_mask() -> None:
    """The expected loss is that of an unmodified model, whose mask and copies the test writes out."""
    examples = make_examples(12)
    plain, gradients, losses = build_model("llama", attention="eager"), [], []
    for example in examples:
        ids, positions, mask = plain_row(example)
        forbidden = ~torch.tensor(mask)[None, None]
        logits = plain(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            attention_mask=torch.zeros(forbidden.shape).masked_fill(forbidden, float("-inf")),
        ).logits[0]
        labels = torch.from_numpy(example.labels[-example.num_labels or len(ids) :].astype(np.int64))
        start = len(ids) - len(labels) - 1
        losses.append(torch.nn.functional.cross_entropy(logits[start:-1], labels, reduction="none"))
    expected = torch.cat(losses).mean()
    expected.backward()
    gradients = plain.base_model.embed_tokens.weight.grad
    for row_len in (96, 150, 600):
        loss, gradient = loss_and_gradient(row_len, modes=["block"], local_sees_first=True)
        assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        assert_close(gradient, gradients, rtol=1e-5, atol=1e-5)
    assert abs(loss_and_gradient(600, modes=["block"])[0] - expected) > 1e-3


def test_the_loss_with_copies_does_not_depend_on_packing() -> None:
    loss, gradient = loss_and_gradient(96, local_sees_first=True)
    for row_len in (150, 600):
        other_loss, other_gradient = loss_and_gradient(row_len, local_sees_first=True)
        assert_close(other_loss, loss, rtol=1e-5, atol=0)
        assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-5)


def test_logits_of_label_tokens_alone_give_the_usual_loss() -> None:
    """The expected loss is cross entropy over the whole sequence of each example alone."""
    model, examples = build_model("llama"), make_examples(12)
    losses = []
    for example in examples:
        ids, labels = (torch.from_numpy(x.astype(np.int64)) for x in (example.input_ids, example.labels))
        for mode in ("block", "full") if example.has_local_blocks else ("full",):
            rows = build_rows([example], [mode], row_len=len(ids))
            metadata = AttentionMetadata(*(rows[0][n] for n in METADATA))
            logits = model(
                input_ids=ids[None], position_ids=metadata.position_ids, block_masks=AttentionMasks(metadata)
            ).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none"))
            losses[-1] = losses[-1][labels[1:] != IGNORE_INDEX]
    expected = torch.cat(losses).mean()
    assert_close(loss_and_gradient(row_len=64)[0], expected.detach(), rtol=1e-5, atol=0)


def test_a_row_without_labels_adds_nothing_to_the_loss() -> None:
    logits = torch.randn(1, 256, 97, requires_grad=True)
    loss = label_loss(type("Outputs", (), {"logits": logits}), torch.full((1, 256), IGNORE_INDEX), 0)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
