"""Output folders and files that appear complete or not at all."""

import ctypes
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from blockft.digest import DamagedFile, dump_with_digest, read_with_digest
from blockft.errors import RankError, UserError, warn
from blockft.folder_lock import FolderLock, lock_folder
from blockft.printable import printable

TEMPORARY = ".draft"
"""Suffix of the hidden folder or file in which an output is written; see `temporary_path`."""

_TOKEN_BYTES = 8
"""Number of random bytes in the name of a temporary path."""

_TOKEN = "[0-9a-f]" * (2 * _TOKEN_BYTES)
"""Pattern of these random bytes."""

OLD = ".old"
"""Further suffix of the hidden folder to which a replaced folder is moved."""

PARTIAL = ".partial"
"""Suffix of the hidden folder in which a resumable folder is written.

As a further suffix of a temporary path: a resumable folder that is of no use once the output is complete."""

SIGNATURE = "signature.json"
"""File of a resumable folder: the settings that decide its content."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_TORCH_WRITE_ERRORS = ("PytorchStreamWriter failed writing", "iostream error", "unexpected pos ")
"""Texts of the errors of torch.save, which does not say why a file cannot be written."""

_NO_REPLACE, _EXCHANGE = 1, 2
"""Flags of renameat2, see its manual page."""


class SharedWriteError(OSError):
    """A write error of one rank of a run that all ranks raise together."""


@dataclass(frozen=True)
class LockedFolder:
    """An output folder that no other process writes.

    name: the path as the user gave it, for messages.
    path: the resolved path.
    """

    name: Path
    path: Path
    lock: FolderLock
    initial: int | None
    """A descriptor of what was at the path when the folder was locked, or None if nothing was.

    While it is open, no other file or folder gets the same inode."""

    def is_initial(self, path: Path) -> bool:
        """Return whether `path` is what was there when the folder was locked."""
        return self.initial is not None and os.path.samestat(os.fstat(self.initial), path.lstat())


@contextmanager
def lock_output_folder(out: Path, action: str) -> Iterator[LockedFolder]:
    """Lock an output folder as its only writer, and remove what killed writers left beside it.

    `action` names this process for those that are refused, for example "blockft prepare".

    Raises:
        UserError: another process reads or writes the folder, or it cannot be written.
    """
    with lock_folder(out, action) as lock:
        path = lock.folder
        initial = None
        try:
            _remove_remains(path)
            with suppress(FileNotFoundError):
                initial = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error
        try:
            yield LockedFolder(out, path, lock, initial)
        finally:
            if initial is not None:
                os.close(initial)


def check_absent(path: Path, remedy: str) -> None:
    """Check that `path` does not exist.

    Raises:
        UserError: `path` exists; the message ends in `remedy`.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is never overwritten: {remedy}")


