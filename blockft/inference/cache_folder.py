"""The folder of a cache on a disk: what lies in it, and how processes share it.

::

    format.json                       what this is, and in which version
    .lock                             held while entries come and go; holds the bytes that they take
    .drafts/                          files that are being written, each locked by its writer
    <fingerprint>/model.json          the model that the keys and values beside it belong to
    <fingerprint>/<digest>.safetensors

Whatever appears under its name is whole, for it was written as a draft and renamed. An entry's time of change
is the time of its last use. Locks are flock's, which hold across the hosts of a network file system (NFSv4).
"""

import fcntl
import json
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from blockft.errors import UserError
from blockft.inference.cache_entry import SUFFIX, VERSION, CacheModel

FORMAT, MODEL, LOCK, DRAFTS = "format.json", "model.json", ".lock", ".drafts"

_FORMAT = {"format": "blockft cache", "version": VERSION}


@dataclass(frozen=True, kw_only=True)
class StoredEntry:
    """An entry as its folder shows it. used_at: seconds since the epoch, by the clock of the file system."""

    path: Path
    num_bytes: int
    used_at: float

    @property
    def fingerprint(self) -> str:
        """That of its model."""
        return self.path.parent.name


class ByteCount:
    """The bytes that all entries take, in the lock's file. A process that is killed may leave it too high."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def read(self) -> int | None:
        """The number of bytes; None if nobody has counted yet."""
        text = os.pread(self._handle, 32, 0)
        return int(text) if text.strip().isdigit() else None

    def write(self, num_bytes: int) -> None:
        os.pwrite(self._handle, f"{max(num_bytes, 0):<31}\n".encode(), 0)


class CacheFolder:
    """A folder of entries of several models, shared by any number of processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether there is a cache that can be read.

        Raises:
            UserError: there is something else, or a cache in another version of the format.
        """
        file = self.path / FORMAT
        try:
            found = _parse(file.read_bytes())
        except FileNotFoundError:
            names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
            if FORMAT in names:  # another process has just made it
                return self.exists()
            if names - {LOCK, DRAFTS}:
                raise UserError(
                    f"{self.path} holds files but no {FORMAT}: name a cache or a new folder"
                ) from None
            return False
        except NotADirectoryError:
            raise UserError(f"{self.path} is no folder, or lies in a file: name a folder") from None
        if found.get("format") != _FORMAT["format"]:
            raise UserError(f"{file} is damaged or not blockft's: delete the folder or name another")
        if found != _FORMAT:
            raise UserError(
                f"{self.path} is a block cache of format version {found.get('version')}, this blockft has "
                f"version {VERSION}: delete the folder or name another"
            )
        return True

    def create_model_folder(self, model: CacheModel) -> Path:
        """The folder of a model's entries, made if need be; nothing is written if all is there.

        Raises:
            UserError: as `exists`.
            OSError: it cannot be written.
        """
        home = self.path / model.fingerprint
        if self.exists() and self._model(home) == model:
            return home
        self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if not self.exists():
                self._write_json(self.path / FORMAT, _FORMAT)
            home.mkdir(exist_ok=True)
            if self._model(home) != model:
                facts = asdict(model)
                self._write_json(home / MODEL, facts | {"checksum": _checksum(facts)})
        return home

    def models(self) -> dict[str, CacheModel]:
        """The models by fingerprint.

        Raises:
            UserError: what a folder says about its model is damaged.
        """
        models = {}
        for home in self._homes():
            model = self._model(home)
            if model is None:
                raise UserError(
                    f"{home / MODEL} is missing or damaged: use the cache with its model or delete {home}"
                )
            models[home.name] = model
        return models

    def entries(self, fingerprint: str | None = None) -> Iterator[StoredEntry]:
        """Every entry, or every one of a model, in any order."""
        for home in self._homes():
            if fingerprint not in (None, home.name):
                continue
            with os.scandir(home) as files:
                for file in files:
                    if file.name.endswith(SUFFIX):
                        with suppress(FileNotFoundError):  # another process has removed it
                            status = file.stat(follow_symlinks=False)
                            yield StoredEntry(
                                path=Path(file.path), num_bytes=status.st_size, used_at=status.st_mtime
                            )

    @contextmanager
    def locked(self) -> Iterator[ByteCount]:
        """Keep other processes and threads from adding and removing entries; reading goes on."""
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield ByteCount(handle)
        finally:
            os.close(handle)

    @contextmanager
    def temporary_file(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new unbuffered file to write and rename; if it is not renamed, it is removed.

        What processes that were killed left as drafts is removed too.
        """
        (self.path / DRAFTS).mkdir(exist_ok=True)
        self._remove_abandoned()
        path, file = self._claim()
        try:
            yield path, file
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            file.close()

    def prune(
        self,
        ledger: ByteCount,
        *,
        max_bytes: int | None = None,
        unused_since: float | None = None,
        fingerprints: Collection[str] | None = None,
    ) -> list[StoredEntry]:
        """Remove, least recently used first, what exceeds a number of bytes or was not used since a time.

        Both limits are for the entries of the given models, or of all. Also removes drafts whose writers are
        dead, and counts what is left. Returns the entries that were removed.
        """
        self._remove_abandoned()
        everything = list(self.entries())
        chosen = [e for e in everything if fingerprints is None or e.fingerprint in fingerprints]
        kept_bytes = sum(entry.num_bytes for entry in chosen)
        removed = []
        for entry in sorted(chosen, key=lambda entry: entry.used_at):
            fits = max_bytes is None or kept_bytes <= max_bytes
            if fits and (unused_since is None or entry.used_at >= unused_since):
                break
            entry.path.unlink(missing_ok=True)
            kept_bytes -= entry.num_bytes
            removed.append(entry)
        ledger.write(sum(e.num_bytes for e in everything) - sum(e.num_bytes for e in removed))
        return removed

    def remove(self, path: Path, status: os.stat_result) -> bool:
        """Remove an entry if it is still the file of this status, and not one that has taken its place."""
        with self.locked() as ledger:
            try:
                if not os.path.samestat(path.stat(), status):
                    return False
            except FileNotFoundError:
                return False
            path.unlink()
            if (used := ledger.read()) is not None:
                ledger.write(used - status.st_size)
            return True

    def _homes(self) -> list[Path]:
        return sorted(home for home in self.path.iterdir() if home.is_dir() and home.name != DRAFTS)

    def _model(self, home: Path) -> CacheModel | None:
        """What a folder says about its model; None if it does not, or says what cannot be true."""
        try:
            facts = _parse((home / MODEL).read_bytes())
        except FileNotFoundError:
            return None
        checksum = facts.pop("checksum", None)
        if checksum != _checksum(facts) or facts["fingerprint"] != home.name:
            return None
        return CacheModel(**facts)

    def _claim(self) -> tuple[Path, BinaryIO]:
        while True:
            path = self.path / DRAFTS / secrets.token_hex(8)
            file = path.open("xb", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # between its creation and the lock the draft looked abandoned
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
        for draft in (self.path / DRAFTS).glob("*"):
            # OSError: it is alive, has been renamed, or is another user's
            with suppress(OSError), draft.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()

    def _write_json(self, path: Path, facts: dict[str, Any]) -> None:
        with self.temporary_file() as (draft, file):
            file.write((json.dumps(facts, indent=2) + "\n").encode())
            draft.replace(path)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _checksum(facts: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
