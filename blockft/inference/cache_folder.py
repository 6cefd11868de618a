"""The folder of a block cache on a disk: its files, and how processes share it.

::

    format.json                         the name and version of the format
    .lock                               locked while entries are added or removed; contains their total size
    .tmp/                               files that are being written, each locked by its writer
    <fingerprint>/model.json            the model of the entries in this folder
    <fingerprint>/<digest>.safetensors  an entry

A file is written under a temporary name and then renamed, so that readers see complete files only. The
modification time of an entry is the time of its last use. Locks are made with flock, which works across the
hosts of a network file system (NFSv4).
"""

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from blockft.errors import UserError
from blockft.inference.cache_entry import SUFFIX, VERSION, CacheModel, find_damage

FORMAT, MODEL, LOCK, TEMPORARY = "format.json", "model.json", ".lock", ".tmp"

_MAX_ATTEMPTS = 10

Result = TypeVar("Result")

_FORMAT = {"format": "blockft cache", "version": VERSION}


@dataclass(frozen=True, kw_only=True)
class EntryInfo:
    """The file of an entry. used_at: seconds since the epoch, by the clock of the file system."""

    path: Path
    num_bytes: int
    used_at: float

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the entry's model."""
        return self.path.parent.name


class ByteCount:
    """The total size of all entries, kept in the lock file. A killed process may leave it too high."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def read(self) -> int | None:
        """Return the number of bytes, or None if it was not counted yet."""
        text = os.pread(self._handle, 32, 0)
        return int(text) if text.strip().isdigit() else None

    def write(self, num_bytes: int) -> None:
        """Set the number of bytes."""
        os.pwrite(self._handle, f"{max(num_bytes, 0):<31}\n".encode(), 0)


class CacheFolder:
    """A folder of entries of several models, shared by any number of processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Return whether the folder is a cache.

        Raises:
            UserError: it has other files, or is a cache in another version of the format.
        """
        file = self.path / FORMAT
        try:
            found = _parse(file.read_bytes())
        except FileNotFoundError:
            others = {path.name for path in _list_folder(self.path)} - {LOCK, TEMPORARY}
            if file.exists():  # another process has just created it
                return self.exists()
            if others:
                raise UserError(
                    f"{self.path} has files but no {FORMAT}: give a cache or a new folder"
                ) from None
            return False
        except NotADirectoryError:
            raise UserError(f"{self.path} is not a folder: give a folder") from None
        if found.get("format") != _FORMAT["format"]:
            raise UserError(f"{file} is damaged or not a file of blockft: delete the folder or give another")
        if found != _FORMAT:
            raise UserError(
                f"{self.path} is a block cache of format version {found.get('version')}, this blockft has "
                f"version {VERSION}: delete the folder or give another"
            )
        return True

    def create_model_folder(self, model: CacheModel) -> Path:
        """Return the folder of a model's entries. It is created if it does not exist.

        Raises:
            UserError: see `exists`.
            OSError: the folder cannot be written.
        """
        return retry_while_removed(lambda: self._create_model_folder(model))

    def _create_model_folder(self, model: CacheModel) -> Path:
        """Create the folder of a model once.

        Raises:
            FileNotFoundError, FileExistsError: a folder was removed meanwhile, or cannot be created.
        """
        folder = self.path / model.fingerprint
        if self.exists() and self._read_model(folder) == model:
            return folder
        self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if not self.exists():
                self._write_json(self.path / FORMAT, _FORMAT)
            folder.mkdir(exist_ok=True)
            if self._read_model(folder) != model:
                fields = asdict(model)
                self._write_json(folder / MODEL, fields | {"checksum": _checksum(fields)})
        return folder

    def models(self) -> dict[str, CacheModel]:
        """Return the models by fingerprint.

        A folder without a file of its model and without entries is left out: another process is creating it.

        Raises:
            UserError: the file of a model is missing or damaged.
        """
        models = {}
        for folder in self._model_folders():
            # the first entry is written after the file of its model
            is_new = not (folder / MODEL).exists() and not any(self.entries(folder.name))
            model = self._read_model(folder)
            if model is None and (is_new or not folder.exists()):
                continue
            if model is None:
                raise UserError(
                    f"{folder / MODEL} is missing or damaged: use the cache with its model or delete {folder}"
                )
            models[folder.name] = model
        return models

    def entries(self, fingerprint: str | None = None) -> Iterator[EntryInfo]:
        """Yield every entry, or every entry of one model, in any order."""
        for folder in self._model_folders():
            if fingerprint not in (None, folder.name):
                continue
            try:
                scanned = os.scandir(folder)
            except FileNotFoundError:  # another process has removed it
                continue
            with scanned as files:
                for file in files:
                    if file.name.endswith(SUFFIX):
                        with suppress(FileNotFoundError):  # another process has removed it
                            status = file.stat(follow_symlinks=False)
                            yield EntryInfo(
                                path=Path(file.path), num_bytes=status.st_size, used_at=status.st_mtime
                            )

    @contextmanager
    def locked(self) -> Iterator[ByteCount]:
        """Hold the lock for adding and removing entries. Readers need no lock."""
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield ByteCount(handle)
        finally:
            os.close(handle)

    @contextmanager
    def temporary_file(self) -> Iterator[tuple[Path, BinaryIO]]:
        """Yield a new unbuffered file to write and rename. It is removed if it was not renamed.

        Temporary files of killed processes are removed too.
        """
        (self.path / TEMPORARY).mkdir(exist_ok=True)
        self._remove_abandoned()
        path, file = self._create_temporary()
        try:
            yield path, file
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            file.close()

    def prune(
        self,
        byte_count: ByteCount,
        *,
        max_bytes: int | None = None,
        unused_since: float | None = None,
        fingerprints: Collection[str] | None = None,
    ) -> list[EntryInfo]:
        """Remove entries, the least recently used first, and return the removed ones.

        max_bytes     largest total size of the entries
        unused_since  remove entries that were not used since this time, in seconds since the epoch
        fingerprints  the models that both limits are for; None is all models

        Temporary files of killed processes are removed too. Afterwards `byte_count` is exact.
        """
        self._remove_abandoned()
        all_entries = list(self.entries())
        chosen = [e for e in all_entries if fingerprints is None or e.fingerprint in fingerprints]
        kept_bytes = sum(entry.num_bytes for entry in chosen)
        removed = []
        for entry in sorted(chosen, key=lambda entry: entry.used_at):
            fits = max_bytes is None or kept_bytes <= max_bytes
            if fits and (unused_since is None or entry.used_at >= unused_since):
                break
            entry.path.unlink(missing_ok=True)
            kept_bytes -= entry.num_bytes
            removed.append(entry)
        byte_count.write(sum(e.num_bytes for e in all_entries) - sum(e.num_bytes for e in removed))
        return removed

    def remove_damaged(self, path: Path, model: CacheModel) -> None:
        """Remove an entry that was found damaged, unless another process has replaced it since.

        It is verified again while no process can replace it. A new file may have the inode of the old one.

        Raises:
            OSError: the lock or the entry cannot be written.
        """
        with self.locked() as byte_count, suppress(FileNotFoundError):
            num_bytes = path.stat().st_size
            if find_damage(path, model):
                path.unlink()
                if (used := byte_count.read()) is not None:
                    byte_count.write(used - num_bytes)

    def _model_folders(self) -> list[Path]:
        return sorted(
            folder for folder in _list_folder(self.path) if folder.is_dir() and folder.name != TEMPORARY
        )

    def _read_model(self, folder: Path) -> CacheModel | None:
        """Return the model of a folder, or None if its file is missing, damaged or of another folder."""
        try:
            fields = _parse((folder / MODEL).read_bytes())
        except FileNotFoundError:
            return None
        checksum = fields.pop("checksum", None)
        if checksum != _checksum(fields) or fields["fingerprint"] != folder.name:
            return None
        return CacheModel(**fields)

    def _create_temporary(self) -> tuple[Path, BinaryIO]:
        """Create and lock a temporary file."""
        while True:
            path = self.path / TEMPORARY / secrets.token_hex(8)
            file = path.open("xb", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # another process may have removed the file before it was locked
                if os.fstat(file.fileno()).st_nlink:
                    return path, file
            except BlockingIOError:
                pass
            except BaseException:
                path.unlink(missing_ok=True)
                file.close()
                raise
            file.close()

    def _remove_abandoned(self) -> None:
        """Remove the temporary files of killed processes, which are not locked."""
        for temporary in _list_folder(self.path / TEMPORARY):
            # OSError: its writer is alive, it was renamed, or it belongs to another user
            with suppress(OSError), temporary.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()

    def _write_json(self, path: Path, fields: dict[str, Any]) -> None:
        with self.temporary_file() as (temporary, file):
            file.write((json.dumps(fields, indent=2) + "\n").encode())
            temporary.replace(path)


def retry_while_removed(write: Callable[[], Result]) -> Result:
    """Return what `write` returns; call it again if another process has removed a folder that it needs.

    Raises:
        FileNotFoundError, FileExistsError: it failed each time.
    """
    for _ in range(_MAX_ATTEMPTS - 1):
        with suppress(FileNotFoundError, FileExistsError):
            return write()
    return write()


def _list_folder(folder: Path) -> list[Path]:
    """Return the paths in a folder; none if there is no folder."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _parse(text: bytes) -> dict[str, Any]:
    """Return a JSON object, or an empty one if the text is not a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _checksum(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())
