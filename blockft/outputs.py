"""Output folders that appear whole or not at all, and the files of a run's folder."""

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from blockft.errors import UserError

RECIPE, DATA, METRICS, LOSS_PLOT = "recipe.yaml", "data.json", "metrics.jsonl", "loss.png"
"""A run's recipe with every setting, its data's manifest, a line per logged step, a picture of its loss."""

TEMPORARY, PARTIAL = ".draft", ".partial"
"""How the hidden names of unfinished folders end, of those that begin anew and those that go on."""

SIGNATURE = "facts.json"
"""In a folder that goes on: what decides its content."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_absent(out: Path, remedy: str) -> None:
    """Raises:
    UserError: there is something at `out` already.
    """
    if out.exists():
        raise UserError(f"{out} exists already and is never overwritten: {remedy}")


@contextmanager
def atomic_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, renamed to `out` at the end; on any error nothing is left.

    It lies beside `out` under a hidden name, so the rename is atomic, and what a process that was killed left
    there is removed. With `replace` an `out` that exists makes way at the end.

    Raises:
        UserError: the disk is full, the folder cannot be written, or `out` has come to exist.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=TEMPORARY, dir=out.parent))
        lock = _lock(draft)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield draft
        draft.chmod(0o755)
        old = draft.with_name(f"{draft.name}.old")
        if replace and out.exists():
            out.rename(old)
        check_absent(out, "something else wrote it meanwhile")
        draft.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise UserError(f"the disk is full: nothing was written to {out}") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


@contextmanager
def resumable_folder(out: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A hidden folder beside `out` that outlives a kill and is found again by who makes the same of the same.

    `facts` are everything that decides what is written there. At the end, when `out` is whole, the folder is
    removed; on any error it stays.

    Raises:
        UserError: it was begun with other facts, another process is at work on it, or it cannot be written.
    """
    partial = out.with_name(f".{out.name}{PARTIAL}")
    asked = json.loads(json.dumps(dict(facts)))
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
            for name in asked | found:
                if asked.get(name) != found.get(name):
                    raise UserError(
                        f"{partial} was begun otherwise ({name}: {found.get(name)}, not {asked.get(name)}): "
                        "go on as it was begun, choose another folder, or remove it to begin anew"
                    )
        else:
            write_atomic(partial / SIGNATURE, json.dumps(asked, indent=2) + "\n")
        yield partial
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if _is_disk_full(error):
            raise UserError(
                f"the disk is full: make room, and go on with {out} by the same command"
            ) from error
        raise
    finally:
        os.close(lock)


def _read_signature(partial: Path) -> dict[str, Any]:
    try:
        found = json.loads((partial / SIGNATURE).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{partial / SIGNATURE} is damaged: remove {partial} to begin anew")
    return found


def _lock(draft: Path) -> int:
    """Claim a draft for as long as this process lives.

    Raises:
        BlockingIOError: another process that lives has claimed it.
    """
    handle = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_abandoned(out: Path) -> None:
    for draft in out.parent.glob(f".{glob.escape(out.name)}.*{TEMPORARY}"):
        try:
            lock = _lock(draft)
        except OSError:
            continue
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    # safetensors tells the number of the system's error in its text alone
    return any(f"(os error {number})" in str(error) for number in _DISK_FULL)


def check_writable(path: Path) -> None:
    """Find out before long work whether a file can be written, or replaced.

    Raises:
        UserError: a folder or a device is there, or its folder is missing or takes no files.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} cannot be written: it is {'a folder' if path.is_dir() else 'no file'}")
        if not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` that takes its place at the end; on any error nothing is left."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            draft.unlink()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old one or the new one.

    Raises:
        UserError: it cannot be written.
    """
    with _atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, one per logged step or evaluation; not one cut short by a kill."""
    with (run / METRICS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_metrics(run: Path, last_step: int, *, eval_due: bool) -> None:
    """Drop what will be logged again: what came after `last_step`, a line cut short by a kill, and the
    evaluation at `last_step` if it is due."""
    kept = [
        line
        for line in read_metrics(run)
        if line["step"] < last_step or (line["step"] == last_step and ("loss" in line or not eval_due))
    ]
    write_atomic(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, atomically.

    Raises:
        UserError: see `check_file`.
    """
    check_writable(path)
    with _atomic_file(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
