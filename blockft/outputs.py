"""Output folders and files that appear complete or not at all."""

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from blockft.digest import DamagedFile, dump_with_digest, read_with_digest
from blockft.errors import UserError
from blockft.printable import printable

TEMPORARY = ".draft"
"""Suffix of the hidden folder in which an atomic folder is written."""

PARTIAL = ".partial"
"""Suffix of the hidden folder in which a resumable folder is written."""

SIGNATURE = "signature.json"
"""File of a resumable folder: the settings that decide its content."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_absent(path: Path, remedy: str) -> None:
    """Check that `path` does not exist.

    Raises:
        UserError: `path` exists; the message ends in `remedy`.
    """
    if path.exists():
        raise UserError(f"{path} exists already and is never overwritten: {remedy}")


@contextmanager
def atomic_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder and rename it to `out` at the end; on an error nothing is left.

    The temporary folder is hidden and lies beside `out`, so that the rename is atomic. Temporary folders of
    killed processes are removed. With `replace` an existing `out` is replaced at the end.

    Raises:
        UserError: the disk is full, the folder cannot be written, or `out` was created in the meantime.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}{TEMPORARY}")
        temporary.mkdir()
        lock = _lock(temporary)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        apply_umask(temporary)
        replaced = temporary.with_name(f"{temporary.name}.old")
        if replace and out.exists():
            out.rename(replaced)
        check_absent(out, "another process wrote it in the meantime")
        temporary.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise UserError(f"the disk is full: nothing was written to {out}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def apply_umask(folder: Path) -> None:
    """Give the files in a folder the permissions that the folder got from the umask.

    safetensors creates files that only their owner can read.
    """
    permissions = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | permissions)


@contextmanager
def resumable_folder(out: Path, signature: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a hidden folder beside `out` that survives an interruption; the same call finds it again.

    `signature` holds every setting that decides what is written there. The folder is removed at the end, when
    `out` is complete, and stays on any error.

    Raises:
        UserError: the folder has another signature or files without one, another process writes it, or it
            cannot be written.
    """
    partial = out.with_name(f".{out.name}{PARTIAL}")
    expected = json.loads(json.dumps(dict(signature)))
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
    except BlockingIOError:
        raise UserError(f"another process is writing {out}: wait for it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    try:
        if (partial / SIGNATURE).is_file():
            found = _read_signature(partial)
            for name in expected | found:
                if expected.get(name) != found.get(name):
                    raise UserError(
                        f"{partial} was started with other settings ({name}: {found.get(name)}, not "
                        f"{expected.get(name)}): resume with the settings it was started with, choose "
                        "another folder, or remove it to start again"
                    )
        else:
            if any(not path.name.startswith(f".{SIGNATURE}") for path in partial.iterdir()):
                raise UserError(
                    f"{partial} holds files but no {SIGNATURE}, so their settings are unknown: remove the "
                    "folder to start again"
                )
            write_atomic(partial / SIGNATURE, dump_with_digest(expected))
        yield partial
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if _is_disk_full(error):
            raise UserError(
                f"the disk is full: free some space, then resume {out} with the same command"
            ) from error
        raise
    finally:
        os.close(lock)


def _read_signature(partial: Path) -> dict[str, Any]:
    try:
        return read_with_digest(partial / SIGNATURE)
    except DamagedFile as error:
        raise UserError(f"{partial} is damaged ({error}): remove the folder to start again") from error


def _lock(folder: Path) -> int:
    """Lock a folder for the life of this process and return the lock's file descriptor.

    Raises:
        BlockingIOError: another running process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(out: Path) -> None:
    for temporary in out.parent.glob(f".{glob.escape(out.name)}.*{TEMPORARY}"):
        try:
            lock = _lock(temporary)
        except OSError:
            continue
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    # safetensors gives the number of the system's error only in the text of the message
    return any(f"(os error {number})" in str(error) for number in _DISK_FULL)


def check_writable(path: Path) -> None:
    """Check before long work that a file can be written or replaced.

    Raises:
        UserError: `path` is a folder or a device, or its folder is missing or not writable.
    """
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise UserError(f"{path} cannot be written: it is {kind}")
        if not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    """Yield a hidden file beside `path` and rename it to `path` at the end; on an error nothing is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
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
    with _atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
