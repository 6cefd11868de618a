"""The disk tier of the block cache: keys and values that outlive a process and that processes share."""

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
from blockft.inference.block_key import BlockKey, first_digest, key_digest, num_tokens
from blockft.inference.cache_entry import REMOVED, SUFFIX, CacheModel, DamagedEntry, EntryReader, write_entry
from blockft.inference.cache_folder import MODEL, ByteCount, CacheFolder, retry_while_removed
from blockft.units import format_bytes

__all__ = ["CacheModel", "DamagedEntry", "DiskEntry", "DiskStatistics", "DiskTier"]

EVICTION_TARGET = 0.9
"""Eviction removes entries down to this fraction of the budget, so that not every write has to evict."""

TOUCH_INTERVAL_S = 60
"""A use of an entry is recorded if the last record is older than this."""

_log = logging.getLogger("blockft.cache")


@dataclass(frozen=True, kw_only=True)
class DiskStatistics:
    """Counts of what a tier did since it was opened.

    entries_damaged  entries that are not what was written for this block and model
    entries_lost     blocks that could not be written
    entries_evicted  entries, of any process, that were evicted for this tier's writes
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

    `max_bytes` is the largest total size of the entries of all models; the least recently used are evicted. A
    disk that is full, read-only or broken costs one warning and speed: its blocks are missing and are
    computed.

    Raises:
        UserError: `folder` is not a cache or is one in another format version, or a block of one token does
            not fit into `max_bytes`.
    """

    def __init__(self, folder: Path, model: CacheModel, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < model.entry_bytes(1):
            raise UserError(
                f"{format_bytes(max_bytes)} of disk cannot hold a block of {model.name}: allow more than "
                f"{format_bytes(model.entry_bytes(1))}, and {format_bytes(model.token_bytes)} for each token"
            )
        self._folder, self._model, self._max_bytes = CacheFolder(folder), model, max_bytes
        self._model_folder = folder / model.fingerprint
        self._lock = threading.Lock()
        self._statistics = DiskStatistics()
        self._warned: set[str] = set()
        try:
            self._folder.create_model_folder(model)
        except OSError as error:
            self._warn_unwritable(error)

    @property
    def statistics(self) -> DiskStatistics:
        """What the tier did since it was opened."""
        return self._statistics

    def __contains__(self, key: BlockKey) -> bool:
        """Return whether there is an entry of the size of this block. It is neither verified nor used."""
        with suppress(OSError):
            return self._find(key) is not None
        return False

    def use(self, key: BlockKey) -> bool:
        """Return whether there is an entry of the size of this block. It counts as used, unverified."""
        with suppress(OSError):  # reading the entry reports the error
            return self._touch_existing(key)
        return False

    def open(self, key: BlockKey, keep_open: bool = True) -> "DiskEntry | None":
        """Return the entry of a block, or None if there is no usable entry.

        With `keep_open` its file stays open; see `DiskEntry`. An entry that is damaged or belongs to another
        block or model is reported, counted and removed.
        """
        path = self._path(key)
        try:
            entry = EntryReader(path, self._model)
        except FileNotFoundError:
            return None
        except DamagedEntry as error:
            self._report(path, error)
            return None
        except OSError as error:
            self._warn_unreadable(path, error)
            return None
        is_same = (entry.tokens, entry.first_digest) == (key.tokens, first_digest(key))
        assert is_same, "two blocks have the same digest"
        self._touch(entry.status, entry.touch)
        if not keep_open:
            entry.close()
        self._count(entries_read=1)
        return DiskEntry(self, entry)

    def num_bytes(self, key: BlockKey) -> int:
        """Return the size of a block's entry."""
        return self._model.entry_bytes(num_tokens(key))

    def digests(self) -> set[str]:
        """Return the digests of the model's blocks in the folder."""
        return {entry.path.stem for entry in self._folder.entries(self._model.fingerprint)}

    def write(self, key: BlockKey, kv: torch.Tensor) -> None:
        """Write a block's keys and values, (L, n, 2, K, D) on the CPU, unless the folder has them."""
        path, num_bytes = self._path(key), self.num_bytes(key)
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            self._count(entries_lost=1)
            size, budget = format_bytes(num_bytes), format_bytes(self._max_bytes)
            text = (
                f"a block of {num_tokens(key)} tokens takes {size}, the budget of the disk cache is {budget}"
            )
            self._warn_once("budget", f"{text}: such blocks are not written")
            return
        try:
            if not self._touch_existing(key) and self._write(path, key, kv, num_bytes):
                self._count(entries_written=1, bytes_written=num_bytes)
        except (OSError, UserError) as error:  # UserError: another version of blockft replaced the folder
            self._count(entries_lost=1)
            self._warn_unwritable(error)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Record that blocks are used now, without reading them. Blocks without an entry are ignored."""
        for key in keys:
            self.use(key)

    def _find(self, key: BlockKey) -> os.stat_result | None:
        """Return the status of the entry's file, or None if there is no entry of the size of this block."""
        try:
            status = os.stat(self._file(key))
        except FileNotFoundError:
            return None
        return status if status.st_size == self.num_bytes(key) else None

    def _touch_existing(self, key: BlockKey) -> bool:
        """Return whether there is an entry of the size of this block. If so, it counts as used."""
        status = self._find(key)
        if status is None:
            return False
        self._touch(status, partial(os.utime, self._file(key)))
        return True

    def _write(self, path: Path, key: BlockKey, kv: torch.Tensor, num_bytes: int) -> bool:
        """Return whether the entry was written. It was not if another process wrote it first."""
        return retry_while_removed(lambda: self._write_once(path, key, kv, num_bytes))

    def _write_once(self, path: Path, key: BlockKey, kv: torch.Tensor, num_bytes: int) -> bool:
        if not (self._model_folder / MODEL).exists():  # the folder was emptied, or its disk is back
            self._folder.create_model_folder(self._model)
        with self._folder.temporary_file() as (temporary, file):
            write_entry(file, self._model, key, kv)
            # Some file systems report a full disk only on close. This closes a copy and keeps the lock.
            os.close(os.dup(file.fileno()))
            with self._folder.locked() as byte_count:
                if self._touch_existing(key):
                    return False
                used = self._make_room(byte_count, num_bytes)
                replaced = path.stat().st_size if path.exists() else 0
                byte_count.write(used + num_bytes - replaced)
                temporary.replace(path)
        return True

    def _make_room(self, byte_count: ByteCount, num_bytes: int) -> int:
        """Evict entries so that `num_bytes` more fit. Return the total size of the remaining entries."""
        used = byte_count.read()
        if used is None:
            used = sum(entry.num_bytes for entry in self._folder.entries())
        if self._max_bytes is not None and used + num_bytes > self._max_bytes:
            goal = max(int(EVICTION_TARGET * self._max_bytes) - num_bytes, 0)
            evicted = self._folder.prune(byte_count, max_bytes=goal)
            self._count(entries_evicted=len(evicted), bytes_evicted=sum(e.num_bytes for e in evicted))
            used = byte_count.read() or 0
        return used

    def _touch(self, status: os.stat_result, touch: Callable[[], None]) -> None:
        """Call `touch` if the last recorded use, in `status`, is old."""
        if abs(time.time() - status.st_mtime) > TOUCH_INTERVAL_S:
            try:
                touch()
            except FileNotFoundError:
                pass  # another process evicted it
            except OSError as error:
                text = f"uses of {self._folder.path} cannot be recorded ({error.strerror})"
                self._warn_once("touch", f"{text}: used blocks may be evicted before unused ones")

    def _report(self, path: Path, error: DamagedEntry) -> None:
        self._count(entries_damaged=1)
        self._warn_once(
            "damaged",
            f"{path} is damaged or foreign ({error}): such blocks are computed again; "
            f"blockft cache verify {self._folder.path} finds all of them",
        )
        try:
            self._folder.remove_damaged(path, self._model)
        except FileNotFoundError:
            pass  # another process has removed the whole folder
        except OSError as unwritable:
            self._warn_unwritable(unwritable)

    def _warn_unreadable(self, path: Path, error: OSError) -> None:
        if error.errno not in REMOVED:
            self._warn_once(
                "read", f"{path} cannot be read ({error.strerror}): such blocks are computed again"
            )

    def _warn_unwritable(self, error: OSError | UserError) -> None:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        self._warn_once(
            "write", f"{self._folder.path} cannot be written ({reason}): blocks stay in memory only"
        )

    def _warn_once(self, kind: str, text: str) -> None:
        with self._lock:
            is_known, self._warned = kind in self._warned, self._warned | {kind}
        if not is_known:
            _log.warning(text)

    def _count(self, **more: int) -> None:
        with self._lock:
            now = self._statistics
            self._statistics = replace(now, **{name: getattr(now, name) + n for name, n in more.items()})

    def _path(self, key: BlockKey) -> Path:
        return Path(self._file(key))

    def _file(self, key: BlockKey) -> str:
        # a path as a text takes a third of the time: a server asks for all blocks of each prompt
        return f"{self._model_folder}/{_name(key)}"


class DiskEntry:
    """An entry on the disk. Threads may share it.

    Its file stays open until `close` (or until the object is deleted), and can be read even if another
    process evicts the entry. After `close` each read opens the file again, and fails without a warning if
    the entry was evicted.
    """

    def __init__(self, tier: DiskTier, entry: EntryReader) -> None:
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
        return self._entry.num_tokens

    def read_layer(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the keys and values of a layer, (n, 2, K, D), in `out` if it is given.

        `out` is contiguous and on the CPU.

        Raises:
            DamagedEntry: the layer is not what was written (the entry is then reported and removed), or
                cannot be read. The block must be computed again.
        """
        try:
            layer = self._entry.read_layer(index, out)
        except DamagedEntry as error:
            if not self._reported:
                self._reported = True
                self._tier._report(self._entry.path, error)
            raise
        except OSError as error:
            self._tier._warn_unreadable(self._entry.path, error)
            raise DamagedEntry(str(error.strerror)) from error
        self._tier._count(bytes_read=layer.nbytes)
        return layer


def _name(key: BlockKey) -> str:
    """Return the name of the file of a block."""
    return f"{key_digest(key)}{SUFFIX}"
