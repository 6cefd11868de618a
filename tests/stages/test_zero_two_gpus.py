"""Runs on two GPUs, through NCCL: the losses of one GPU, resume on one, exports, launchers, a killed rank."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from blockft.model.checkpoint import MARKER, find_checkpoint, read_marker
from blockft.run_folder import METRICS
from blockft.stages.export import export
from tests import commands
from tests.commands import finish, free_port, logged, start
from tests.gpu_runs import (
    BFLOAT16,
    FLOAT32,
    SETTINGS,
    TOLERANCE,
    ToyRuns,
    check_losses,
    losses_without_speed,
    zero_runs,
)

pytestmark = pytest.mark.gpu2

STAGES = zero_runs(1, 2, 3)


class TwoGpuRuns(ToyRuns):
    """Runs on forked ranks: one process has one GPU."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._trained: dict[tuple[int, tuple[str, ...]], Path] = {}

    def train_on(self, num_ranks: int, *overrides: str) -> Path:
        """Train on some ranks, unless the run exists, and return the run's folder."""
        key = (num_ranks, overrides)
        if key not in self._trained:
            run = self.new_run(f"ranks-{len(self._trained)}")
            commands.train(self.recipe, run, *SETTINGS, *overrides, num_ranks=num_ranks)
            self._trained[key] = run
        return self._trained[key]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TwoGpuRuns:
    return TwoGpuRuns(tmp_path_factory.mktemp("two-gpus"))


@STAGES
def test_two_gpus_give_the_losses_of_one(toy: TwoGpuRuns, stage: int, adapter: tuple[str, ...]) -> None:
    run = toy.train_on(2, FLOAT32, *adapter, f"train.deepspeed=zero{stage}")
    assert read_marker(find_checkpoint(run))["run_signature"]["number of processes"] == 2
    check_losses(run, toy.train_on(1, FLOAT32, *adapter, "train.deepspeed=zero0"), TOLERANCE[FLOAT32])


@pytest.mark.parametrize(("stage", "compile"), [(1, True), (3, False), (3, True)])
def test_two_gpus_in_bfloat16_differ_from_one_by_rounding_only(
    toy: TwoGpuRuns, stage: int, compile: bool
) -> None:
    run = toy.train_on(2, BFLOAT16, f"train.deepspeed=zero{stage}", f"train.torch_compile={compile}".lower())
    check_losses(run, toy.train_on(1, BFLOAT16, "train.torch_compile=true"), TOLERANCE[BFLOAT16])


@STAGES
def test_an_export_of_two_gpus_gives_the_logits_of_the_run(
    toy: TwoGpuRuns, stage: int, adapter: tuple[str, ...]
) -> None:
    """`export` compares them, and raises if they differ."""
    run = toy.train_on(2, FLOAT32, *adapter, f"train.deepspeed=zero{stage}")
    assert (export(run, toy.folder / f"export-{stage}-{len(adapter)}") / "model.safetensors").is_file()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_resumes_on_one_gpu_and_on_two_again(toy: TwoGpuRuns, stage: int) -> None:
    settings = (*SETTINGS, FLOAT32, f"train.deepspeed=zero{stage}")
    run = toy.new_run(f"two-one-two-{stage}")
    commands.train(toy.recipe, run, *settings, "train.max_steps=2", num_ranks=2)
    commands.train(toy.recipe, run, *settings, "train.max_steps=4", "--resume", num_ranks=1)
    commands.train(toy.recipe, run, *settings, "--resume", num_ranks=2)
    expected = toy.train_on(2, FLOAT32, f"train.deepspeed=zero{stage}")
    assert logged(run) == pytest.approx(logged(expected), rel=1e-3)


def test_a_resumed_run_of_two_gpus_gives_the_same_digits(toy: TwoGpuRuns) -> None:
    settings = (*SETTINGS, BFLOAT16, "train.deepspeed=zero2")
    run, expected = toy.new_run("resumed"), toy.train_on(2, BFLOAT16, "train.deepspeed=zero2")
    commands.train(toy.recipe, run, *settings, num_ranks=2)
    assert losses_without_speed(run) == losses_without_speed(expected)
    (find_checkpoint(run) / MARKER).unlink()
    commands.train(toy.recipe, run, *settings, "--resume", num_ranks=2)
    assert losses_without_speed(run) == losses_without_speed(expected)


def test_every_launcher_gives_the_losses_of_two_gpus(toy: TwoGpuRuns) -> None:
    """`--num-gpus 2` and torchrun."""
    runs = [toy.new_run(name) for name in ("num-gpus", "torchrun")]
    options = [*SETTINGS, BFLOAT16, "train.deepspeed=zero2"]
    torchrun = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    finish(
        start("blockft", "train", toy.recipe, f"train.output_dir={runs[0]}", *options, "--num-gpus", "2"),
        start(*torchrun, "--module", "blockft", "train", toy.recipe, f"train.output_dir={runs[1]}", *options),
    )
    expected = toy.train_on(2, BFLOAT16, "train.deepspeed=zero2")
    for run in runs:
        assert losses_without_speed(run) == losses_without_speed(expected)


def test_a_killed_rank_ends_the_run_within_a_minute(toy: TwoGpuRuns) -> None:
    run = toy.new_run("killed-rank")
    options = (
        *SETTINGS,
        "train.num_train_epochs=10000",
        "train.max_steps=20000",
        "train.save_steps=20000",
    )
    process = start("blockft", "train", toy.recipe, f"train.output_dir={run}", *options, "--num-gpus", "2")
    while '"step": 3, "loss"' not in ((run / METRICS).read_text() if (run / METRICS).exists() else ""):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child)]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    output, _ = process.communicate()
    assert time.monotonic() - killed_at < 60 and process.returncode not in (0, 124), output
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def is_rank(process: psutil.Process) -> bool:
    """Return whether a process is a rank; the compilers that a rank starts have its environment, too."""
    try:
        return "RANK" in process.environ() and "train" in process.cmdline()
    except psutil.Error:  # it has just ended
        return False
