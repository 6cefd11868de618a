"""Which checkpoints of a run are complete and whole, which one is the best, and which are removed."""

import os
import shutil
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from blockft import folder_lock
from blockft.errors import UserError
from blockft.folder_lock import FolderInUse, FolderLock, reading_folder
from blockft.model.checkpoint import (
    MARKER,
    add_evaluation,
    best_checkpoint,
    check_markers,
    complete_checkpoints,
    digest_own_files,
    find_checkpoint,
    incomplete_checkpoints,
    mark_complete,
    read_marker,
    reading_checkpoint,
    remove_incomplete,
    remove_old_checkpoints,
    verify_checkpoint,
)
from tests.faults.interruption import Interruption


def save_checkpoint(run: Path, step: int, num_ranks: int = 1, **eval_losses: float) -> Path:
    """Write a checkpoint with a file of each rank and two of rank 0, as ranks together do."""
    checkpoint = run / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step")
    (checkpoint / "trainer_state.json").write_text(f'{{"step": {step}}}')
    for rank in range(num_ranks):
        (checkpoint / "global_step" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(
            bytes([step, rank]) * 100
        )
    parts = [digest_own_files(checkpoint, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert sum(map(len, parts)) == len({name for part in parts for name in part}) == 2 + num_ranks
    mark_complete(
        checkpoint,
        step=step,
        run_signature={"train.seed": 1},
        eval_losses=eval_losses,
        eval_due=False,
        answers_due=False,
        unlogged={},
        files={name: digest for part in parts for name, digest in part.items()},
        metrics={"bytes": 0, "digest": ""},
    )
    return checkpoint


def test_the_best_checkpoint_has_the_lowest_loss_of_block_mode(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 1, full=0.1, block=0.9)
    best = save_checkpoint(tmp_path, 2, full=0.5, block=0.6)
    save_checkpoint(tmp_path, 3)
    assert best_checkpoint(tmp_path) == best


def test_the_best_checkpoint_has_the_lowest_loss_of_the_only_mode(tmp_path: Path) -> None:
    best = save_checkpoint(tmp_path, 1, full=0.1)
    save_checkpoint(tmp_path, 2, full=0.2)
    assert best_checkpoint(tmp_path) == best


def test_only_incomplete_checkpoints_are_removed(tmp_path: Path) -> None:
    complete = save_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-4" / "global_step4").mkdir(parents=True)
    (tmp_path / "checkpoint-4" / "global_step4" / "shard.pt").touch()
    (tmp_path / "checkpoint-mine").mkdir()
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-mine"]
    assert complete_checkpoints(tmp_path) == [complete]


def test_lock_files_that_killed_processes_left_of_checkpoints_are_removed(tmp_path: Path) -> None:
    read = save_checkpoint(tmp_path, 2)
    for name in (".checkpoint-1.lock", ".checkpoint-2.lock", ".checkpoint-3.lock", ".mine.lock"):
        (tmp_path / name).touch()
    with reading_folder(read, "blockft export"):
        remove_incomplete(tmp_path)
        assert sorted(path.name for path in tmp_path.glob(".*")) == [".checkpoint-2.lock", ".mine.lock"]


def test_an_older_checkpoint_without_a_marker_is_refused(tmp_path: Path) -> None:
    """An interrupted save leaves the newest one incomplete, so an older one has lost its marker."""
    first, second = save_checkpoint(tmp_path, 2), save_checkpoint(tmp_path, 10)
    (second / MARKER).unlink()
    check_markers(tmp_path)
    (first / MARKER).unlink()
    with pytest.raises(UserError, match="checkpoint-2 has lost its complete.json.*restore that file"):
        check_markers(tmp_path)
    assert first.is_dir() and second.is_dir()


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-20", "checkpoint-010"])
def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path, name: str) -> None:
    """A run would log and save again from the step of its content, under the step of its name."""
    older, newest = save_checkpoint(tmp_path, 2), save_checkpoint(tmp_path, 10)
    shutil.copytree(older, tmp_path / "a copy")
    verify_checkpoint(tmp_path / "a copy")
    renamed = newest.rename(tmp_path / name)
    message = f"{name} holds step 10, .*rename it to checkpoint-10, or remove it$"
    for check in (lambda: check_markers(tmp_path), lambda: verify_checkpoint(renamed)):
        with pytest.raises(UserError, match=message):
            check()
    # it is not offered instead of a damaged one
    (older / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="the run has no undamaged checkpoint"):
        verify_checkpoint(older)


def test_a_damaged_marker_of_an_older_checkpoint_is_found_before_the_run_goes_on(tmp_path: Path) -> None:
    """The run reads all markers when it saves the next checkpoint."""
    first, second = save_checkpoint(tmp_path, 2), save_checkpoint(tmp_path, 4)
    check_markers(tmp_path)
    (first / MARKER).write_bytes((second / MARKER).read_bytes())
    with pytest.raises(UserError, match="checkpoint-2 holds step 4"):
        check_markers(tmp_path)
    (first / MARKER).write_bytes(b"{}")
    with pytest.raises(UserError, match=f"checkpoint-2 is damaged .*; {second} is undamaged"):
        check_markers(tmp_path)


def test_a_checkpoint_whose_removal_is_interrupted_does_not_count_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, step)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

        def interrupt(_: Path) -> None:
            raise KeyboardInterrupt

        patched.setattr(shutil, "rmtree", interrupt)
        remove_old_checkpoints(tmp_path, 1, keep_best=False)
    check_markers(tmp_path)
    assert not remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "latest").write_text("global_stop"), "latest has changed"),
        (lambda c: (c / "latest").write_text("global"), "latest has 6 bytes instead of 11"),
        (lambda c: (c / "latest").unlink(), "latest is missing"),
        (lambda c: ((c / "latest").unlink(), (c / "latest").mkdir()), "latest is not a regular file"),
        (lambda c: ((c / "latest").unlink(), os.mkfifo(c / "latest")), "latest is not a regular file"),
        (
            lambda c: (c / MARKER).write_text((c / MARKER).read_text().replace('"step": 4', '"step": 5')),
            "complete.json has changed",
        ),
        (lambda c: (c / MARKER).write_text((c / MARKER).read_text() + " "), "complete.json has changed"),
        (lambda c: (c / MARKER).write_text("{"), "complete.json is not JSON"),
        (lambda c: (c / MARKER).write_text("[1]"), "complete.json is not a JSON object"),
        (lambda c: (c / MARKER).write_text('{"step": 4}'), "complete.json has no digest"),
    ],
    # the names of tests must not hold addresses of functions, which differ between the processes of xdist
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_of_a_checkpoint_is_one_sentence_that_offers_a_whole_one(
    damage: object, reason: str, tmp_path: Path
) -> None:
    assert callable(damage)
    whole, damaged = save_checkpoint(tmp_path, 2, num_ranks=2), save_checkpoint(tmp_path, 4, num_ranks=2)
    verify_checkpoint(damaged)
    damage(damaged)
    with pytest.raises(UserError) as error:
        verify_checkpoint(damaged)
    assert reason in str(error.value)
    assert str(error.value).endswith(
        f"{whole} is undamaged: remove checkpoint-4 to resume from it, or export it by its name"
    )
    (whole / "latest").write_text("")
    with pytest.raises(UserError, match="the run has no undamaged checkpoint"):
        verify_checkpoint(damaged)