@contextmanager
def atomic_folder(out: LockedFolder, partial: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder and rename it to `out` at the end; on an error nothing is left.

    The temporary folder is hidden and lies beside `out`, so that the rename is atomic. It replaces what was
    at `out` when `out` was locked, and nothing else.

    partial: a folder of `resumable_folder`, which is removed as soon as `out` is complete.

    Raises:
        UserError: the disk is full, the folder cannot be written, or `out` was created or replaced in the
            meantime.
    """
    temporary = temporary_path(out.path)
    try:
        with write_errors(temporary, name=out.name, remedy=lambda: f"nothing was written to {out.name}"):
            temporary.mkdir()
            yield temporary
            apply_umask(temporary)
            with _removed_at_end(partial, out.path) if partial else nullcontext():
                _move_into_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _removed_at_end(partial: Path, path: Path) -> Iterator[None]:
    """Remove a resumable folder of `path` at the end; on an error it stays."""
    # if this process is killed now, the next writer moves it back, or removes it if `path` is complete
    moved = Path(f"{temporary_path(path)}{PARTIAL}")
    with suppress(FileNotFoundError):  # a user has removed it; the output does not need it any more
        partial.rename(moved)
    try:
        yield
    except BaseException:
        with suppress(FileNotFoundError):
            moved.rename(partial)
        raise
    shutil.rmtree(moved, ignore_errors=True)


def _move_into_place(temporary: Path, out: LockedFolder) -> None:
    """Rename a folder to `out`, where only the initial folder may be, which is removed."""
    try:
        try:
            is_moved = _move_if_allowed(temporary, out)
        except FileNotFoundError:  # another process has removed the initial folder just now
            is_moved = _move_if_allowed(temporary, out)
    except OSError as error:
        raise UserError(f"{out.name} cannot be written: {error.strerror}") from error
    if not is_moved:
        raise UserError(
            f"{out.name} was created by another process in the meantime, so nothing was written: choose "
            "another folder"
        )


def _move_if_allowed(temporary: Path, out: LockedFolder) -> bool:
    """Rename a folder to `out` unless something else than the initial folder is there."""
    if not os.path.lexists(out.path):
        try:
            if not _renameat2(temporary, out.path, _NO_REPLACE):
                temporary.rename(out.path)
        except FileExistsError:
            return False
        return True
    if not out.is_initial(out.path):
        return False
    if not _renameat2(temporary, out.path, _EXCHANGE):
        old = temporary.with_name(f"{temporary.name}{OLD}")
        out.path.rename(old)  # if this process is killed now, the next writer moves it back
        temporary.rename(out.path)
        shutil.rmtree(old, ignore_errors=True)
        return True
    if out.is_initial(temporary):
        return True
    _renameat2(temporary, out.path, _EXCHANGE)  # it was replaced between the two checks
    return False


def temporary_path(path: Path) -> Path:
    """Return a new path beside `path`, for what is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}{TEMPORARY}")


def _find_temporary(path: Path, suffix: str = TEMPORARY) -> list[Path]:
    """Return the paths beside `path` that `temporary_path` gave for it."""
    # any other text would also match the temporary files of `model.v2`, when `model` is written
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.{_TOKEN}{suffix}"))


