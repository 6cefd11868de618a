"""Objectives."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from blockft.data.encoder import IGNORE_INDEX

EVAL_LOSS_PREFIX = "eval_loss_"
"""How the names of evaluation losses begin; the view follows."""


def label_loss(
    outputs: Any, shift_labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """A micro-batch's part of the mean cross entropy over the label tokens of the global batch (law 8).

    `outputs.logits` is (1, N, vocabulary), only where a label follows; `shift_labels` is (1, N), -100 where
    none does. A row without labels gives 0 with a gradient of 0.
    """
    losses = F.cross_entropy(
        outputs.logits.float().flatten(0, 1),
        shift_labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return _normalize_loss(losses, num_items_in_batch)


@dataclass(frozen=True)
class Distillation:
    """Who teaches, and how much its word weighs against the labels: above 0 and up to 1.

    A teacher is a frozen model, which teaches every view; None is the model in training itself, whose full
    view teaches its block view.
    """

    teacher: PreTrainedModel | None
    weight: float


@dataclass(frozen=True)
class DistillationTargets:
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
    outputs: Any, targets: DistillationTargets, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """`label_loss`, but where a teacher has a say: there it is the weighted mean of the cross entropy and of
    KL(teacher || student) (Hinton, Vinyals, Dean 2015, at temperature 1).

    Models of one family may pad their vocabulary to different sizes: what only one has, the other never says.
    """
    labels_N = targets.shift_labels.flatten()
    student_NV = outputs.logits.float().flatten(0, 1).log_softmax(-1)
    losses_N = F.nll_loss(student_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="none")
    # these are the largest tensors of the step: only the taught rows, and no product of two of them is kept
    taught = (targets.is_taught.flatten() & (labels_N != IGNORE_INDEX)).nonzero().flatten()
    size = min(student_NV.shape[-1], targets.teacher_logits.shape[-1])
    teacher_TV = targets.teacher_logits.flatten(0, 1)[taught, :size].float().log_softmax(-1)
    teacher_says = torch.linalg.vecdot(teacher_TV.exp(), teacher_TV)
    divergences_T = teacher_says - torch.linalg.vecdot(teacher_TV.exp(), student_NV[taught, :size])
    losses_T = losses_N[taught].lerp(divergences_T, targets.weight)
    return _normalize_loss(losses_N.index_copy(0, taught, losses_T).sum(), num_items_in_batch)


def _normalize_loss(losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Of the mean over the global batch, what a micro-batch's sum of losses is."""
    num_labels = torch.as_tensor(num_items_in_batch, device=losses.device)
    return losses / num_labels.clamp(min=1)
