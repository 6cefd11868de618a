"""Write metrics and complete checkpoints to the folder of a run, and save and stop on a signal."""

import math
import os
import signal
import threading
from collections.abc import Callable
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

from blockft.digest import FileDigest
from blockft.errors import UserError, warn
from blockft.model.base_quantization import write_base_quantization
from blockft.model.checkpoint import (
    add_answers,
    add_evaluation,
    compute_reference_logits,
    digest_own_files,
    mark_complete,
    remove_old_checkpoints,
    save_reference_logits,
)
from blockft.model.load import DTYPES, write_adapter_block_attention
from blockft.run_folder import (
    MEASURED,
    METRICS,
    SAMPLE_ANSWERS,
    append_lines,
    digest_metrics,
    read_sample_answers,
)
from blockft.training.distributed import errors_on_all_ranks
from blockft.training.library_internals import (
    get_unlogged_loss,
    own_optimizer_states,
    restore_unlogged_loss,
    restore_weights,
    undo_initial_step,
    write_tag,
)
from blockft.training.objectives import EVAL_LOSS_PREFIX, select_eval_losses
from blockft.training.peak_memory import restart_peak_memory
from blockft.training.plan import QUANTIZATION, WEIGHT_DTYPE
from blockft.training.progress_line import ProgressLineCallback
from blockft.training.sample_answers import SampleAnswers, describe_repetition, format_answers
from blockft.training.trainer import BlockTrainer