def remove_temporary_files(folder: Path) -> None:
    """Delete the files that writers which were killed left in a folder. The caller must own the folder."""
    for path in folder.glob(f".*.{_TOKEN}{TEMPORARY}"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags of Linux; return False if the file system or the system does not know them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here = -100  # AT_FDCWD: paths are relative to the working directory
    if not libc.renameat2(here, os.fsencode(source), here, os.fsencode(target), flags):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def _remove_remains(path: Path) -> None:
    """Remove the temporary folders of killed writers of `path`, which this process has locked.

    A writer that was killed while it replaced `path` has moved the old folder away: it is moved back. So is
    the resumable folder of a writer that was killed before `path` was complete.
    """
    for old in _find_temporary(path, TEMPORARY + OLD):
        if not os.path.lexists(path):
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    for moved in _find_temporary(path, TEMPORARY + PARTIAL):
        if not os.path.lexists(path):
            moved.rename(_partial_path(path))
        shutil.rmtree(moved, ignore_errors=True)
    for temporary in _find_temporary(path):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(folder: Path, *, name: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """Turn errors of writing below `folder` into a message about `name`, with a remedy for a full disk.

    Raises:
        UserError: the disk is full, or a file below `folder` cannot be written. It is a RankError if other
            ranks of the run do not know of it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        kind = UserError if isinstance(error, SharedWriteError) else RankError
        if is_disk_full(error):
            raise kind(
                f"the disk is full, or a quota or a limit of the size of files is reached: {remedy()}"
            ) from error
        if isinstance(error, OSError) and _is_below(error.filename, folder):
            raise kind(f"{name} cannot be written: {error.strerror} ({error.filename})") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or the one that caused it, says that a file cannot grow."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    text = str(error)
    # safetensors gives the number of the system's error only in the text of the message
    if isinstance(error, SafetensorError) and any(f"(os error {number})" in text for number in _DISK_FULL):
        return True
    if isinstance(error, RuntimeError) and any(message in text for message in _TORCH_WRITE_ERRORS):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_disk_full(cause)


def _is_below(filename: object, folder: Path) -> bool:
    return isinstance(filename, str | os.PathLike) and Path(filename).absolute().is_relative_to(
        folder.absolute()
    )


def apply_umask(folder: Path) -> None:
    """Give the files in a folder the permissions that the folder got from the umask.

    safetensors creates files that only their owner can read.
    """
    permissions = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | permissions)


@contextmanager
def resumable_folder(out: LockedFolder, signature: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a hidden folder beside `out` that survives an interruption; the same call finds it again.

    `signature` holds every setting that decides what is written there. The folder stays until `atomic_folder`
    has completed `out`.

    Raises:
        UserError: the folder has another signature or files without one, or it cannot be written.
    """
    partial = _partial_path(out.path)
    remedy = f"free some space, then resume {out.name} with the same command"
    with write_errors(partial, name=out.name, remedy=lambda: remedy):
        partial.mkdir(exist_ok=True)
        _check_signature(partial, json.loads(json.dumps(dict(signature))))
        yield partial


def restore_resumable_folder(partial: Path, signature: Mapping[str, Any]) -> None:
    """Create a folder of `resumable_folder` again, without its files, if a user has removed it meanwhile.

    Raises:
        OSError: it cannot be created.
        UserError: its signature cannot be written.
    """
    if not (partial / SIGNATURE).is_file():
        warn(f"{partial} was removed by another process: it is written again")
        partial.mkdir(exist_ok=True)
        write_atomic(partial / SIGNATURE, dump_with_digest(json.loads(json.dumps(dict(signature)))))


def _partial_path(path: Path) -> Path:
    """Return the path of the resumable folder of `path`."""
    return path.with_name(f".{path.name}{PARTIAL}")


def _check_signature(partial: Path, expected: dict[str, Any]) -> None:
    """Write the signature of a resumable folder, or compare it with the one that is there."""
    if (partial / SIGNATURE).is_file():
        found = _read_signature(partial)
        for name in expected | found:
            if expected.get(name) != found.get(name):
                raise UserError(
                    f"{partial} was started with other settings ({name}: {found.get(name)}, not "
                    f"{expected.get(name)}): resume with the settings it was started with, choose "
                    "another folder, or remove it to start again"
                )
        return
    if any(not path.name.startswith(f".{SIGNATURE}") for path in partial.iterdir()):
        raise UserError(
            f"{partial} holds files but no {SIGNATURE}, so their settings are unknown: remove the "
            "folder to start again"
        )
    write_atomic(partial / SIGNATURE, dump_with_digest(expected))


def _read_signature(partial: Path) -> dict[str, Any]:
    try:
        return read_with_digest(partial / SIGNATURE)
    except DamagedFile as error:
        raise UserError(f"{partial} is damaged ({error}): remove the folder to start again") from error


def check_writable(path: Path) -> None:
    """Check before long work that a file can be written or replaced.

    Raises:
        UserError: `path` is a folder or a device, or its folder is missing or not writable.
    """
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise UserError(f"{path} cannot be written: it is {kind}")
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} cannot be written: it is a symbolic link that leads nowhere")
        if not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    """Yield a hidden file beside `path` and rename it to `path` at the end; on an error nothing is left.

    Two processes that write `path` at once leave one of the two files, complete. Files that killed processes
    left are removed.
    """
    temporary = None
    try:
        temporary, lock = _create_temporary_file(path)
        with lock:
            yield temporary
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        if temporary:
            with suppress(OSError):
                temporary.unlink()


def _create_temporary_file(path: Path) -> tuple[Path, BinaryIO]:
    """Create a hidden file beside `path`; return its path, and it opened and locked.

    The lock says that the writer is alive.
    """
    while True:
        temporary = temporary_path(path)
        file = temporary.open("xb")
        fcntl.flock(file, fcntl.LOCK_SH)
        _remove_abandoned_files(path)
        # another process may have removed the file before it was locked
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()


def _remove_abandoned_files(path: Path) -> None:
    for temporary in _find_temporary(path):
        # OSError: its writer is alive or has just ended, or it belongs to another user
        with suppress(OSError), temporary.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old file or the new one.

    Raises:
        UserError: the file cannot be written.
    """
    with _atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain_label(text: str) -> str:
    """Return a text for a label or a title of a picture. Matplotlib would read $...$ as a formula."""
    return printable(text).replace("$", r"\$")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, atomically.

    Raises:
        UserError: see `check_writable`.
    """
    check_writable(path)
    with _atomic_file(path) as temporary, warnings.catch_warnings():
        # a name in a script that matplotlib's font lacks is drawn as boxes
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure.savefig(temporary, dpi=120, format="png")
