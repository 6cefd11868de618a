"""A full disk during a training is one sentence, and the run can be resumed from its last checkpoint.

A limit of the size of files stands for the full disk: every write beyond it fails.
"""

import resource
import shutil
from functools import partial
from pathlib import Path

import pytest

from blockft.model.checkpoint import complete_checkpoints
from blockft.stages.prepare import prepare
from tests.commands import all_logged, run_ranks
from tests.faults.toy import read_files
from tests.run import toy_recipe


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    prepare(toy_recipe(folder))
    for num_ranks in (1, 2):
        done = run_ranks(*command(folder, folder / f"run{num_ranks}"), num_ranks=num_ranks)
        assert done.returncode == 0, done.stderr
    return folder


def command(toy: Path, run: Path) -> list[str | Path]:
    settings = ["train.save_steps=2", "train.max_steps=4", *(["--resume"] if run.exists() else [])]
    return ["train", toy / "recipe.yaml", f"train.output_dir={run}", *settings]


def limit(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.parametrize(
    ("num_ranks", "num_bytes"), [(1, 2000), (1, 3000), (1, 20000), (1, 120000), (2, 9000)]
)
def test_a_training_on_a_full_disk_says_so_and_resumes(
    num_ranks: int, num_bytes: int, toy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = run_ranks(*command(toy, run), num_ranks=num_ranks, before=partial(limit, num_bytes))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (message, *others) = [line for line in done.stderr.splitlines() if line.startswith("blockft:")]
    assert "the disk is full" in done.stderr or f"{run}/" in message, done.stderr
    assert len(others) < num_ranks
    if num_ranks == 1:
        assert not list(run.glob("checkpoint-*"))
    done = run_ranks(*command(toy, run), num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    assert all_logged(run) == all_logged(toy / f"run{num_ranks}")


def test_the_last_complete_checkpoint_is_named_and_stays(toy: Path, tmp_path: Path) -> None:
    """Also when the disk is full while shards are converted for another number of processes."""
    for before, num_bytes in (("run1", 20000), ("run2", 20000), ("run2", 5000)):
        run = tmp_path / f"{before}-{num_bytes}"
        shutil.copytree(toy / before, run)
        shutil.rmtree(run / "checkpoint-4")
        done = run_ranks(*command(toy, run), before=partial(limit, num_bytes))
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert (
            "the disk is full" in done.stderr
            and "its last complete checkpoint is checkpoint-2" in done.stderr
        )
        assert [path.name for path in run.glob("*checkpoint-*")] == ["checkpoint-2"]
        assert not (run / ".universal").exists()
        done = run_ranks(*command(toy, run))
        assert done.returncode == 0, done.stderr
        assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("num_bytes", [200, 1500, 4000])
def test_a_prepare_on_a_full_disk_says_so_and_continues(num_bytes: int, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "data"
    prepare_command = ["prepare", toy / "recipe.yaml", f"data.output_dir={out}"]
    done = run_ranks(*prepare_command, before=partial(limit, num_bytes))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (message,) = done.stderr.splitlines()
    assert "the disk is full" in message and "free some space" in message
    assert not out.exists()
    done = run_ranks(*prepare_command)
    assert done.returncode == 0, done.stderr
    assert read_files(out) == read_files(toy / "data")
