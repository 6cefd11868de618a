"""Training objectives: cross entropy of the labels, and distillation from a teacher.

Tensor suffixes: N positions with a label, T those of them that the teacher teaches, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from blockft.data.encoder import IGNORE_INDEX
from blockft.training.loss_groups import MODES

EVAL_LOSS_PREFIX = "eval_loss_"
"""Prefix of the names of evaluation losses; the mode follows, then the source if it is the loss of one."""


def select_eval_losses(logs: Mapping[str, float]) -> dict[str, float]:
    """Return the evaluation losses by mode among logged values, without those of single sources."""
    names = {f"{EVAL_LOSS_PREFIX}{mode}": mode for mode in MODES}
    return {names[name]: loss for name, loss in logs.items() if name in names}


Record = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with the loss of each position (N,), without its gradient, and the labels (N,)."""


def label_loss(
    outputs: Any,
    shift_labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    record: Record | None = None,
) -> torch.Tensor:
    """Return a micro-batch's share of the mean cross entropy over the label tokens of the global batch.

    `outputs.logits` is (1, N, V), computed only at positions whose next token is a label; `shift_labels` is
    (1, N), and -100 where N is padded. `num_items_in_batch` counts the labels of the global batch. A row
    without labels gives 0 with a gradient of 0.
    """
    labels_N = shift_labels.flatten()
    # cross entropy in its two steps, so that the losses of positions cost no second (N, V) tensor
    log_probs_NV = outputs.logits.float().flatten(0, 1).log_softmax(-1)
    nll_loss = partial(F.nll_loss, target=labels_N, ignore_index=IGNORE_INDEX)
    if record:
        record(nll_loss(log_probs_NV.detach(), reduction="none"), labels_N)
    return _normalize_loss(nll_loss(log_probs_NV, reduction="sum"), num_items_in_batch)


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
    outputs: Any,
    targets: DistillationTargets,
    num_items_in_batch: torch.Tensor | int | None,
    record: Record | None = None,
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
    losses_N = losses_N.index_copy(0, taught, losses_T)
    if record:
        record(losses_N.detach(), labels_N)
    return _normalize_loss(losses_N.sum(), num_items_in_batch)


def _normalize_loss(losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Return a micro-batch's share of the mean over the global batch, given its sum of losses."""
    num_labels = torch.as_tensor(num_items_in_batch, device=losses.device)
    return losses / num_labels.clamp(min=1)
