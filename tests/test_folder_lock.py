"""Locks of folders: one writer or many readers, released by the death of their holder."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from blockft import folder_lock
from blockft.errors import UserError
from blockft.folder_lock import FolderInUse, FolderLock, lock_folder, reading_folder
from tests.commands import TIMEOUT_S
from tests.faults.interruption import Interruption

FORKED = """
import os, sys, time
from pathlib import Path
from blockft.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), "blockft test"):
    if not os.fork():  # the child closes the lock before it runs on
        print("forked", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is refused does not wait for the name of the holder."""
    monkeypatch.setattr(folder_lock, "_HOLDER_S", 0)


def try_to_lock(folder: Path) -> None:
    with lock_folder(folder, "blockft test"):
        pass


def test_readers_share_a_folder_and_a_writer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with reading_folder(folder, "blockft train"), reading_folder(folder, "blockft export"):
        with pytest.raises(FolderInUse, match=f"being read by process {os.getpid()} .*blockft export"):
            try_to_lock(folder)
        assert [path.name for path in tmp_path.iterdir()] == [".folder.lock"]
    with (
        lock_folder(folder, "blockft prepare"),
        pytest.raises(FolderInUse, match="being written by .*blockft prepare"),
        reading_folder(folder, "blockft train"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_reader_waits_for_another_one_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that ends holds the lock alone for a moment, as a writer does."""
    monkeypatch.setattr(folder_lock, "_HOLDER_S", 600)
    ending = FolderLock(tmp_path / "folder", "blockft train")
    ending.write_holder("read")
    end = threading.Timer(0.1, ending.release)
    end.start()
    with reading_folder(tmp_path / "folder", "blockft inspect"):
        end.join()
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_parent_is_read_without_a_lock(tmp_path: Path) -> None:
    with reading_folder(tmp_path / "none" / "folder", "blockft train"):
        assert not list(tmp_path.iterdir())


def test_a_lock_ends_with_its_process_even_if_children_live_on(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    holder = subprocess.Popen(
        [sys.executable, "-c", FORKED, folder], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout and holder.stdout.readline() == b"forked\n"
        with pytest.raises(FolderInUse):
            try_to_lock(folder)
        holder.kill()
        holder.wait()
        assert (tmp_path / ".folder.lock").exists()
        try_to_lock(folder)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_ranks_share_the_lock_of_the_first_and_the_last_one_removes_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with lock_folder(folder, "blockft train") as first:
        first.share()
        other = FolderLock(folder, "blockft train", shared=True)
        with pytest.raises(FolderInUse, match=f"being written by process {os.getpid()}"):
            try_to_lock(folder)
    with pytest.raises(FolderInUse):
        try_to_lock(folder)
    assert other.release() and not list(tmp_path.iterdir())
    assert not other.release()


def compete(folder: Path, counter: Path, rounds: int) -> None:
    """Count with a counter that loses counts if two processes use it at once."""
    while rounds:
        try:
            with lock_folder(folder, "blockft test"):
                number = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(number + 1))
            rounds -= 1
        except FolderInUse:
            time.sleep(0.001)


def test_no_two_processes_hold_a_lock_whose_file_comes_and_goes(tmp_path: Path) -> None:
    """Also the folders above the lock come and go."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "new" / "deep" / "folder", counter, 50)
    processes = [context.Process(target=compete, args=arguments, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    assert counter.read_text() == "200"
    assert not list(tmp_path.rglob(".*.lock"))


class Other:
    """Another process: its lock of a folder comes and goes, comes and stays, or was there and goes."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._lock = FolderLock(folder, "blockft test") if kind == "was there and goes" else None

    def act(self) -> None:
        with suppress(FolderInUse):
            if self._lock is None:
                self._lock = FolderLock(self._folder, "blockft test")
            if self._kind != "comes and stays":
                self.end()

    def end(self) -> None:
        if self._lock:
            self._lock.release()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["comes and goes", "comes and stays", "was there and goes"])
def test_another_process_between_any_two_steps_of_a_lock(kind: str, shared: bool, tmp_path: Path) -> None:
    """The lock is taken or refused as in use; no file of it is left."""
    outcomes = set()
    for number in count():
        root = tmp_path / str(number)
        root.mkdir()
        folder = root / "new" / "deep" / "folder"
        other = Other(folder, kind)
        with Interruption(number, other.act) as interruption:
            try:
                lock = FolderLock(folder, "blockft test", shared=shared)
            except FolderInUse:
                outcomes.add("refused")
            else:
                outcomes.add("taken")
                with pytest.raises(FolderInUse):
                    try_to_lock(folder)
                lock.release()
        other.end()
        assert not [path for path in root.rglob("*") if not path.is_dir()]
        if not interruption.has_happened:
            break
    assert number > 10
    assert outcomes == ({"taken"} if kind == "comes and goes" else {"taken", "refused"})


def test_a_holder_that_has_not_written_its_name_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_HOLDER_S", 600)
    lock = FolderLock(tmp_path / "folder", "blockft test")
    writer = threading.Timer(0.1, lock.write_holder, ["written"])
    writer.start()
    with pytest.raises(FolderInUse, match=f"being written by process {os.getpid()} .*blockft test"):
        try_to_lock(tmp_path / "folder")
    writer.join()
    lock.release()


@pytest.mark.usefixtures("impatient")
def test_a_lock_without_a_readable_holder_is_refused_without_details(tmp_path: Path) -> None:
    for content in ("", "{", "[]", '{"use": "written"}'):
        with lock_folder(tmp_path / "folder", "blockft test"):
            (tmp_path / ".folder.lock").write_text(content)
            with pytest.raises(UserError, match="is in use by another process: wait for it"):
                try_to_lock(tmp_path / "folder")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOSPC, errno.EROFS])
def test_a_folder_is_read_where_no_lock_can_be_made_and_is_not_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with reading_folder(tmp_path / "folder", "blockft train"):
        pass
    with pytest.raises(UserError, match=f"folder cannot be written: .*{os.strerror(number)}"):
        try_to_lock(tmp_path / "folder")


def test_a_folder_without_permission_to_write_is_refused_with_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def open_for_reading(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, flags, mode)

    monkeypatch.setattr(os, "open", open_for_reading)
    with pytest.raises(UserError, match="folder cannot be written: Permission denied"):
        try_to_lock(tmp_path / "folder")
    # the lock file of another user
    (tmp_path / ".folder.lock").write_text("")
    try_to_lock(tmp_path / "folder")


def test_the_lock_file_of_another_user_is_removed_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file, lock_file = os.open, tmp_path / ".folder.lock"

    def open_own_file(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and lock_file.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, flags, mode)

    for number in count():
        lock_file.touch()
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", open_own_file)
            with Interruption(number, partial(lock_file.unlink, missing_ok=True)) as interruption:
                try_to_lock(tmp_path / "folder")
        if not interruption.has_happened:
            break
    assert number > 5
