"""Processes that train on one GPU: killed and resumed, started by the command line, with offload."""

import signal
import time
from pathlib import Path

import pytest

from blockft.model.checkpoint import complete_checkpoints
from blockft.run_folder import METRICS
from tests import commands
from tests.commands import Ranks, finish, start, start_ranks
from tests.gpu_runs import (
    BFLOAT16,
    SETTINGS,
    TOLERANCE,
    ToyRuns,
    check_losses,
    losses_without_speed,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyRuns:
    return ToyRuns(tmp_path_factory.mktemp("kill-gpu"))


def kill_after_step(ranks: Ranks, run: Path, step: int) -> None:
    """Kill the ranks as soon as the run has logged a step."""
    while ranks.is_alive():
        text = (run / METRICS).read_text() if (run / METRICS).exists() else ""
        if f'"step": {step}, "loss"' in text:
            ranks.send_signal(signal.SIGKILL)
            ranks.wait()
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended before the step: {ranks.output('stderr')}")


def test_a_killed_run_resumes_as_if_never_killed(toy: ToyRuns) -> None:
    """To every printed digit, with compiled layers, in processes that are not those that were killed."""
    expected, run = toy.new_run("whole"), toy.new_run("killed")
    settings = (*SETTINGS, "train.torch_compile=true")
    commands.train(toy.recipe, expected, *settings)
    ranks = start_ranks("train", toy.recipe, f"train.output_dir={run}", *settings)
    kill_after_step(ranks, run, 4)
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-3"]
    commands.train(toy.recipe, run, *settings, "--resume")
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
