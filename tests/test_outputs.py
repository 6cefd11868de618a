"""Output folders and files appear complete or not at all, and only one process writes them."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from blockft import outputs
from blockft.errors import UserError
from blockft.folder_lock import FolderInUse
from blockft.outputs import (
    SIGNATURE,
    atomic_folder,
    check_writable,
    lock_output_folder,
    restore_resumable_folder,
    resumable_folder,
    save_figure,
    write_atomic,
)
from tests.commands import TIMEOUT_S
from tests.faults.interruption import Interruption
from tests.faults.kill_points import KillPoint


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Own a folder and write it atomically, as a command does."""
    with lock_output_folder(out, "blockft test") as locked, atomic_folder(locked) as draft:
        yield draft


@contextmanager
def resuming(out: Path, signature: dict[str, Any]) -> Iterator[Path]:
    """Own a folder and write it so that an interruption can be resumed."""
    with lock_output_folder(out, "blockft test") as locked, resumable_folder(locked, signature) as partial:
        yield partial
        with atomic_folder(locked, partial) as draft:
            (draft / "new").touch()


WRITER = """
import sys, time
from pathlib import Path
from blockft.outputs import atomic_folder, lock_output_folder
with lock_output_folder(Path(sys.argv[1]), "blockft prepare") as out, atomic_folder(out) as draft:
    (draft / "half").touch()
    print("writing", flush=True)
    time.sleep(3600)
"""


