"""Law 9 for runs that are asked to stop, at chosen steps: nothing of what is logged or evaluated is lost."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from blockft.model.checkpoint import best_checkpoint, complete_checkpoints, find_checkpoint, read_marker
from blockft.outputs import read_metrics
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from tests.run import toy_recipe

ROOT = Path(__file__).parents[2]

STOPPED = """
import sys
from blockft.cli import main
from blockft.training.run_callback import RunCallback

step, honest = int(sys.argv.pop(1)), RunCallback.on_step_end

def on_step_end(self, args, state, control, **passed):
    self.asked_to_stop |= state.global_step == step  # as SIGTERM during this step
    return honest(self, args, state, control, **passed)

RunCallback.on_step_end = on_step_end
main()
"""

NEVER = -1


def run_to(step: int, run: Path, *words: str, ranks: int = 2) -> None:
    """Train in as many processes, asked to stop at a step."""
    script = run.parent / "stopped.py"
    script.write_text(STOPPED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", str(ranks)]
    command += ["--master_port", port, str(script), str(step), "train", str(run.parent / "recipe.yaml")]
    done = subprocess.run(
        [*command, f"train.output_dir={run}", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == (0 if step == NEVER else 130), done.stderr


def curve(run: Path) -> list[dict[str, Any]]:
    """All that was logged, but the speed."""
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(run)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    prepare(toy_recipe(folder))
    return folder


@pytest.mark.slow
def test_law_9_a_run_stopped_again_and_again_gives_every_line_of_one_never_stopped(folder: Path) -> None:
    """Twice between two lines, where an evaluation is due with and without a checkpoint, and at the end."""
    words = ("train.deepspeed=zero3", "train.logging_steps=4", "train.save_steps=4", "train.eval_steps=6")
    words += ("train.num_eval_examples=6", "train.num_train_epochs=3", "train.max_steps=8")
    whole, run, alone = (folder / name for name in ("whole", "stopped", "alone"))
    run_to(NEVER, whole, *words)
    assert [(line["step"], "loss" in line) for line in curve(whole)] == [
        (0, False),
        *((step, is_loss) for step in (4, 6, 8) for is_loss in (True, False)),
    ]
    for number, step in enumerate((2, 3, 6, 8)):
        run_to(step, run, *words, *(["--resume"] if number else []))
        marker = read_marker(find_checkpoint(run))
        assert marker["step"] == step and marker["eval_due"] == (step >= 6)
        assert marker["unlogged"].get("steps", 0) == (step if step < 6 else 0)
        if step == 2:
            shutil.copytree(run, alone)
    run_to(NEVER, run, *words, "--resume")
    assert curve(run) == curve(whole)
    assert read_marker(find_checkpoint(run)) == read_marker(find_checkpoint(whole))
    assert find_checkpoint(run).name == "checkpoint-8"
    best, expected = best_checkpoint(run), best_checkpoint(whole)
    assert best and expected and best.name == expected.name

    run_to(NEVER, alone, *words, "--resume", ranks=1)
    found, losses = ([line["loss"] for line in curve(r) if "loss" in line] for r in (alone, whole))
    assert_close(found, losses, rtol=1e-3, atol=0)


def test_a_run_stopped_before_its_first_line_is_exported(folder: Path) -> None:
    run = folder / "early"
    run_to(2, run, "train.logging_steps=10", ranks=1)
    assert not read_metrics(run) and [path.name for path in complete_checkpoints(run)] == ["checkpoint-2"]
    assert "after 2 steps.\n" in (export(run, folder / "export") / "README.md").read_text()
