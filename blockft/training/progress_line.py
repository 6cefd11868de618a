"""One line on stderr that shows the progress of a run."""

import shutil
import sys
import time
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blockft.training.objectives import EVAL_LOSS_PREFIX


class ProgressLineCallback(TrainerCallback):
    """Prints step, loss, learning rate, tokens per second and the time left, on rank 0 only.

    On a terminal the line is updated in place; elsewhere each logged step is a line of its own.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._start_step, self._start_time = 0, 0.0
        self._is_open = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._start_step, self._start_time = state.global_step, time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        logs: dict[str, float] = passed["logs"]
        if losses := {name: loss for name, loss in logs.items() if name.startswith(EVAL_LOSS_PREFIX)}:
            self._print(format_eval_losses(state.global_step, losses))
        elif "loss" in logs:
            num_done = state.global_step - self._start_step
            num_left = state.max_steps - state.global_step
            seconds_left = (time.monotonic() - self._start_time) / num_done * num_left
            line = format_progress(state.global_step, state.max_steps, logs, seconds_left=seconds_left)
            self._print(line, in_place=self._is_terminal and num_left > 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._is_open:
            print(file=sys.stderr, flush=True)
        self._is_open = False

    def _print(self, line: str, *, in_place: bool = False) -> None:
        """Print a line over the line that is updated in place, if there is one."""
        if self._is_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
        clear = "\r\x1b[K" if self._is_open else ""
        print(clear + line, end="" if in_place else "\n", file=sys.stderr, flush=True)
        self._is_open = in_place


def format_progress(step: int, max_steps: int, logs: dict[str, float], *, seconds_left: float) -> str:
    """Return the progress line of a logged step."""
    parts = [
        f"step {step}/{max_steps}",
        f"loss {logs['loss']:.4f}",
        f"learning rate {logs['learning_rate']:.2e}",
        f"{logs['tokens_per_s']:,.0f} tokens/s",
        f"{timedelta(seconds=round(seconds_left))} left",
    ]
    return ", ".join(parts)


def format_eval_losses(step: int, losses: dict[str, float]) -> str:
    """Return the line of an evaluation, for example "step 4: held-out loss block 3.6521, full 3.6419"."""
    by_mode = [f"{name.removeprefix(EVAL_LOSS_PREFIX)} {loss:.4f}" for name, loss in losses.items()]
    return f"step {step}: held-out loss {', '.join(by_mode)}"
