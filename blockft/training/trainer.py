"""The Trainer of transformers for packed rows: masks, objectives, evaluation loss and what a step logs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from blockft.data.encoder import IGNORE_INDEX
from blockft.training.distributed import errors_on_all_ranks
from blockft.training.library_internals import (
    save_shards,
    show_optimizer_defaults,
    trained_names,
)
from blockft.training.loss_groups import LossGroups
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import (
    EVAL_LOSS_PREFIX,
    Distillation,
    DistillationTargets,
    distill_loss,
    label_loss,
)
from blockft.training.peak_memory import measure_peak_memory
from blockft.training.prefetch import PrefetchedRows
from blockft.training.row_dataset import RowDataset
from blockft.training.throughput import Throughput


class BlockTrainer(Trainer):
    """Trains on rows in the order of the dataset, each under its own mask, with `label_loss`.

    `eval_rows` holds the held-out rows by mode, a multiple of the number of processes each. With a
    `distillation` the loss is `distill_loss`, and rows must be collated `with_full`. `throughput` measures
    the speed that is logged; `peak_memory_gib` is the memory that was logged last. The examples are those of
    `num_sources` sources. `args.train_sampling_strategy` must be "sequential".
    """

    model: PreTrainedModel | PeftModel
    train_dataset: PrefetchedRows

    def __init__(
        self,
        *,
        eval_rows: Mapping[str, RowDataset],
        throughput: Throughput,
        num_sources: int,
        distillation: Distillation | None = None,
        **trainer_arguments: Any,
    ) -> None:
        super().__init__(
            data_collator=_unwrap_row, compute_loss_func=self._compute_objective, **trainer_arguments
        )
        assert self.args.train_sampling_strategy == "sequential"
        self.remove_callback(PrinterCallback)  # it prints raw dicts
        self.throughput = throughput
        self.loss_groups, self._num_sources = LossGroups(num_sources, self.args.device), num_sources
        self.peak_memory_gib = 0.0
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
        """Add losses by mode and source, speed and memory to the logs of training steps, for all trackers.

        All ranks call it. See `run_folder.METRICS` for the names.
        """
        if "loss" in logs:
            step, num_steps = self.state.global_step, self.state.max_steps
            speed = self.throughput.measure(step)
            logs |= self.loss_groups.take()
            logs["tokens_per_s"] = round(speed.tokens_per_s, 1)
            if speed.utilization is not None:
                logs["utilization"] = round(speed.utilization, 4)
            peak = measure_peak_memory(self.args.device)
            self.peak_memory_gib = peak.tensors_gib
            logs["peak_memory_gib"] = round(peak.tensors_gib, 2)
            if peak.reserved_gib is not None:
                logs["peak_reserved_gib"] = round(peak.reserved_gib, 2)
            logs["seconds_left"] = round(self.throughput.seconds_left(step, num_steps), 1)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """Write what a resumed run needs: `RunCallback` adds what an export needs, and the marker.

        The Trainer would also write the weights, which follow from the shards. All ranks call it.

        Raises:
            SharedWriteError: on every rank, if one of them cannot write.
        """
        assert self.args.output_dir and self.lr_scheduler
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.store_flos()
        adapter = _gather_adapter(self.model) if isinstance(self.model, PeftModel) else None
        with errors_on_all_ranks():
            checkpoint.mkdir(parents=True, exist_ok=True)
            self._save_rng_state(str(checkpoint))
            if self.is_world_process_zero():
                self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
                if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
                    torch.save(self.lr_scheduler.state_dict(), checkpoint / SCHEDULER_NAME)
                if adapter is not None:
                    self.model.save_pretrained(
                        str(checkpoint), state_dict=adapter, save_embedding_layers=False
                    )
        with errors_on_all_ranks():
            save_shards(self.model_wrapped, checkpoint, self.state.global_step)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """Build the masks from the row's per-token ids, on the device, and return the loss."""
        targets: torch.Tensor | DistillationTargets = inputs["shift_labels"][None]
        if self._distillation:
            targets = self._compute_targets(model, inputs, self._distillation)
        # the Trainer passes "labels" on to the loss function unchanged
        labels = (targets, inputs["label_groups"])
        model_inputs = {**build_model_inputs(inputs, self.model.config), "labels": labels}
        loss = super().compute_loss(model, model_inputs, *args, **kwargs)
        self.train_dataset.prefetch()  # the device has work now
        return loss

    def _compute_objective(
        self,
        outputs: Any,
        labels: tuple[Any, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the loss of a row and add its losses to their groups."""
        targets, groups_N = labels
        objective: Any = distill_loss if self._distillation else label_loss
        loss: torch.Tensor = objective(
            outputs, targets, num_items_in_batch, partial(self.loss_groups.add, groups_N)
        )
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
        """Return the loss by mode over the held-out rows: the mean over all their label tokens.

        The loss of each source follows, for example `eval_loss_block_source_0`.
        """
        was_training = self.model.training
        self.model.eval()
        losses: dict[str, float] = {}
        losses_of_sources: dict[str, float] = {}
        for mode, rows in self._eval_rows.items():
            groups = LossGroups(self._num_sources, self.args.device)
            sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for index in range(self.args.process_index, len(rows), self.args.world_size):
                inputs = {name: tensor.to(self.args.device) for name, tensor in rows[index].items()}
                labels = inputs["shift_labels"]
                outputs = self.model(**build_model_inputs(inputs, self.model.config))
                record = partial(groups.add, inputs["label_groups"])
                sums[0] += label_loss(outputs, labels[None], 1, record)
                sums[1] += (labels != IGNORE_INDEX).sum()
            if self.args.world_size > 1:
                torch.distributed.all_reduce(sums)
            name = f"{EVAL_LOSS_PREFIX}{mode}"
            losses[name] = float(sums[0] / sums[1])
            by_group = groups.take(f"{name}_")
            losses_of_sources |= {
                key: loss for key, loss in by_group.items() if key.startswith(f"{name}_source_")
            }
        losses |= losses_of_sources
        self.model.train(was_training)
        self.log(losses)
        # without it the Trainer would evaluate again at the end of the epoch
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, losses)
        return losses


def _gather_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the trained weights of a model with an adapter, on the CPU. All ranks call it."""
    trained, adapter = trained_names(model), {}
    for name, weight in model.named_parameters():
        if name in trained:
            # under ZeRO-3 each rank holds a part of the weight
            with deepspeed.zero.GatheredParameters([weight]):
                adapter[name] = weight.detach().cpu().clone()
    return adapter


def _unwrap_row(micro_batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the only row of a micro-batch, which is already collated."""
    (row,) = micro_batch
    return row
