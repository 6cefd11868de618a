"""Processes that train on one GPU: killed and resumed, started by the command line, with offload."""

import os
import signal
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blockft.model.checkpoint import complete_checkpoints
from tests.commands import finish, logged, run_ranks, start
from tests.gpu_runs import (
    BFLOAT16,
    SETTINGS,
    TOLERANCE,
    ToyRuns,
    check_losses,
    losses_without_speed,
    train_here,
)

pytestmark = pytest.mark.gpu

COMPILED = ("train.torch_compile=true",)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyRuns:
    return ToyRuns(tmp_path_factory.mktemp("kill-gpu"))


def kill_this_rank_after_step(step: int) -> None:
    """Let this process kill itself as soon as it has logged a step, before it takes the next one."""
    from blockft.training import run_callback

    append_lines = run_callback.append_lines

    def append_and_end(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        records = list(records)
        append_lines(path, records)
        if any(record.get("step") == step and "loss" in record for record in records):
            os.kill(os.getpid(), signal.SIGKILL)

    run_callback.append_lines = append_and_end


def test_a_killed_run_resumes_as_if_never_killed(toy: ToyRuns) -> None:
    """To every printed digit, with compiled layers, in a process that is not the one that was killed."""
    expected, run = toy.train(*COMPILED), toy.new_run("killed")
    before = partial(kill_this_rank_after_step, 4)
    done = run_ranks("train", toy.recipe, f"train.output_dir={run}", *SETTINGS, *COMPILED, before=before)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-3"]
    assert logged(run) == logged(expected)[:4]
    train_here(toy.recipe, run, *COMPILED, resume=True)
    assert losses_without_speed(run) == losses_without_speed(expected)


def test_the_command_line_starts_a_rank_that_gives_the_losses_of_a_plain_process(toy: ToyRuns) -> None:
    run = toy.new_run("launched")
    overrides = (f"train.output_dir={run}", *SETTINGS, BFLOAT16)
    finish(start("blockft", "train", toy.recipe, *overrides, "--num-gpus", "1"))
    assert losses_without_speed(run) == losses_without_speed(toy.train(BFLOAT16))


@pytest.mark.parametrize("config", ["zero2-offload", "zero3-offload"])
def test_offload_gives_the_losses_of_the_gpu(toy: ToyRuns, config: str) -> None:
    """DeepSpeed compiles its optimizer of the CPU first."""
    run = toy.train(BFLOAT16, f"train.deepspeed={config}")
    check_losses(run, toy.train(BFLOAT16), TOLERANCE[BFLOAT16])
