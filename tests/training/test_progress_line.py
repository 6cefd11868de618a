"""A run prints one line per logged step, updated in place on a terminal, and only on rank 0."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from blockft.training.progress_line import ProgressLineCallback, format_progress

LOGS = {
    "loss": 0.25,
    "learning_rate": 1e-4,
    "loss_block": 0.3,
    "loss_full": 0.2,
    "loss_source_0": 0.25,
    "tokens_per_s": 12345.6,
    "utilization": 0.447,
    "peak_memory_gib": 76.13,
    "seconds_left": 3700.4,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def print_run(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, *, rank: int = 0) -> str:
    """Return what a run of two steps with an evaluation prints."""
    monkeypatch.setattr(sys, "stderr", stderr)
    callback: Any = ProgressLineCallback()
    state = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=rank == 0)
    callback.on_train_begin(None, state, None)
    for step in (1, 2):
        state.global_step = step
        callback.on_log(None, state, None, logs=dict(LOGS))
    callback.on_log(
        None,
        state,
        None,
        logs={"eval_loss_block": 1.5, "eval_loss_full": 1.25, "eval_loss_block_source_0": 1.5},
    )
    callback.on_log(None, state, None, logs={"train_runtime": 1.0})
    callback.on_train_end(None, state, None)
    return stderr.getvalue()


def test_each_logged_step_is_a_plain_line_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, evaluation = print_run(monkeypatch, io.StringIO()).splitlines()
    assert first == (
        "step 1/2, loss 0.2500 (block 0.3000, full 0.2000), 1:01:40 left, 12,346 tokens/s, "
        "44.7% utilization, peak 76.1 GiB, learning rate 1.00e-04"
    )
    assert second.startswith("step 2/2, ")
    assert evaluation == "step 2: held-out loss block 1.5000, full 1.2500"


def test_the_line_leaves_out_what_is_not_known_and_names_several_sources() -> None:
    logs = {name: value for name, value in LOGS.items() if name not in ("utilization", "loss_full")}
    line = format_progress(1, 2, logs | {"loss_source_3": 0.5})
    assert line.startswith("step 1/2, loss 0.2500, 1:01:40 left")
    assert "utilization" not in line and line.endswith(
        "learning rate 1.00e-04, loss by source 0: 0.2500 3: 0.5000"
    )


def test_the_line_is_updated_in_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = print_run(monkeypatch, Terminal())
    steps, evaluation, end = text.split("\n")
    first, second = steps.split("\r\x1b[K")
    assert first.startswith("step 1/2") and second.startswith("step 2/2") and end == ""
    assert len(first) == len(second) == 39, "a longer line would wrap and could not be updated"
    assert evaluation.startswith("step 2: held-out loss")


def test_other_ranks_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert print_run(monkeypatch, io.StringIO(), rank=1) == ""
