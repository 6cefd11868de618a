"""A full disk during a training is one sentence, and the run can be resumed from its last checkpoint.

A limit of the size of files stands for the full disk: every write beyond it fails.
"""

import errno
import os
import resource
import shutil
from functools import partial
from pathlib import Path

import pytest

from blockft.model.checkpoint import complete_checkpoints
from blockft.stages.prepare import prepare
from tests.commands import all_logged, run_ranks, start_ranks
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


def fill_disk(full_rank: int, fault: int | str) -> None:
    """Limit the files of one rank to a number of bytes, or let a function of `run_callback` find no space."""

    def raise_error(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    if os.environ["RANK"] != str(full_rank):
        return
    if isinstance(fault, int):
        limit(fault)
    else:
        from blockft.training import run_callback

        setattr(run_callback, fault, raise_error)


@pytest.mark.parametrize(
    ("stage", "full_rank", "fault"),
    [
        (0, 0, 100_000),
        (2, 0, 100_000),
        (2, 1, 100_000),
        (3, 1, 100_000),
        (2, 0, 9000),
        (2, 1, 9000),
        (2, 0, "save_reference_logits"),
        (2, 0, "write_tag"),
        (2, 1, "digest_own_files"),
        (2, 0, "mark_complete"),
    ],
)
def test_a_rank_that_cannot_write_ends_all_ranks_with_its_sentence(
    stage: int, full_rank: int, fault: int | str, toy: Path, tmp_path: Path
) -> None:
    """At each file of a checkpoint. No rank waits for another one, and the last checkpoint stays."""
    run, zero = tmp_path / "run", f"train.deepspeed=zero{stage}"
    done = run_ranks(*command(toy, run), zero, "train.max_steps=2", num_ranks=2)
    assert done.returncode == 0, done.stderr
    before = read_files(run / "checkpoint-2")
    ranks = start_ranks(*command(toy, run), zero, num_ranks=2, before=partial(fill_disk, full_rank, fault))
    done = ranks.wait()
    assert [process.exitcode for process in ranks.processes] == [2, 2], done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("blockft:")]
    last = "its last complete checkpoint is checkpoint-2"
    assert message.endswith(f"free some space, then resume {run} with --resume ({last})"), done.stderr
    assert [path.name for path in run.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert read_files(run / "checkpoint-2") == before
    done = run_ranks(*command(toy, run), zero, num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert all_logged(run)[-1]["step"] == 4


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
