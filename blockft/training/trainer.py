"""The Trainer of transformers, taught to read rows."""

from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer

from blockft.attention.backends import BlockMasks
from blockft.attention.layout import Vectors
from blockft.training.loss import label_loss


class BlockTrainer(Trainer):
    """Trains on rows in the order in which they stand, each under its own mask, by `label_loss`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(data_collator=_only_row, compute_loss_func=label_loss, **settings)

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kw: Any
    ) -> Any:
        """Rows carry per-token ids: masks are built from them here, on the device."""
        vectors = Vectors(
            *(inputs[name] for name in ("position_ids", "example_ids", "block_ids", "is_final"))
        )
        forward = {
            "input_ids": inputs["input_ids"],
            "position_ids": vectors.position_ids,
            "block_masks": BlockMasks(vectors),
            "logits_to_keep": inputs["logits_to_keep"],
            "labels": inputs["shift_labels"][None],
            "use_cache": False,
        }
        return super().compute_loss(model, forward, *args, **kw)


def _only_row(micro_batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A micro-batch is one row, which comes collated."""
    (row,) = micro_batch
    return row
