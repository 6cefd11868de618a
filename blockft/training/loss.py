"""Objectives."""

from typing import Any

import torch

EVAL_LOSS = "eval_loss_"
"""How the names of evaluation losses begin; the view follows."""


def label_loss(
    outputs: Any, shift_labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """A micro-batch's part of the mean cross entropy over the label tokens of the global batch (law 8).

    `outputs.logits` is (1, N, vocabulary), only where a label follows; `shift_labels` is (1, N), -100 where
    none does. A row without labels gives 0 with a gradient of 0.
    """
    losses = torch.nn.functional.cross_entropy(
        outputs.logits.float().flatten(0, 1), shift_labels.flatten(), ignore_index=-100, reduction="sum"
    )
    num_labels = torch.as_tensor(num_items_in_batch, device=losses.device)
    return losses / num_labels.clamp(min=1)
