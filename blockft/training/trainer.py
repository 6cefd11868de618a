"""The Trainer of transformers for packed rows: masks, objectives, evaluation loss and logged speed."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, Trainer

from blockft.data.encoder import IGNORE_INDEX
from blockft.training.library_internals import show_optimizer_defaults
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import (
    EVAL_LOSS_PREFIX,
    Distillation,
    DistillationTargets,
    distill_loss,
    label_loss,
)
from blockft.training.prefetch import PrefetchedRows
from blockft.training.row_dataset import RowDataset
from blockft.training.throughput import Throughput


class BlockTrainer(Trainer):
    """Trains on rows in the order of the dataset, each under its own mask, with `label_loss`.

    `eval_rows` holds the held-out rows by mode, a multiple of the number of processes each. With a
    `distillation` the loss is `distill_loss`, and rows must be collated `with_full`. `throughput` measures
    the speed that is logged as `tokens_per_s`. `args.train_sampling_strategy` must be "sequential".
    """

    model: PreTrainedModel | PeftModel
    train_dataset: PrefetchedRows

    def __init__(
        self,
        *,
        eval_rows: Mapping[str, RowDataset],
        throughput: Throughput,
        distillation: Distillation | None = None,
        **trainer_arguments: Any,
    ) -> None:
        objective = distill_loss if distillation else label_loss
        super().__init__(data_collator=_unwrap_row, compute_loss_func=objective, **trainer_arguments)
        assert self.args.train_sampling_strategy == "sequential"
        self.remove_callback(PrinterCallback)  # it prints raw dicts
        self.throughput = throughput
        self._eval_rows, self._distillation = eval_rows, distillation
        if distillation and distillation.teacher:
            # PreTrainedModel.to hides the type of Module.to
            torch.nn.Module.to(distillation.teacher, self.args.device)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Create the schedule. A polynomial one reads the rate that the optimizer was made with."""
        show_optimizer_defaults(optimizer or self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `tokens_per_s` to the logs of training steps, for all trackers."""
        if "loss" in logs:
            logs["tokens_per_s"] = round(self.throughput.measure(self.state.global_step), 1)
        super().log(logs, start_time)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """Build the masks from the row's per-token ids, on the device, and return the loss."""
        # the Trainer passes "labels" on to the loss function unchanged
        labels: torch.Tensor | DistillationTargets = inputs["shift_labels"][None]
        if self._distillation:
            labels = self._compute_targets(model, inputs, self._distillation)
        model_inputs = {**build_model_inputs(inputs, self.model.config), "labels": labels}
        loss = super().compute_loss(model, model_inputs, *args, **kwargs)
        self.train_dataset.prefetch()  # the device has work now
        return loss

    @torch.no_grad()
    def _compute_targets(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], distillation: Distillation
    ) -> DistillationTargets:
        """Return the targets of a row: its labels, and the logits of the teacher in full mode."""
        labels, teacher = inputs["shift_labels"][None], distillation.teacher
        config = (teacher or self.model).config
        model.eval()  # a model that teaches itself must do so without dropout
        logits = (teacher or model)(**build_model_inputs(inputs, config, full=True)).logits
        model.train()
        # in full mode a model has nothing to learn from itself
        is_taught = torch.ones_like(labels, dtype=torch.bool) if teacher else inputs["is_block_mode"][None]
        return DistillationTargets(labels, is_taught, logits, distillation.weight)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the loss by mode over the held-out rows: the mean over all their label tokens."""
        was_training = self.model.training
        self.model.eval()
        losses = {}
        for mode, rows in self._eval_rows.items():
            sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for index in range(self.args.process_index, len(rows), self.args.world_size):
                inputs = {name: tensor.to(self.args.device) for name, tensor in rows[index].items()}
                labels = inputs["shift_labels"]
                outputs = self.model(**build_model_inputs(inputs, self.model.config))
                sums[0] += label_loss(outputs, labels[None], 1)
                sums[1] += (labels != IGNORE_INDEX).sum()
            if self.args.world_size > 1:
                torch.distributed.all_reduce(sums)
            losses[f"{EVAL_LOSS_PREFIX}{mode}"] = float(sums[0] / sums[1])
        self.model.train(was_training)
        self.log(losses)
        # without it the Trainer would evaluate again at the end of the epoch
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, losses)
        return losses


def _unwrap_row(micro_batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the only row of a micro-batch, which is already collated."""
    (row,) = micro_batch
    return row
