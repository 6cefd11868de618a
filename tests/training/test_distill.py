"""The distillation loss: its value, which labels it covers, and that it does not depend on packing."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from blockft.data.encoder import IGNORE_INDEX
from blockft.model.masked_forward import masked_logits
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import DistillationTargets, distill_loss, label_loss
from tests.tiny import build_model
from tests.training.test_objectives import build_rows, make_examples

LABELS = torch.tensor([[5, 6, 7, IGNORE_INDEX]])
IS_TAUGHT = torch.tensor([[True, True, False, True]])


def random_logits(seed: int, vocab_size: int = 11) -> torch.Tensor:
    return torch.randn(1, 4, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def loss_of(student: torch.Tensor, teacher: torch.Tensor, weight: float) -> torch.Tensor:
    return distill_loss(
        SimpleNamespace(logits=student), DistillationTargets(LABELS, IS_TAUGHT, teacher, weight), 3
    )


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_taught_label_costs_the_divergence_from_the_teacher(weight: float) -> None:
    student, teacher = random_logits(0), random_logits(1)
    p, q = teacher[0].double().softmax(-1), student[0].double().softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    cross_entropy = -q[range(3), LABELS[0, :3]].log()
    expected = (weight * divergence[:2].sum() + (1 - weight) * cross_entropy[:2].sum() + cross_entropy[2]) / 3
    assert_close(loss_of(student, teacher, weight).double(), expected, rtol=1e-5, atol=0)


def test_a_student_equal_to_its_teacher_pays_for_untaught_labels_only() -> None:
    logits = random_logits(0).requires_grad_()
    loss = loss_of(logits, logits.detach(), weight=1.0)
    others = torch.where(IS_TAUGHT, IGNORE_INDEX, LABELS)
    assert_close(loss, label_loss(SimpleNamespace(logits=logits), others, 3), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert_close(logits.grad[0, :2], torch.zeros(2, 11), rtol=0, atol=1e-6)
    assert logits.grad[0, 2].abs().max() > 0.01
    assert torch.equal(logits.grad[0, 3], torch.zeros(11))


def test_student_and_teacher_may_pad_their_vocabularies_differently() -> None:
    student, teacher = random_logits(0), random_logits(1, vocab_size=13)
    assert_close(loss_of(student, teacher, 1.0), loss_of(student, teacher[..., :11], 1.0))
    wide, narrow = random_logits(2, vocab_size=13), random_logits(3)
    impossible = torch.full((1, 4, 2), -1e9)
    assert_close(loss_of(wide, narrow, 1.0), loss_of(wide, torch.cat([narrow, impossible], dim=-1), 1.0))


def test_a_row_without_labels_adds_nothing_to_the_loss() -> None:
    logits = random_logits(0).requires_grad_()
    no_labels = DistillationTargets(torch.full((1, 4), IGNORE_INDEX), IS_TAUGHT, random_logits(1), 1.0)
    loss = distill_loss(SimpleNamespace(logits=logits), no_labels, 0)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def logits_of(model: PreTrainedModel, row: Mapping[str, torch.Tensor], *, full: bool) -> torch.Tensor:
    logits: torch.Tensor = model(**build_model_inputs(row, model.config, full=full)).logits
    return logits


@pytest.mark.parametrize("local_sees_first", [False, True])
def test_the_loss_does_not_depend_on_packing(local_sees_first: bool) -> None:
    """The model in full mode teaches itself in block mode; all examples in both modes are one batch."""
    model, examples, losses = build_model("llama"), make_examples(12), []
    for row_len in (96, 150, 600) if local_sees_first else (32, 64, 300):
        rows = build_rows(examples, row_len=row_len, with_full=True, local_sees_first=local_sees_first)
        num_labels = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
        total = torch.zeros(())
        for row in rows:
            teacher = logits_of(model, row, full=True).detach()
            targets = DistillationTargets(row["shift_labels"][None], row["is_block_mode"][None], teacher, 1.0)
            student = SimpleNamespace(logits=logits_of(model, row, full=False))
            total = total + distill_loss(student, targets, num_labels)
        model.zero_grad()
        total.backward()
        losses.append((total.detach(), model.base_model.embed_tokens.weight.grad.clone()))
    for loss, gradient in losses[1:]:
        assert_close(loss, losses[0][0], rtol=1e-5, atol=0)
        assert_close(gradient, losses[0][1], rtol=1e-5, atol=1e-5)


def test_the_teacher_in_full_mode_sees_no_copies() -> None:
    """Its logits at each label are those of the example alone in full mode."""
    model, examples = build_model("llama"), [e for e in make_examples(12) if e.has_local_blocks]
    rows = [*build_rows(examples, row_len=150, with_full=True, local_sees_first=True)]
    assert any(row["is_copy"].any() for row in rows)
    for row in rows:
        assert not row["full_is_copy"].any()
        labels = row["shift_labels"]
        teacher = logits_of(model, row, full=True)[0, labels != IGNORE_INDEX]
        example_ids = row["example_ids"][0, row["logits_to_keep"][labels != IGNORE_INDEX]]
        for number in example_ids.unique().tolist():
            in_row = row["full_input_ids"][0, row["full_example_ids"][0] == number].numpy()
            (example,) = [e for e in examples if np.array_equal(e.input_ids, in_row)]
            alone = masked_logits(model, example.input_ids, [example.layout.full()])
            places = np.flatnonzero(example.labels != IGNORE_INDEX) - 1
            assert_close(teacher[example_ids == number], alone[places], rtol=1e-5, atol=1e-5)
