"""What a run leaves in its folder: metrics line by line, whole checkpoints, a clean end on request."""

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from blockft.errors import UserError
from blockft.model.checkpoint import (
    compute_reference_logits,
    mark_complete,
    read_marker,
    remove_old_checkpoints,
    save_reference_logits,
)
from blockft.outputs import METRICS
from blockft.training.objectives import EVAL_LOSS_PREFIX
from blockft.training.trainer import BlockTrainer


class RunCallback(TrainerCallback):
    """Writes `metrics.jsonl`, completes checkpoints, and on SIGINT or SIGTERM saves before the run ends.

    `facts` go into every checkpoint's marker; `probe_ids` (T,) is the text on which exports are compared;
    `unlogged` and `eval_due` are what the checkpoint that the run goes on from says of steps between two
    lines, and of an evaluation that was not made there. The tokenizer is saved as it is: the Trainer, if it
    knew it, would rewrite the model's end token to match.
    """

    trainer: BlockTrainer
    """Whose record this is; set before it trains."""

    def __init__(
        self,
        run: Path,
        *,
        tokenizer: PreTrainedTokenizerBase,
        facts: dict[str, Any],
        probe_ids: torch.Tensor,
        save_total_limit: int,
        keep_best: bool,
        evaluates: bool,
        eval_steps: int | None,
        tokens_per_step: int,
        unlogged: dict[str, Any],
        eval_due: bool,
    ) -> None:
        self._run, self._tokenizer, self._facts, self._probe_ids = run, tokenizer, facts, probe_ids
        self._keep, self._keep_best, self._tokens_per_step = save_total_limit, keep_best, tokens_per_step
        self._evaluates, self._eval_steps = evaluates, eval_steps
        self._eval_losses: dict[str, float] = {}
        self._logged_at, self._logged_step = 0.0, 0
        self._unlogged, self._eval_due = unlogged, eval_due
        self.asked_to_stop = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._logged_at, self._logged_step = time.monotonic(), state.global_step
        if self._unlogged:
            self.trainer.restore_unlogged(self._unlogged)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # asked twice, the process ends at once
        self.asked_to_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """All ranks save and stop at the same step, whichever of them the signal reached.

        What is saved on schedule is logged first, so that no loss goes unchecked into a checkpoint, and
        evaluated. Asked to stop, time is short: what is due there is evaluated when the run goes on.

        Raises:
            UserError: the run was asked to stop, and its loss is not finite.
        """
        self._eval_losses, self._unlogged, self._eval_due = {}, {}, False
        asked = torch.tensor(int(self.asked_to_stop), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(asked)
        eval_step = self._eval_steps is not None and state.global_step % self._eval_steps == 0
        evaluates = self._evaluates and (eval_step or control.should_save)
        control.should_log |= control.should_save or evaluates
        if not asked.item():
            control.should_evaluate = evaluates
            return
        self.asked_to_stop = control.should_save = control.should_training_stop = True
        self._eval_due = evaluates
        if not control.should_log:
            self._unlogged = self.trainer.unlogged()
            _check_finite({"loss": sum(self._unlogged["losses"])}, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        """Raises:
        UserError: loss or gradient are not finite; the last whole checkpoint stays as it is.
        """
        logs: dict[str, float] = passed["logs"]
        if self._evaluates and any(name.startswith(EVAL_LOSS_PREFIX) for name in logs):
            self._log_eval(state, logs)
        if "loss" not in logs:
            return
        # DeepSpeed passes over steps whose gradient is infinite; ZeRO-0 tells no norm
        numbers: dict[str, float] = {
            name: logs[name] for name in ("loss", "grad_norm", "learning_rate") if name in logs
        }
        _check_finite(numbers, state.global_step)
        now, steps = time.monotonic(), state.global_step - self._logged_step
        speed = self._tokens_per_step * steps / (now - self._logged_at)
        self._logged_at, self._logged_step = now, state.global_step
        if state.is_world_process_zero:
            self._write({"step": state.global_step, **numbers, "tokens_per_s": round(speed, 1)})

    def _log_eval(self, state: TrainerState, logs: dict[str, float]) -> None:
        losses = {name: logs[name] for name in logs if name.startswith(EVAL_LOSS_PREFIX)}
        _check_finite(losses, state.global_step)
        self._eval_losses = {name.removeprefix(EVAL_LOSS_PREFIX): loss for name, loss in losses.items()}
        self._logged_at, self._logged_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self._write({"step": state.global_step, **losses})

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The checkpoint that the run goes on from learns of the evaluation that was due there."""
        if self._eval_due and state.is_world_process_zero:
            checkpoint = self._run / f"checkpoint-{state.global_step}"
            evaluated = {"eval_losses": self._eval_losses, "eval_due": False}
            mark_complete(checkpoint, **(read_marker(checkpoint) | evaluated))
            remove_old_checkpoints(self._run, self._keep, keep_best=self._keep_best)
        self._eval_due = False

    def _write(self, line: dict[str, float]) -> None:
        with (self._run / METRICS).open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        """The marker comes last, when every rank has written its shards; only then are older ones deleted."""
        checkpoint = self._run / f"checkpoint-{state.global_step}"
        model = passed["model"]
        logits = compute_reference_logits(model, self._probe_ids)
        if not logits.isfinite().all():
            raise UserError(
                f"the weights are not finite at step {state.global_step}, and its checkpoint does not count: "
                "lower train.learning_rate, and go on from the last whole one with --resume"
            )
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            self._tokenizer.save_pretrained(checkpoint)
            # beside adapters the Trainer saves neither
            model.config.save_pretrained(checkpoint)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(checkpoint)
            save_reference_logits(checkpoint, self._probe_ids, logits)
            mark_complete(
                checkpoint,
                step=state.global_step,
                facts=self._facts,
                eval_losses=self._eval_losses,
                eval_due=self._eval_due,
                unlogged=self._unlogged,
            )
            remove_old_checkpoints(self._run, self._keep, keep_best=self._keep_best)
        self._logged_at = time.monotonic()


def _check_finite(numbers: dict[str, float], step: int) -> None:
    """Raises:
    UserError: one of the numbers is not finite.
    """
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise UserError(
                f"{name} became {number} at step {step}: lower train.learning_rate, "
                "and go on from the last checkpoint with --resume"
            )
