"""Locks of torch's compiler: remove abandoned ones, and say which lock is waited for.

DeepSpeed compiles its operators through torch, which creates the file `lock` in the operator's folder and
removes it at the end. A process that is killed while it compiles leaves the file, and torch would wait for
its removal forever, without a message. The owner keeps the file open while it compiles. Linux grants a write
lease on a file only if no process of the host has it open, in any container, so a lease that is granted says
that the owner is dead.
"""

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.file_baton import FileBaton

from blockft.errors import notify
from blockft.printable import print_text

REPORT_AFTER_S = 3
"""A lock is reported if it is waited for longer than this: an operator that is compiled takes a second."""

UNDECIDED_S = 600
"""Age at which a lock that no process here has open is abandoned, on a file system that grants no leases."""

_create_lock = FileBaton.try_acquire

_timers: dict[str, threading.Timer] = {}
"""For each lock that this process holds, the timer of the message that it compiles."""


def watch_compiler_locks() -> None:
    """Make torch remove abandoned locks of its compiler in this process, and report the others.

    A compilation that takes longer than `REPORT_AFTER_S` is reported as well.

    Calls can be repeated.
    """
    FileBaton.try_acquire = _acquire  # type: ignore[method-assign]
    FileBaton.release = _release  # type: ignore[method-assign]


def _acquire(self: FileBaton) -> bool:
    """Create the lock file, after waiting for its owner if there is one."""
    path, start, is_reported = Path(self.lock_file_path), time.monotonic(), False
    while not _create_lock(self):
        if _remove_abandoned(path):
            print_text(
                f"blockft: removed {path}, left by a process that was killed while it compiled",
                file=sys.stderr,
            )
        elif not is_reported and time.monotonic() - start > REPORT_AFTER_S:
            is_reported = True
            notify(
                f"waiting for the process that compiles {path.parent.name}: if no other training is "
                f"starting, delete {path}"
            )
        time.sleep(self.wait_seconds)
    message = f"compiling {path.parent.name}, which takes about a minute the first time"
    timer = _timers[self.lock_file_path] = threading.Timer(REPORT_AFTER_S, notify, [message])
    timer.daemon = True
    timer.start()
    return True


def _release(self: FileBaton) -> None:
    """Remove the lock file, and close it afterwards.

    torch closes it first. Another process may then take it for abandoned and remove it, so that this process
    would remove the lock of a third one.
    """
    if timer := _timers.pop(self.lock_file_path, None):
        timer.cancel()
    try:
        os.remove(self.lock_file_path)
    finally:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _remove_abandoned(path: Path) -> bool:
    """Remove a lock file whose owner is dead. Return whether it was removed."""
    # one process at a time: otherwise the second one would remove the new lock of the first one
    with suppress(FileNotFoundError), _guard(path.parent):
        if _is_abandoned(path):
            # an owner without `_release` that has finished closes its file just before it removes it
            time.sleep(0.1)
            if _is_abandoned(path):
                path.unlink()
                return True
    return False


@contextmanager
def _guard(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """Return whether it is certain that no living process owns the lock file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # of another user
        return False
    try:
        # the default signal would end this process if the lease is broken
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True
    except (BlockingIOError, PermissionError):  # a process has it open, or it belongs to another user
        return False
    except OSError:  # a file system without leases, such as NFS
        age_s = time.time() - os.fstat(descriptor).st_mtime
        return age_s > UNDECIDED_S and not _is_open(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _is_open(status: os.stat_result) -> bool:
    """Return whether another process of this host has a file open, as far as this user can see."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        if link.parent.parent.name != str(os.getpid()):
            with suppress(OSError):
                if os.path.samestat(link.stat(), status):
                    return True
    return False
