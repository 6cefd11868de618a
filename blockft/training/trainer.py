"""The Trainer of transformers, taught to read rows."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import SequentialSampler, Subset
from transformers import PreTrainedModel, Trainer

from blockft.data.encoder import IGNORE_INDEX
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import (
    EVAL_LOSS_PREFIX,
    Distillation,
    DistillationTargets,
    distill_loss,
    label_loss,
)
from blockft.training.row_dataset import RowDataset


class BlockTrainer(Trainer):
    """Trains on rows in the order in which they stand, each under its own mask, by `label_loss`.

    `eval_rows` gives held-out rows by view, as many for every process. With a `distillation` the loss is
    `distill_loss`, and rows are collated `with_full`.
    """

    model: PreTrainedModel | PeftModel
    train_dataset: Subset[dict[str, torch.Tensor]]

    def __init__(
        self,
        *,
        eval_rows: Mapping[str, RowDataset],
        distillation: Distillation | None = None,
        **settings: Any,
    ) -> None:
        objective = distill_loss if distillation else label_loss
        super().__init__(data_collator=_only_row, compute_loss_func=objective, **settings)
        self._eval_rows, self._distillation = eval_rows, distillation
        if distillation and distillation.teacher:
            # the method of PreTrainedModel hides the types of this one
            torch.nn.Module.to(distillation.teacher, self.args.device)

    def unlogged(self) -> dict[str, Any]:
        """How many `steps` were not logged yet, and the sum of their losses by rank. All ranks call it."""
        sums = torch.zeros(self.args.world_size, device=self.args.device)
        sums[self.args.process_index] = self._tr_loss
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        return {"losses": sums.tolist(), "steps": self.state.global_step - self._globalstep_last_logged}

    def restore_unlogged(self, unlogged: Mapping[str, Any]) -> None:
        """Log with the steps to come those that were not logged before; call it when training begins.

        As many ranks go on with their own sums, to the last bit; another number with the mean.
        """
        sums: list[float] = unlogged["losses"]
        mean = sum(sums) / len(sums)
        self._tr_loss += sums[self.args.process_index] if len(sums) == self.args.world_size else mean
        self._total_loss_scalar -= mean  # or the steps of before would count as this process's
        self._globalstep_last_logged -= unlogged["steps"]

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kw: Any
    ) -> Any:
        """Rows carry per-token ids: masks are built from them here, on the device."""
        # what the Trainer hands to the loss as it is
        labels: torch.Tensor | DistillationTargets = inputs["shift_labels"][None]
        if self._distillation:
            labels = self._targets(model, inputs, self._distillation)
        return super().compute_loss(
            model, {**build_model_inputs(inputs, self.model.config), "labels": labels}, *args, **kw
        )

    @torch.no_grad()
    def _targets(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], distillation: Distillation
    ) -> DistillationTargets:
        """What the teacher says to a row in its full view."""
        labels, teacher = inputs["shift_labels"][None], distillation.teacher
        config = (teacher or self.model).config
        # or dropout would have a say in what a model teaches itself
        model.eval()
        logits = (teacher or model)(**build_model_inputs(inputs, config, full=True)).logits
        model.train()
        # in the full view a model has nothing to learn from itself
        is_taught = torch.ones_like(labels, dtype=torch.bool) if teacher else inputs["is_block_mode"][None]
        return DistillationTargets(labels, is_taught, logits, distillation.weight)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss by view over the held-out rows: the mean over all their label tokens (law 8)."""
        training = self.model.training
        self.model.eval()
        losses = {}
        for mode, rows in self._eval_rows.items():
            sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for index in range(self.args.process_index, len(rows), self.args.world_size):
                inputs = self._prepare_inputs(rows[index])
                labels = inputs["shift_labels"]
                sums[0] += label_loss(
                    self.model(**build_model_inputs(inputs, self.model.config)), labels[None], 1
                )
                sums[1] += (labels != IGNORE_INDEX).sum()
            if self.args.world_size > 1:
                torch.distributed.all_reduce(sums)
            losses[f"{EVAL_LOSS_PREFIX}{mode}"] = float(sums[0] / sums[1])
        self.model.train(training)
        self.log(losses)
        # or the Trainer would evaluate again at the end of the epoch
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, losses)
        return losses


def _only_row(micro_batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A micro-batch is one row, which comes collated."""
    (row,) = micro_batch
    return row
