"""Locks of torch's compiler: abandoned ones are removed, others are waited for and reported."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from blockft.training import compiler_lock
from blockft.training.compiler_lock import watch_compiler_locks

OWNER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("compiling", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("try_acquire", "release"):  # restored afterwards
        monkeypatch.setattr(FileBaton, name, getattr(FileBaton, name))
    watch_compiler_locks()
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    return folder / "lock"


def start_owner(lock: Path) -> subprocess.Popen[bytes]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, lock], stdout=subprocess.PIPE)
    assert owner.stdout and owner.stdout.readline() == b"compiling\n"
    return owner


def report_to_event(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event that is set when a lock has been reported on stderr."""
    has_reported, notify = threading.Event(), compiler_lock.notify

    def notify_and_tell(message: str) -> None:
        notify(message)
        has_reported.set()

    monkeypatch.setattr(compiler_lock, "notify", notify_and_tell)
    return has_reported


def test_the_lock_of_a_killed_process_is_removed(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = start_owner(lock)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    baton = FileBaton(str(lock))
    assert baton.try_acquire() and lock.exists()
    assert f"blockft: removed {lock}, left by a process that was killed" in capsys.readouterr().err
    baton.release()
    assert not lock.exists()


def test_a_living_process_is_waited_for_and_reported(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_lock, "REPORT_AFTER_S", 0.3)
    has_reported = report_to_event(monkeypatch)
    owner, baton = start_owner(lock), FileBaton(str(lock))
    waiter = threading.Thread(target=baton.try_acquire)
    waiter.start()
    assert has_reported.wait(600)
    time.sleep(0.5)  # there is no second report
    assert waiter.is_alive() and lock.exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert (
        f"waiting for the process that compiles cpu_adam: if no other training is starting, delete {lock}"
        in message
    )
    owner.kill()
    owner.wait()
    waiter.join(timeout=600)
    assert baton.fd is not None and "removed" in capsys.readouterr().err
    baton.release()


def test_without_leases_only_an_old_lock_that_nobody_has_open_is_abandoned(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS the owner may be on another host."""

    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(compiler_lock.fcntl, "fcntl", refuse)
    owner = start_owner(lock)
    assert not compiler_lock._is_abandoned(lock)
    os.utime(lock, (0, 0))
    assert not compiler_lock._is_abandoned(lock)
    owner.kill()
    owner.wait()
    assert compiler_lock._is_abandoned(lock)
    os.utime(lock)
    assert not compiler_lock._is_abandoned(lock)


def compile_once(lock: Path, log: Path) -> None:
    watch_compiler_locks()
    baton = FileBaton(str(lock), wait_seconds=0.01)
    assert baton.try_acquire()
    with log.open("a") as lines:
        lines.write("start\n")
        lines.flush()
        time.sleep(0.02)
        lines.write("end\n")
    baton.release()


def test_ranks_that_find_an_abandoned_lock_compile_one_after_the_other(lock: Path, tmp_path: Path) -> None:
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    for _ in range(5):
        lock.touch()
        ranks = [context.Process(target=compile_once, args=(lock, log), daemon=True) for _ in range(4)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(600)
            assert rank.exitcode == 0
    assert log.read_text() == "start\nend\n" * 20 and not lock.exists()


def test_a_slow_compilation_of_this_process_is_reported(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_lock, "REPORT_AFTER_S", 0.1)
    has_reported, baton = report_to_event(monkeypatch), FileBaton(str(lock))
    assert baton.try_acquire()
    assert has_reported.wait(600)
    baton.release()
    assert "blockft: compiling cpu_adam, which takes" in capsys.readouterr().err


def test_a_compilation_that_has_ended_is_not_reported(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_lock, "REPORT_AFTER_S", 3600)
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    timer = compiler_lock._timers[str(lock)]
    baton.release()
    timer.join(600)
    assert not timer.is_alive() and capsys.readouterr().err == ""


def test_an_owner_has_its_lock_open_until_it_is_removed(lock: Path) -> None:
    """Otherwise another process would remove it as abandoned, and the owner that of a third one."""
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert not compiler_lock._is_abandoned(lock)
    descriptor = baton.fd
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "close", lambda closed: pytest.fail("closed first") if lock.exists() else None)
        baton.release()
    assert descriptor is not None and baton.fd is None and not lock.exists()
    os.close(descriptor)