def start_writer(out: Path) -> subprocess.Popen[bytes]:
    """Start a process that owns and writes a folder until it is killed."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, out], stdout=subprocess.PIPE)
    assert writer.stdout and writer.stdout.readline() == b"writing\n"
    return writer


def test_a_killed_writer_leaves_nothing_finished_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = start_writer(out)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists() and len(list(tmp_path.iterdir())) == 2  # the draft and the lock
    with writing(out) as draft:
        (draft / "done").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["done"]


def test_a_second_writer_is_refused_however_it_spells_the_path(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    (tmp_path / "link").symlink_to(out)
    writer = start_writer(out)
    try:
        for path in (out, tmp_path / "link", tmp_path / "deep" / "x" / ".." / "out", Path(f"{out}/")):
            message = (
                f"being written by process {writer.pid} on host .* since .* \\(blockft prepare\\): wait for"
            )
            with pytest.raises(FolderInUse, match=message), writing(path):
                pass
        with writing(tmp_path / "deep" / "other") as draft:
            (draft / "done").touch()
    finally:
        writer.kill()
        writer.wait()
    with writing(tmp_path / "link") as draft:
        (draft / "done").touch()
    assert sorted(path.name for path in out.parent.iterdir()) == ["other", "out"]
    assert (out / "done").exists() and (tmp_path / "link").is_symlink()


def test_what_appears_while_a_folder_is_written_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    appearances: dict[str, Callable[[], object]] = {
        "empty": out.mkdir,
        "full": lambda: (out.mkdir(), (out / "precious").touch()),
        "file": lambda: out.write_text("precious"),
        "dangling": lambda: out.symlink_to(tmp_path / "nowhere"),
    }
    for appear in appearances.values():
        with pytest.raises(UserError, match="created by another process in the meantime"), writing(out):
            appear()
        (left,) = tmp_path.iterdir()
        assert left == out
        out.unlink() if out.is_symlink() or out.is_file() else shutil.rmtree(out)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_only_the_folder_that_was_there_at_the_start_is_replaced(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on file systems that cannot exchange two folders, such as NFS."""
    if not can_exchange:
        monkeypatch.setattr(outputs, "_renameat2", lambda *_: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with writing(out) as draft:
        (draft / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]
    with pytest.raises(UserError, match="created by another process in the meantime"), writing(out):
        shutil.rmtree(out)
        out.mkdir()  # the same inode, if the file system gives it again
        (out / "precious").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["precious"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_old_folder_is_removed_between_any_two_steps_of_its_replacement(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written takes its place nevertheless."""
    rename = outputs._renameat2 if can_exchange else lambda *_: False
    for number in count():
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True)
        (out / "old").touch()

        def remove(out: Path = out) -> None:
            if (out / "old").exists():
                shutil.rmtree(out)

        with lock_output_folder(out, "blockft test") as locked, ExitStack() as stack:
            draft = stack.enter_context(atomic_folder(locked))
            (draft / "new").touch()
            with Interruption(number, remove) as interruption:
                monkeypatch.setattr(outputs, "_renameat2", interruption.watch(rename))
                stack.close()
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["new"]
        if not interruption.has_happened:
            break
    assert number > 3


def test_a_folder_that_a_killed_writer_moved_away_comes_back(tmp_path: Path) -> None:
    out, old = tmp_path / "out", tmp_path / f".out.0123456789abcdef{outputs.TEMPORARY}{outputs.OLD}"
    old.mkdir()
    (old / "precious").touch()
    (tmp_path / f".out.0123456789abcdef{outputs.TEMPORARY}").mkdir()
    with pytest.raises(ZeroDivisionError), lock_output_folder(out, "blockft test"):
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "precious").exists()


@pytest.mark.parametrize("name", ["out", "out.v2"])
def test_writers_of_similar_names_do_not_remove_each_others_folders(tmp_path: Path, name: str) -> None:
    (other,) = {"out", "out.v2"} - {name}
    with writing(tmp_path / name) as draft:
        (draft / "half").touch()
        with writing(tmp_path / other) as other_draft:
            (other_draft / "file").touch()
        write_atomic(tmp_path / f"{name}.json", "{}")
        with writing(tmp_path / f"{other}.json"):
            pass
    assert [path.name for path in (tmp_path / name).iterdir()] == ["half"]


def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(UserError, match="cannot be written: "), writing(out):
            pass
    with (
        pytest.raises(UserError, match="cannot be written: No such file"),
        writing(tmp_path / "out") as draft,
    ):
        draft.rename(tmp_path / "moved")
        (draft / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "moved"]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_files_of_an_atomic_folder_follow_the_umask(tmp_path: Path, umask: int, expected: int) -> None:
    """Also those of safetensors, which only their owner could read."""
    out = tmp_path / "out"
    old = os.umask(umask)
    try:
        with writing(out) as draft:
            (draft / "inner").mkdir()
            (draft / "text").write_text("x")
            save_file({"x": np.zeros(1)}, draft / "inner" / "x.safetensors")
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == {expected}
    assert {path.stat().st_mode & 0o777 for path in (out, out / "inner")} == {0o777 & ~umask}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "out") as draft:
        (draft / "half").touch()
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_resumable_folder_is_found_again_by_a_call_with_the_same_signature(tmp_path: Path) -> None:
    out, signature = tmp_path / "deep" / "out", {"model": "m", "limit": 3}
    with pytest.raises(ZeroDivisionError), resuming(out, signature) as partial:
        (partial / "kept").write_text("x")
        with pytest.raises(FolderInUse, match="being written by process"), resuming(out, signature):
            pass
        raise ZeroDivisionError
    with (
        pytest.raises(UserError, match=r"started with other settings \(limit: 3, not 4\)"),
        resuming(out, signature | {"limit": 4}),
    ):
        pass
    with resuming(out, signature) as partial:
        assert (partial / "kept").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_resumable_folder_stays_if_the_output_cannot_be_put_into_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="created by another process"), resuming(out, {}) as partial:
        (partial / "kept").touch()
        out.mkdir()
    with lock_output_folder(out, "blockft test"):
        assert sorted(path.name for path in partial.iterdir()) == ["kept", SIGNATURE]


def test_the_output_is_complete_though_its_resumable_folder_was_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with resuming(out, {}) as partial:
        (partial / "kept").touch()
        shutil.rmtree(partial)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "new").exists()
    other = tmp_path / "other"
    with pytest.raises(UserError, match="created by another process"), resuming(other, {}) as partial:
        shutil.rmtree(partial)
        other.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_resumable_folder_that_was_removed_is_created_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, signature = tmp_path / "out", {"limits": (1, 2)}
    with pytest.raises(ZeroDivisionError), resuming(out, signature) as partial:
        restore_resumable_folder(partial, signature)
        assert capsys.readouterr().err == ""
        shutil.rmtree(partial)
        restore_resumable_folder(partial, signature)
        (partial / "kept").touch()
        raise ZeroDivisionError
    warning = f"{partial} was removed by another process: it is written again"
    assert capsys.readouterr().err == f"blockft: warning: {warning}\n"
    with resuming(out, signature) as partial:
        assert (partial / "kept").exists()


def resume_until(point: KillPoint, out: Path) -> None:
    """Write a resumable folder until this process is killed."""
    point()
    with resuming(out, {}) as partial:
        (partial / "kept").touch()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_resumable_folder_is_kept_or_removed_by_the_next_writer_after_any_kill(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(outputs, "_renameat2", lambda *_: False)
    outcomes = []
    for number in count(1):
        folder, log = tmp_path / f"{number}", tmp_path / f"{number}.log"
        point, out = KillPoint(folder, log, number), folder / "out"
        process = get_context("fork").Process(target=resume_until, args=(point, out), daemon=True)
        process.start()
        process.join(TIMEOUT_S)
        with lock_output_folder(out, "blockft test"):
            pass
        outcomes.append({path.relative_to(folder).as_posix() for path in folder.rglob("*")})
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            break
    complete = [names for names in outcomes if "out" in names]
    kept = [names for names in outcomes if ".out.partial/kept" in names]
    assert len(complete) >= 4 and all(names == {"out", "out/new"} for names in complete)
    assert len(kept) >= 3 and all(".out.partial/signature.json" in names for names in kept)
    assert outcomes == [*outcomes[: -len(complete) - len(kept)], *kept, *complete]


def test_a_resumable_folder_with_a_damaged_signature_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    for damaged in (b"{", b"7", b"\xff"):
        (partial / SIGNATURE).write_bytes(damaged)
        with (
            pytest.raises(
                UserError,
                match=rf"{partial} is damaged \(signature.json .*: remove the folder to start again",
            ),
            resuming(tmp_path / "out", {}),
        ):
            pass
    assert partial.exists()


def test_a_file_that_cannot_be_written_is_refused_before_and_after_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "fifo")
    places = {
        tmp_path: "it is a folder",
        Path("."): "it is a folder",
        tmp_path / "fifo": "it is not a regular file",
        tmp_path / "none" / "file": f"there is no folder {tmp_path / 'none'}",
        tmp_path / "file" / "file": "there is no folder",
        tmp_path / ("x" * 300): "File name too long",
        Path("/proc/file"): "",
    }
    for path, reason in places.items():
        with pytest.raises(UserError, match=f"{path} cannot be written: {reason}"):
            check_writable(path)
        with pytest.raises(UserError, match=f"{path} cannot be written: {reason}"):
            save_figure(Figure(), path)
    for path in (tmp_path / "none" / "file", Path("/proc/file")):
        with pytest.raises(UserError, match=f"{path} cannot be written: "):
            write_atomic(path, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file"]


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    for text in ("old", "new"):
        check_writable(file)
        write_atomic(file, text)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="No space left"):
        patched.setattr(Path, "replace", full_disk)
        write_atomic(file, "newer")
    assert file.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["file"]


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_resumable_folder_with_files_of_unknown_settings_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "answers-block.jsonl").write_text("{}\n")
    with (
        pytest.raises(UserError, match="settings are unknown: remove the folder"),
        resuming(tmp_path / "out", {"model": "m"}),
    ):
        pass
    assert (partial / "answers-block.jsonl").read_text() == "{}\n"


def test_a_resumable_folder_outlives_a_kill_while_its_signature_is_written(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / f".{SIGNATURE}.123").write_text("{")
    with resuming(tmp_path / "out", {"model": "m"}) as folder:
        assert (folder / SIGNATURE).is_file()
