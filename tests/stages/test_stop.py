"""Runs that are asked to stop at chosen steps and resume: no line, evaluation or checkpoint is lost."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from blockft.model.checkpoint import best_checkpoint, complete_checkpoints, find_checkpoint, read_marker
from blockft.run_folder import read_metrics
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from blockft.training.run_callback import RunCallback
from tests.commands import all_logged, logged, run_ranks
from tests.run import toy_recipe


def ask_to_stop(at_step: int) -> None:
    """Make runs of this process behave as if SIGTERM came during a step."""
    on_step_end = RunCallback.on_step_end

    def stop_and_end_step(self: RunCallback, args: Any, state: Any, control: Any, **keywords: Any) -> Any:
        self.stop_requested |= state.global_step == at_step
        return on_step_end(self, args, state, control, **keywords)

    RunCallback.on_step_end = stop_and_end_step  # type: ignore[method-assign]


def train(run: Path, *overrides: str, stop_at: int | None = None, num_ranks: int = 2) -> None:
    """Train with the recipe that lies beside the run, and stop after a step if one is given."""
    before = None if stop_at is None else partial(ask_to_stop, stop_at)
    arguments = ("train", run.parent / "recipe.yaml", f"train.output_dir={run}", *overrides)
    done = run_ranks(*arguments, num_ranks=num_ranks, before=before)
    assert done.returncode == (0 if stop_at is None else 130), done.stderr


def describe(checkpoint: Path) -> dict[str, Any]:
    """Return the marker without digests: metrics and shards hold speeds and times."""
    return {
        name: value for name, value in read_marker(checkpoint).items() if name not in ("files", "metrics")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    prepare(toy_recipe(folder))
    return folder


def test_a_run_stopped_four_times_logs_every_line_of_one_never_stopped(folder: Path) -> None:
    """It stops twice between two lines, at an evaluation with and without a checkpoint, and at the end."""
    settings = ("train.deepspeed=zero3", "train.logging_steps=4", "train.save_steps=4", "train.eval_steps=6")
    settings += ("train.num_eval_examples=6", "train.num_train_epochs=3", "train.max_steps=8")
    uninterrupted, run, one_rank = (folder / name for name in ("uninterrupted", "stopped", "one-rank"))
    train(uninterrupted, *settings)
    assert [(line["step"], "loss" in line) for line in all_logged(uninterrupted)] == [
        (0, False),
        *((step, is_loss) for step in (4, 6, 8) for is_loss in (True, False)),
    ]
    for step in (2, 3, 6, 8):
        train(run, *settings, *(["--resume"] if run.exists() else []), stop_at=step)
        marker = read_marker(find_checkpoint(run))
        assert marker["step"] == step and marker["eval_due"] == (step >= 6)
        assert marker["unlogged"].get("num_steps", 0) == (step if step < 6 else 0)
        if step == 2:
            shutil.copytree(run, one_rank)
    train(run, *settings, "--resume")
    assert all_logged(run) == all_logged(uninterrupted)
    assert describe(find_checkpoint(run)) == describe(find_checkpoint(uninterrupted))
    assert find_checkpoint(run).name == "checkpoint-8"
    best, expected = best_checkpoint(run), best_checkpoint(uninterrupted)
    assert best and expected and best.name == expected.name

    train(one_rank, *settings, "--resume", num_ranks=1)
    assert_close(logged(one_rank), logged(uninterrupted), rtol=1e-3, atol=0)


def test_a_run_stopped_before_its_first_logged_line_can_be_exported(folder: Path) -> None:
    run = folder / "early"
    train(run, "train.logging_steps=10", stop_at=2, num_ranks=1)
    assert not read_metrics(run) and [path.name for path in complete_checkpoints(run)] == ["checkpoint-2"]
    assert "after 2 steps.\n" in (export(run, folder / "export") / "README.md").read_text()
