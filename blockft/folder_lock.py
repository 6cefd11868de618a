"""Locks of folders: one writer, or any number of readers; a lock ends with the processes that hold it.

The lock of the folder NAME is the file `.NAME.lock` beside it, because the folder itself may not exist yet or
may be replaced. Folders are compared by what their paths resolve to. The file names its holder, for the
message of whoever is refused; the lock itself is made with flock, so a file that a killed process left behind
locks nothing.

On one host, also between containers that share the folder, a lock is exact. On NFS Linux turns it into a lock
of the server, which ends when the server learns that the holder's host is gone; this needs NFSv4, or NFSv3
with its lock daemon. With the mount options `nolock` and `local_lock` a lock holds within one host only. A
file system without locks, such as Lustre mounted without `flock`, is refused for writing.
The folder above must be shared, too: containers that mount nothing but NAME do not see each other's locks.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from blockft.errors import UserError

_MAX_ATTEMPTS = 1000
"""How often the creation of a lock file is tried while other processes remove its folder."""

_HOLDER_S = 1.0
"""How long the name of a holder is waited for, which it writes just after it has taken the lock. A reader
also waits so long for another one that ends, which holds the lock alone for a moment."""

_NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class FolderInUse(UserError):
    """Another process holds the lock of a folder."""


_descriptors: set[int] = set()
"""The descriptors of all locks of this process."""


def _close_in_child() -> None:
    """Close the locks that a forked child inherited: otherwise they would outlive their process."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


class FolderLock:
    """The lock of a folder, held until `release` or the end of this process.

    `folder` is the resolved path. `action` is what this process does, for example "blockft train".

    Raises:
        FolderInUse: another process holds the lock.
        UserError: the lock file cannot be written.
    """

    def __init__(self, folder: Path, action: str, *, shared: bool = False) -> None:
        self._name, self._action, self._process = folder, action, os.getpid()
        self._created: list[Path] = []
        try:
            self.folder = Path(os.path.realpath(folder))
            self._file = self.folder.with_name(f".{self.folder.name}.lock")
            self._descriptor = self._take(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except BlockingIOError:
            message = self._describe_holder()
            self._remove_created()
            raise FolderInUse(message) from None
        except (OSError, ValueError) as error:
            self._remove_created()
            raise UserError(f"{folder} cannot be written: {_describe_error(error)}") from error
        _descriptors.add(self._descriptor)

    def _take(self, kind: int) -> int:
        """Return the descriptor of the locked lock file.

        Raises:
            BlockingIOError: another process holds the lock.
        """
        deadline = time.monotonic() + _HOLDER_S
        for attempt in count():
            try:
                descriptor = self._open()
            except (FileNotFoundError, FileExistsError):
                # processes that end remove the folders that they created; /proc takes no files at all
                if attempt == _MAX_ATTEMPTS:
                    raise
                continue
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    # otherwise its last holder has removed the file before it was locked here
                    if os.path.samestat(os.fstat(descriptor), os.stat(self._file)):
                        return descriptor
            except BaseException as error:
                os.close(descriptor)
                is_reader_refused = isinstance(error, BlockingIOError) and kind == fcntl.LOCK_SH
                if not is_reader_refused or self._is_written() or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
                continue
            os.close(descriptor)
        raise AssertionError

    def _open(self) -> int:
        """Return the descriptor of the lock file, which is created with the folders above it.

        Raises:
            FileNotFoundError, FileExistsError: a folder was removed meanwhile, or cannot be created.
        """
        self._create_parents()
        try:
            return os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if self._file.exists():
                return os.open(self._file, os.O_RDONLY)  # the file of another user can be locked, too
            # that file may have been removed just now
            return os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)

    def _create_parents(self) -> None:
        parent = self.folder.parent
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self._created = [*self._created, *missing]

    def _remove_created(self) -> None:
        for folder in self._created:
            with suppress(OSError):  # it holds files by now
                folder.rmdir()

    def write_holder(self, use: str) -> None:
        """Write into the lock file who uses the folder. `use` is "written" or "read"."""
        holder = {
            "use": use,
            "process": self._process,
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M"),
            "command": self._action,
        }
        with suppress(OSError):  # a full disk, or the file of another user: the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{json.dumps(holder)}\n".encode(), 0)

    def _describe_holder(self) -> str:
        """Return a message about the process that holds the lock."""
        use, deadline = self._read_holder(), time.monotonic() + _HOLDER_S
        # a holder that ends removes the file
        while use is None and self._file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
            use = self._read_holder()
        return f"{self._name} is {use or 'in use by another process'}: wait for it, or choose another folder"

    def _read_holder(self) -> str | None:
        """Return what the holder of the lock does; None if the lock file does not say it."""
        try:
            holder = json.loads(self._file.read_text(encoding="utf-8"))
            return (
                f"being {holder['use']} by process {holder['process']} on host {holder['host']} since "
                f"{holder['since']} ({holder['command']})"
            )
        except (OSError, ValueError, TypeError, KeyError):  # its holder is just writing it
            return None

    def _is_written(self) -> bool:
        """Return whether the lock file says that its holder writes the folder."""
        return (self._read_holder() or "").startswith("being written")

    def share(self) -> None:
        """Let other processes take the lock with `shared`, for example the other ranks of a run.

        Raises:
            FolderInUse: another process took the lock in this moment, because flock first gives it up.
        """
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(self._describe_holder()) from None

    def release(self) -> bool:
        """Give up the lock, and remove its file if no other process holds it. Return whether none does.

        A lock that was inherited from another process is not touched.
        """
        if self._descriptor not in _descriptors or self._process != os.getpid():
            return False
        is_last = False
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_last = True
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self._file)):
                self._file.unlink()
        _descriptors.remove(
            self._descriptor
        )  # once it is closed, a lock of another thread may get its number
        os.close(self._descriptor)
        self._descriptor = -1  # another lock may get the same number
        self._remove_created()
        return is_last


def _describe_error(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        if error.errno in _NOT_SUPPORTED:
            return f"its file system has no locks ({error.strerror}): choose a folder on another one"
        return error.strerror or str(error)
    return str(error)


@contextmanager
def lock_folder(folder: Path, action: str) -> Iterator[FolderLock]:
    """Hold the lock of a folder as its only writer; folders above it are created, and removed if unused.

    Raises:
        FolderInUse: another process reads or writes the folder.
        UserError: the lock file cannot be written.
    """
    lock = FolderLock(folder, action)
    try:
        lock.write_holder("written")
        yield lock
    finally:
        lock.release()


@contextmanager
def reading_folder(folder: Path, action: str) -> Iterator[None]:
    """Keep writers away from a folder that is being read.

    A folder that does not exist is read without a lock. So is one whose lock cannot be taken: on a full or
    read-only disk, or on a file system without locks. Its owner then has to know who reads it.

    Raises:
        FolderInUse: another process writes the folder.
    """
    if not Path(os.path.realpath(folder)).parent.is_dir():
        yield
        return
    try:
        lock = FolderLock(folder, action, shared=True)
    except FolderInUse:
        raise
    except UserError:
        yield
        return
    try:
        lock.write_holder("read")
        yield
    finally:
        lock.release()


def remove_unused_locks(parent: Path, pattern: str) -> None:
    """Remove the lock files that killed processes left of the folders in `parent` that match a glob."""
    for file in parent.glob(f".{pattern}.lock"):
        folder = parent / file.name.removeprefix(".").removesuffix(".lock")
        # a lock file that no other process holds is removed when its lock is released
        with suppress(FolderInUse), reading_folder(folder, "blockft"):
            pass
