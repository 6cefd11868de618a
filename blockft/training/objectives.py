"""Training objectives: cross entropy of the labels, and distillation from a teacher.

Tensor suffixes: N positions with a label, T those of them that the teacher teaches, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from blockft.data.encoder import IGNORE_INDEX

EVAL_LOSS_PREFIX = "eval_loss_"
"""Prefix of the names of evaluation losses; the mode follows."""


def label_loss(
    outputs: Any, shift_labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Return a micro-batch's share of the mean cross entropy over the label tokens of the global batch.

    `outputs.logits` is (1, N, V), computed only at positions whose next token is a label; `shift_labels` is
    (1, N), and -100 where N is padded. `num_items_in_batch` counts the labels of the global batch. A row
    without labels gives 0 with a gradient of 0.
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
    """The teacher of a run and the weight of its loss against that of the labels, above 0 and at most 1.

    A teacher is a frozen model, which teaches both modes. If it is None, the model in training teaches
    itself: its full mode teaches its block mode.
    """

    teacher: PreTrainedModel | None
    weight: float


@dataclass(frozen=True)
class DistillationTargets:
    """The targets of a row.

    shift_labels    (1, N)     the labels, -100 where N is padded
    is_taught       (1, N)     whether the teacher teaches the label
    teacher_logits  (1, N, V)
    weight                     of the teacher's loss where it teaches
    """

    shift_labels: torch.Tensor
    is_taught: torch.Tensor
    teacher_logits: torch.Tensor
    weight: float


def distill_loss(
    outputs: Any, targets: DistillationTargets, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Return `label_loss` with the teacher's loss added where the teacher teaches.

    There the loss is the weighted mean of the cross entropy and of KL(teacher || student) at temperature 1
    (Hinton, Vinyals, Dean 2015). Models of one family may pad their vocabulary to different sizes; ids that
    only one of the two has are ignored, because no text contains them.
    """
    labels_N = targets.shift_labels.flatten()
    student_NV = outputs.logits.float().flatten(0, 1).log_softmax(-1)
    losses_N = F.nll_loss(student_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="none")
    # the (T, V) tensors are the largest of a step: only taught positions, and no product of two is stored
    taught = (targets.is_taught.flatten() & (labels_N != IGNORE_INDEX)).nonzero().flatten()
    size = min(student_NV.shape[-1], targets.teacher_logits.shape[-1])
    teacher_TV = targets.teacher_logits.flatten(0, 1)[taught, :size].float().log_softmax(-1)
    negative_entropy_T = torch.linalg.vecdot(teacher_TV.exp(), teacher_TV)
    divergences_T = negative_entropy_T - torch.linalg.vecdot(teacher_TV.exp(), student_NV[taught, :size])
    losses_T = losses_N[taught].lerp(divergences_T, targets.weight)
    return _normalize_loss(losses_N.index_copy(0, taught, losses_T).sum(), num_items_in_batch)


def _normalize_loss(losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Return a micro-batch's share of the mean over the global batch, given its sum of losses."""
    num_labels = torch.as_tensor(num_items_in_batch, device=losses.device)
    return losses / num_labels.clamp(min=1)