def test_a_marker_holds_a_later_evaluation_and_the_digests_of_before(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, 2)
    before = read_marker(checkpoint)
    add_evaluation(checkpoint, eval_losses={"block": 0.5}, metrics={"bytes": 3, "digest": "abc"})
    verify_checkpoint(checkpoint)
    changed = {"eval_losses": {"block": 0.5}, "metrics": {"bytes": 3, "digest": "abc"}}
    assert read_marker(checkpoint) == before | changed


def test_hidden_files_of_a_checkpoint_are_passed_over(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, 2)
    (checkpoint / ".nfs0001").touch()
    verify_checkpoint(checkpoint)


def test_a_file_that_was_added_to_a_checkpoint_is_named_and_the_checkpoint_is_not_given_up(
    tmp_path: Path,
) -> None:
    save_checkpoint(tmp_path, 2)
    newest = save_checkpoint(tmp_path, 4)
    (newest / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"model.safetensors was added .*: move that file elsewhere$"):
        verify_checkpoint(newest)


def test_checkpoints_that_were_moved_elsewhere_may_be_links(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (2, 4, 6):
        moved = save_checkpoint(run, step).rename(elsewhere.with_name(f"moved-{step}"))
        (run / f"checkpoint-{step}").symlink_to(moved)
    (tmp_path / "moved-6" / MARKER).unlink()
    (run / "checkpoint-8").touch()
    (run / "checkpoint-9").symlink_to("nowhere")
    check_markers(run)
    verify_checkpoint(run / "checkpoint-4")
    assert remove_incomplete(run) == ["checkpoint-6"]
    remove_old_checkpoints(run, 1, keep_best=False)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]
    assert (tmp_path / "moved-2" / MARKER).is_file() and (tmp_path / "moved-6").is_dir()


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_goes_on_removes_a_checkpoint_between_any_two_steps_of_a_reader(
    best: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader gets a checkpoint that stays, the newest or best one of before or after the removal."""
    monkeypatch.setattr(folder_lock, "_HOLDER_S", 0)  # the name of the holder is not waited for
    found = set()
    for number in count():
        run = tmp_path / str(number)
        save_checkpoint(run, 2, block=0.5)

        def go_on(run: Path = run) -> None:
            save_checkpoint(run, 4, block=0.4)
            remove_old_checkpoints(run, 1, keep_best=True)

        with (
            Interruption(number, go_on) as interruption,
            reading_checkpoint(run, "blockft export", best=best) as checkpoint,
        ):
            verify_checkpoint(checkpoint)
            found.add(checkpoint.name)
        assert not [path for path in run.iterdir() if path.name.startswith(".")]
        if not interruption.has_happened:
            break
    assert found == {"checkpoint-2", "checkpoint-4"}


def test_the_first_rank_removes_a_checkpoint_between_any_two_steps_of_the_check_of_another(
    tmp_path: Path,
) -> None:
    """The first rank of a run that is already finished does not wait for the others."""
    template = tmp_path / "template"
    for step in (2, 4, 6):
        save_checkpoint(template, step)
    for number in count():
        run = tmp_path / str(number)
        shutil.copytree(template, run)
        with Interruption(number, partial(remove_old_checkpoints, run, 1, keep_best=False)) as interruption:
            check_markers(run)
            assert find_checkpoint(run).name == "checkpoint-6" and not incomplete_checkpoints(run)
        if not interruption.has_happened:
            break
    assert number > 5


def test_a_checkpoint_that_its_run_locks_to_remove_it_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = save_checkpoint(tmp_path, 2)
    lock = FolderLock(removed, "blockft train")

    def go_on(_: float) -> None:
        save_checkpoint(tmp_path, 4)
        shutil.rmtree(removed)
        lock.release()

    monkeypatch.setattr(folder_lock, "_HOLDER_S", 0)  # the name of the holder is not waited for
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(FolderInUse), reading_checkpoint(tmp_path, "blockft export"):
        pass
    monkeypatch.setattr(time, "sleep", go_on)
    with reading_checkpoint(tmp_path, "blockft export") as checkpoint:
        assert checkpoint.name == "checkpoint-4"


def test_a_run_removes_another_checkpoint_between_any_two_steps_of_the_report_of_a_damaged_one(
    tmp_path: Path,
) -> None:
    template = tmp_path / "template"
    for step in (2, 4):
        save_checkpoint(template, step)
    (template / "checkpoint-4" / "latest").unlink()
    for number in count():
        run = tmp_path / str(number)
        shutil.copytree(template, run)
        with (
            Interruption(number, partial(remove_old_checkpoints, run, 1, keep_best=False)) as interruption,
            pytest.raises(UserError, match="checkpoint-4 is damaged"),
        ):
            verify_checkpoint(run / "checkpoint-4")
        if not interruption.has_happened:
            break
    assert number > 5
