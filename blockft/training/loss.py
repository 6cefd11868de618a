"""Objectives."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

EVAL_LOSS = "eval_loss_"
"""How the names of evaluation losses begin; the view follows."""


def label_loss(
    outputs: Any, shift_labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """A micro-batch's part of the mean cross entropy over the label tokens of the global batch (law 8).

    `outputs.logits` is (1, N, vocabulary), only where a label follows; `shift_labels` is (1, N), -100 where
    none does. A row without labels gives 0 with a gradient of 0.
    """
    losses = F.cross_entropy(
        outputs.logits.float().flatten(0, 1), shift_labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return _part(losses, num_items_in_batch)


@dataclass(frozen=True)
class Distillation:
    """Who teaches, and how much its word weighs against the labels: above 0 and up to 1.

    A teacher is a frozen model, which teaches every view; None is the model in training itself, whose full
    view teaches its block view.
    """

    teacher: PreTrainedModel | None
    weight: float


@dataclass(frozen=True)
class Targets:
    """What a row is to learn if it has a teacher.

    shift_labels    (1, N)              -100 where no label follows
    is_taught       (1, N)              whether the teacher has a say in that label
    teacher_logits  (1, N, vocabulary)
    weight                              of the teacher, where it has
    """

    shift_labels: torch.Tensor
    is_taught: torch.Tensor
    teacher_logits: torch.Tensor
    weight: float


def distill_loss(
    outputs: Any, targets: Targets, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """`label_loss`, but where a teacher has a say: there it is the weighted mean of the cross entropy and of
    KL(teacher || student) (Hinton, Vinyals, Dean 2015, at temperature 1).

    Vocabularies of different sizes, as models of one family pad them, are compared over what both have.
    """
    losses = F.cross_entropy(
        outputs.logits.float().flatten(0, 1),
        targets.shift_labels.flatten(),
        ignore_index=-100,
        reduction="none",
    )
    size = min(outputs.logits.shape[-1], targets.teacher_logits.shape[-1])
    student, teacher = (
        logits[..., :size].float().flatten(0, 1).log_softmax(-1)
        for logits in (outputs.logits, targets.teacher_logits)
    )
    divergences = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    is_taught = (targets.is_taught & (targets.shift_labels != -100)).flatten()
    losses = torch.where(is_taught, losses.lerp(divergences, targets.weight), losses)
    return _part(losses.sum(), num_items_in_batch)


def _part(losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Of the mean over the global batch, what a micro-batch's sum of losses is."""
    num_labels = torch.as_tensor(num_items_in_batch, device=losses.device)
    return losses / num_labels.clamp(min=1)
