"""The disk tier of the block cache: keys and values that outlive a process and serve several at once."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, key_digest, num_tokens
from blockft.inference.cache_entry import SUFFIX, CacheModel, DamagedEntry, Entry, write_entry
from blockft.inference.cache_folder import MODEL, ByteCount, CacheFolder
from blockft.units import format_bytes

__all__ = ["CacheModel", "DamagedEntry", "DiskEntry", "DiskStatistics", "DiskTier"]

EVICTION_TARGET = 0.9
"""Eviction goes on down to this part of the budget, so that the folder is not searched at every write."""

TOUCH_INTERVAL_S = 60
"""A use is recorded when the last record is this old."""

_log = logging.getLogger("blockft.cache")


@dataclass(frozen=True, kw_only=True)
class DiskStatistics:
    """What a tier has done since it was made.

    Damaged entries are those that are not what was written for this model under their name; lost are blocks
    that the disk did not take; evicted are entries of any process that made way for this one's.
    """

    entries_read: int = 0
    bytes_read: int = 0
    entries_written: int = 0
    bytes_written: int = 0
    entries_damaged: int = 0
    entries_lost: int = 0
    entries_evicted: int = 0
    bytes_evicted: int = 0


class DiskTier:
    """A model's blocks in a folder that any number of processes, threads and models share.

    max_bytes: what the entries of all models in the folder may take; the least recently used make way.
    A disk that is full, read-only or broken costs one warning, and speed: blocks that it cannot give or take
    are missing, no more.

    Raises:
        UserError: `folder` is something else or a cache in another format version, or `max_bytes` does not
            hold one token.
    """

    def __init__(self, folder: Path, model: CacheModel, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < model.entry_bytes(1):
            raise UserError(
                f"{format_bytes(max_bytes)} of disk cannot hold a block of {model.name}: allow more than "
                f"{format_bytes(model.entry_bytes(1))}, and {format_bytes(model.token_bytes)} for each token"
            )
        self._folder, self._model, self._max_bytes = CacheFolder(folder), model, max_bytes
        self._home = folder / model.fingerprint
        self._lock = threading.Lock()
        self._statistics = DiskStatistics()
        self._said: set[str] = set()
        try:
            self._folder.create_model_folder(model)
        except OSError as error:
            self._warn_unwritable(error)

    @property
    def statistics(self) -> DiskStatistics:
        return self._statistics

    def open(self, key: BlockKey, holds: bool = True) -> "DiskEntry | None":
        """The entry of a block, ready to be read, or None if there is none that can be used.

        holds: keep its file open; see `DiskEntry`.
        One that is damaged, or was made for another block or model, is reported, counted and removed.
        """
        path = self._path(key)
        try:
            entry = Entry(path, self._model)
        except FileNotFoundError:
            return None
        except DamagedEntry as error:
            self._report(path, error)
            return None
        except OSError as error:
            self._warn_unreadable(path, error)
            return None
        assert entry.key == key, "two blocks of one digest"
        self._touch(entry.status, entry.touch)
        if not holds:
            entry.close()
        self._count(entries_read=1)
        return DiskEntry(self, entry)

    def num_bytes(self, key: BlockKey) -> int:
        """What the entry of a block takes."""
        return self._model.entry_bytes(num_tokens(key))

    def digests(self) -> set[str]:
        """The digests of the blocks that are there."""
        return {entry.path.stem for entry in self._folder.entries(self._model.fingerprint)}

    def write(self, key: BlockKey, kv: torch.Tensor) -> None:
        """Keep a block's keys and values, (layers, n, 2, K, D) on the CPU, unless they are there already."""
        path, num_bytes = self._path(key), self.num_bytes(key)
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            self._count(entries_lost=1)
            size, budget = format_bytes(num_bytes), format_bytes(self._max_bytes)
            text = f"a block of {num_tokens(key)} tokens takes {size}, the disk cache may hold {budget}"
            self._warn_once("budget", f"{text}: such blocks are not kept on the disk")
            return
        try:
            if not self._is_there(path, num_bytes) and self._write(path, key, kv, num_bytes):
                self._count(entries_written=1, bytes_written=num_bytes)
        except (OSError, UserError) as error:  # UserError: another version has taken the folder over
            self._count(entries_lost=1)
            self._warn_unwritable(error)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Record that blocks are used now, though not read here; those that are not there are passed over."""
        for key in keys:
            with suppress(OSError):  # what cannot be read is said when it is read
                self._is_there(self._path(key), self._model.entry_bytes(num_tokens(key)))

    def _is_there(self, path: Path, num_bytes: int) -> bool:
        """Whether there is an entry already; if so, it counts as used."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        if status.st_size != num_bytes:
            return False
        self._touch(status, partial(os.utime, path))
        return True

    def _write(self, path: Path, key: BlockKey, kv: torch.Tensor, num_bytes: int) -> bool:
        """Whether the entry was written; not if another process has been faster."""
        if not (self._home / MODEL).exists():  # somebody has emptied the folder, or the disk is back
            self._folder.create_model_folder(self._model)
        with self._folder.temporary_file() as (draft, file):
            write_entry(file, self._model, key, kv)
            # where writing is put off until files are closed, a full disk says so now; the lock stays
            os.close(os.dup(file.fileno()))
            with self._folder.locked() as ledger:
                if self._is_there(path, num_bytes):
                    return False
                used = self._make_room(ledger, num_bytes)
                replaced = path.stat().st_size if path.exists() else 0
                ledger.write(used + num_bytes - replaced)
                draft.replace(path)
        return True

    def _make_room(self, ledger: ByteCount, num_bytes: int) -> int:
        """Evict what must go for this many more bytes. Returns what is used then."""
        used = ledger.read()
        if used is None:
            used = sum(entry.num_bytes for entry in self._folder.entries())
        if self._max_bytes is not None and used + num_bytes > self._max_bytes:
            goal = max(int(EVICTION_TARGET * self._max_bytes) - num_bytes, 0)
            evicted = self._folder.prune(ledger, max_bytes=goal)
            self._count(entries_evicted=len(evicted), bytes_evicted=sum(e.num_bytes for e in evicted))
            used = ledger.read() or 0
        return used

    def _touch(self, status: os.stat_result, touch: Callable[[], None]) -> None:
        if abs(time.time() - status.st_mtime) > TOUCH_INTERVAL_S:
            try:
                touch()
            except FileNotFoundError:
                pass  # evicted meanwhile
            except OSError as error:
                text = f"uses of {self._folder.path} cannot be recorded ({error.strerror})"
                self._warn_once("touch", f"{text}: what is used may be evicted before what is not")

    def _report(self, path: Path, error: DamagedEntry) -> None:
        self._count(entries_damaged=1)
        self._warn_once(
            "damaged",
            f"{path} is damaged or foreign ({error}): such blocks are encoded again, "
            f"and blockft cache verify {self._folder.path} looks for more",
        )
        try:
            self._folder.remove(path, error.status)
        except OSError as unwritable:
            self._warn_unwritable(unwritable)

    def _warn_unreadable(self, path: Path, error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # evicted meanwhile, ESTALE: by another host
            self._warn_once(
                "read", f"{path} cannot be read ({error.strerror}): such blocks are encoded again"
            )

    def _warn_unwritable(self, error: OSError | UserError) -> None:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        self._warn_once(
            "write", f"{self._folder.path} cannot be written ({reason}): blocks stay in memory alone"
        )

    def _warn_once(self, kind: str, text: str) -> None:
        with self._lock:
            said, self._said = kind in self._said, self._said | {kind}
        if not said:
            _log.warning(text)

    def _count(self, **more: int) -> None:
        with self._lock:
            now = self._statistics
            self._statistics = replace(now, **{name: getattr(now, name) + n for name, n in more.items()})

    def _path(self, key: BlockKey) -> Path:
        return self._home / f"{key_digest(key)}{SUFFIX}"


class DiskEntry:
    """An entry of the disk. Threads may share it.

    It holds a file open until it is closed, or forgotten, and can be read whatever other processes do to it
    meanwhile. After that each read opens the file again, which fails, though without a warning, if it was
    evicted.
    """

    def __init__(self, tier: DiskTier, entry: Entry) -> None:
        self._tier, self._entry = tier, entry
        self._reported = False

    def __enter__(self) -> "DiskEntry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._entry.close()

    @property
    def num_tokens(self) -> int:
        return num_tokens(self._entry.key)

    def layer(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The keys and values of a layer, (n, 2, K, D), in `out` (contiguous, on the CPU) if it is given.

        Raises:
            DamagedEntry: they are not what was written, which is reported and the entry removed, or the disk
                does not give them; the block must be encoded again.
        """
        try:
            layer = self._entry.layer(index, out)
        except DamagedEntry as error:
            if not self._reported:
                self._reported = True
                self._tier._report(self._entry.path, error)
            raise
        except OSError as error:
            self._tier._warn_unreadable(self._entry.path, error)
            raise DamagedEntry(str(error.strerror), self._entry.status) from error
        self._tier._count(bytes_read=layer.nbytes)
        return layer
