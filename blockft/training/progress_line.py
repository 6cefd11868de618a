"""One line on stderr that shows the progress of a run."""

import shutil
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blockft.printable import print_text
from blockft.training.loss_groups import MODES
from blockft.training.objectives import select_eval_losses


class ProgressLineCallback(TrainerCallback):
    """Prints step, losses, the time left, speed, memory and learning rate, on rank 0 only.

    On a terminal the line is updated in place; elsewhere each logged step is a line of its own.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_open = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        logs: dict[str, float] = passed["logs"]
        if losses := select_eval_losses(logs):
            self._print(format_eval_losses(state.global_step, losses))
        elif "loss" in logs:
            is_last = state.global_step >= state.max_steps
            line = format_progress(state.global_step, state.max_steps, logs)
            self._print(line, in_place=self._is_terminal and not is_last)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.print_lines([])

    def print_lines(self, lines: Iterable[str]) -> None:
        """Print lines that stay, below the line that is updated in place. They may hold any text."""
        if self._is_open:
            print(file=sys.stderr, flush=True)
        self._is_open = False
        for line in lines:
            print_text(line, file=sys.stderr, flush=True)

    def _print(self, line: str, *, in_place: bool = False) -> None:
        """Print a line over the line that is updated in place, if there is one."""
        if self._is_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
        clear = "\r\x1b[K" if self._is_open else ""
        print(clear + line, end="" if in_place else "\n", file=sys.stderr, flush=True)
        self._is_open = in_place


def format_progress(step: int, max_steps: int, logs: dict[str, float]) -> str:
    """Return the progress line of a logged step."""
    parts = [
        f"step {step}/{max_steps}",
        f"loss {logs['loss']:.4f}{_format_modes(logs)}",
        # the time left and the speed come early, because a terminal may be too narrow for the rest
        f"{timedelta(seconds=round(logs['seconds_left']))} left",
        f"{logs['tokens_per_s']:,.0f} tokens/s",
    ]
    if "utilization" in logs:
        parts.append(f"{logs['utilization']:.1%} utilization")
    parts.append(f"peak {logs['peak_memory_gib']:.1f} GiB")
    parts.append(f"learning rate {logs['learning_rate']:.2e}")
    sources = {name: loss for name, loss in logs.items() if name.startswith("loss_source_")}
    if len(sources) > 1:
        losses = (f"{name.removeprefix('loss_source_')}: {loss:.4f}" for name, loss in sources.items())
        parts.append(f"loss by source {' '.join(losses)}")
    return ", ".join(parts)


def _format_modes(logs: dict[str, float]) -> str:
    """Return the losses by mode, if there are several."""
    losses = [f"{mode} {logs[f'loss_{mode}']:.4f}" for mode in MODES if f"loss_{mode}" in logs]
    return f" ({', '.join(losses)})" if len(losses) > 1 else ""


def format_eval_losses(step: int, losses: dict[str, float]) -> str:
    """Return the line of an evaluation, for example "step 4: held-out loss block 3.6521, full 3.6419"."""
    by_mode = [f"{mode} {loss:.4f}" for mode, loss in losses.items()]
    return f"step {step}: held-out loss {', '.join(by_mode)}"