class RunCallback(TrainerCallback):
    """Writes `metrics.jsonl`, completes checkpoints, and on SIGINT or SIGTERM saves one and stops the run.

    `run_signature` is stored in every checkpoint's marker. `block_attention` is the entry of the model, which
    a checkpoint with an adapter holds, because it can be opened as a model. `reference_ids_T` is the text of
    the reference logits. `unlogged`, `eval_due` and `answers_due` come from the marker of the checkpoint that
    the run resumes from, see `mark_complete`. The tokenizer is saved here, because a Trainer that has it
    changes the model's end token. `sample_answers` are written to `sample_answers.jsonl`, printed by
    `progress_line`, and passed to `show_answers`, if it is set, together with all earlier ones.
    """

    trainer: BlockTrainer
    """The trainer of the run; set before training begins."""

    def __init__(
        self,
        run: Path,
        *,
        tokenizer: PreTrainedTokenizerBase,
        run_signature: dict[str, Any],
        block_attention: dict[str, Any],
        reference_ids_T: torch.Tensor,
        save_total_limit: int,
        keep_best: bool,
        has_eval_rows: bool,
        eval_steps: int | None,
        unlogged: dict[str, Any],
        eval_due: bool,
        sample_answers: SampleAnswers | None,
        answers_due: bool,
        progress_line: ProgressLineCallback,
    ) -> None:
        self._run, self._tokenizer = run, tokenizer
        self._run_signature, self._reference_ids_T = run_signature, reference_ids_T
        self._block_attention = block_attention
        self._save_total_limit, self._keep_best = save_total_limit, keep_best
        self._has_eval_rows, self._eval_steps = has_eval_rows, eval_steps
        self._eval_losses: dict[str, float] = {}
        self._unlogged, self._eval_due = unlogged, eval_due
        self._sample_answers, self._answers_due = sample_answers, answers_due
        self._progress_line = progress_line
        self.show_answers: Callable[[list[dict[str, Any]], int], None] | None = None
        self.stop_requested = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        self._folder = os.stat(self._run)
        if state.global_step == 0:
            undo_initial_step(passed["optimizer"])
        else:
            restore_weights(self.trainer.model_wrapped)
            own_optimizer_states(passed["optimizer"])
        restart_peak_memory(args.device)
        if self._unlogged:
            restore_unlogged_loss(self.trainer, self._unlogged)
            groups = self.trainer.loss_groups
            groups.restore(self._unlogged["loss_groups"], args.process_index, args.world_size)
        # Python lets only the main thread handle signals; a run in another thread is stopped by its owner
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._request_stop)
        if self._answers_due and self._sample_answers:
            self._answer_samples(self._sample_answers, args, state, may_stop=False)
            if state.is_world_process_zero:
                checkpoint = self._run / f"checkpoint-{state.global_step}"
                add_answers(checkpoint, metrics=digest_metrics(self._run))
        self._answers_due = False
        self.trainer.throughput.begin(state.global_step)

    def _request_stop(self, number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        self.stop_requested = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Decide whether to log, evaluate, save and stop; all ranks decide alike if one received a signal.

        A scheduled save also logs and evaluates the step. Logging rejects non-finite losses before saving.
        On a stop, a due evaluation and due sample answers are postponed until the run resumes.

        Raises:
            UserError: the run is stopped and its loss is not finite; the run's folder was moved or removed.
        """
        self._eval_losses, self._unlogged, self._eval_due = {}, {}, False
        stop_requested = self._is_stop_requested(args)
        is_eval_step = self._eval_steps is not None and state.global_step % self._eval_steps == 0
        should_evaluate = self._has_eval_rows and (is_eval_step or control.should_save)
        control.should_log |= control.should_save or should_evaluate
        samples = self._sample_answers
        # a run that is shorter than the distance of two steps also answers, at its end
        is_sample_step = samples is not None and (
            state.global_step % samples.steps == 0 or state.global_step >= state.max_steps
        )
        if control.should_log or stop_requested or is_sample_step:
            self._check_folder()
        if samples and is_sample_step and not stop_requested:
            stop_requested = not self._answer_samples(samples, args, state)
        self._answers_due = stop_requested and is_sample_step
        if not stop_requested:
            control.should_evaluate = should_evaluate
            return
        self.stop_requested = control.should_save = control.should_training_stop = True
        self._eval_due = should_evaluate
        if not control.should_log:
            self._unlogged = get_unlogged_loss(self.trainer)
            self._unlogged["loss_groups"] = self.trainer.loss_groups.gather()
            _check_finite({"loss": sum(self._unlogged["loss_sums"])}, state.global_step)

    def _is_stop_requested(self, args: TrainingArguments) -> bool:
        """Return whether any rank received a signal. A single rank does not wait for its device."""
        if args.world_size == 1:
            return self.stop_requested
        num_requests = torch.tensor(int(self.stop_requested), device=args.device)
        torch.distributed.all_reduce(num_requests)
        return bool(num_requests)

    def _answer_samples(
        self, samples: SampleAnswers, args: TrainingArguments, state: TrainerState, *, may_stop: bool = True
    ) -> bool:
        """Write and show sample answers. Returns False if a signal ended them; then none is written."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)  # the step itself belongs to the measured time
        with self.trainer.throughput.paused():
            answers = samples.answer(
                self.trainer.model,
                args.device,
                is_stopped=lambda: may_stop and self.stop_requested,
                rank=args.process_index,
                num_ranks=args.world_size,
            )
            if answers is None:
                return False
            if not state.is_world_process_zero:
                return True
            records = samples.describe(answers, state.global_step)
            append_lines(self._run / SAMPLE_ANSWERS, records)
            self._progress_line.print_lines(format_answers(records))
            if warning := describe_repetition(records):
                warn(warning)
            if self.show_answers:
                self.show_answers(read_sample_answers(self._run), state.global_step)
        return True

    def _check_folder(self) -> None:
        """Check that the run's folder is the one in which the run began: the Trainer would create another."""
        try:
            is_same = os.path.samestat(self._folder, os.stat(self._run))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise UserError(
                f"{self._run} was moved, removed or replaced while the run was writing it: move it back, and "
                "resume its last complete checkpoint with --resume"
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        """Append the logged values to `metrics.jsonl`, after checking that they are finite.

        Raises:
            UserError: the loss or the gradient is not finite; the last complete checkpoint is not touched.
        """
        logs: dict[str, float] = passed["logs"]
        if self._has_eval_rows and select_eval_losses(logs):
            self._log_eval(state, logs)
        if "loss" not in logs:
            return
        # DeepSpeed skips steps with an infinite gradient; under ZeRO-0 the Trainer has no gradient norm
        names = ["loss", "grad_norm", "learning_rate", *(name for name in logs if name.startswith("loss_"))]
        values: dict[str, float] = {name: logs[name] for name in names if name in logs}
        _check_finite(values, state.global_step)
        if state.is_world_process_zero:
            measured = {name: logs[name] for name in MEASURED if name in logs}
            self._append_metrics({"step": state.global_step, **values, **measured})

    def _log_eval(self, state: TrainerState, logs: dict[str, float]) -> None:
        losses = {name: logs[name] for name in logs if name.startswith(EVAL_LOSS_PREFIX)}
        _check_finite(losses, state.global_step)
        self._eval_losses = select_eval_losses(logs)
        self.trainer.throughput.restart(state.global_step)
        if state.is_world_process_zero:
            self._append_metrics({"step": state.global_step, **losses})

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add an evaluation that was due to the marker of the checkpoint that the run resumes from."""
        if self._eval_due and state.is_world_process_zero:
            checkpoint = self._run / f"checkpoint-{state.global_step}"
            add_evaluation(checkpoint, eval_losses=self._eval_losses, metrics=digest_metrics(self._run))
            remove_old_checkpoints(self._run, self._save_total_limit, keep_best=self._keep_best)
        self._eval_due = False

    def _append_metrics(self, line: dict[str, float]) -> None:
        append_lines(self._run / METRICS, [line])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        """Write the completion marker after every rank wrote its shards, then delete old checkpoints.

        Raises:
            UserError: the weights are not finite; the checkpoint stays incomplete.
        """
        checkpoint = self._run / f"checkpoint-{state.global_step}"
        model = passed["model"]
        logits_TV = compute_reference_logits(model, self._reference_ids_T)
        if not logits_TV.isfinite().all():
            raise UserError(
                f"the weights are not finite at step {state.global_step}, so its checkpoint is not used: "
                "lower train.learning_rate, and resume from the last complete checkpoint with --resume"
            )
        with errors_on_all_ranks():
            if state.is_world_process_zero:
                self._tokenizer.save_pretrained(checkpoint)
                # for a model with an adapter the Trainer saves neither of the two configs
                model.config.save_pretrained(checkpoint)
                if model.generation_config is not None:
                    model.generation_config.save_pretrained(checkpoint)
                # a checkpoint with an adapter can be opened as a model
                if self._run_signature["train.lora"] is not None:
                    write_adapter_block_attention(checkpoint, self._block_attention)
                if self._run_signature[QUANTIZATION]:
                    write_base_quantization(checkpoint, DTYPES[self._run_signature[WEIGHT_DTYPE]])
                save_reference_logits(checkpoint, self._reference_ids_T, logits_TV)
                write_tag(checkpoint, state.global_step)
        files = _gather_digests(checkpoint, args.process_index, args.world_size)
        with errors_on_all_ranks():
            if state.is_world_process_zero:
                mark_complete(
                    checkpoint,
                    step=state.global_step,
                    run_signature=self._run_signature,
                    eval_losses=self._eval_losses,
                    eval_due=self._eval_due,
                    answers_due=self._answers_due,
                    unlogged=self._unlogged,
                    files=files,
                    metrics=digest_metrics(self._run),
                )
                remove_old_checkpoints(self._run, self._save_total_limit, keep_best=self._keep_best)
        self.trainer.throughput.restart(state.global_step)


def _gather_digests(checkpoint: Path, rank: int, num_ranks: int) -> dict[str, FileDigest]:
    """Return the digests of all files of a checkpoint; each rank reads what it wrote. All ranks call it."""
    with errors_on_all_ranks():
        own = digest_own_files(checkpoint, rank=rank, num_ranks=num_ranks)
    gathered = [own] * num_ranks
    if num_ranks > 1:
        torch.distributed.all_gather_object(gathered, own)
    return {name: digest for part in gathered for name, digest in part.items()}


def _check_finite(values: dict[str, float], step: int) -> None:
    """Check that all values are finite.

    Raises:
        UserError: one of the values is not finite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} became {value} at step {step}: lower train.learning_rate, "
                "and resume from the last checkpoint with --resume"
            )
