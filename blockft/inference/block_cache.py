"""The block cache: keys and values of blocks in three tiers, device, host and disk.

A block is looked up in the nearest tier first. A computed block goes into every tier, so that the next tier
still has a block that a tier evicts. A use of a block counts in every tier; otherwise the farther tiers would
evict the most used blocks first. Tensors of blocks are (L, n, 2, K, D): L layers, n tokens, keys and values,
K key/value heads, D head size.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch

from blockft.inference.block_key import BlockKey, KVShape, num_tokens
from blockft.inference.device_tier import DeviceTier
from blockft.inference.disk_tier import DamagedEntry, DiskEntry, DiskTier
from blockft.inference.host_tier import HostTier

NUM_READERS = 8
"""Threads that read and verify entries on the disk. A single thread is slower than a fast drive."""

MAX_OPEN_FILES = 64
"""Entries on the disk that a request keeps open, so that they stay readable if another process evicts them.
Further entries are opened for each read, because a process may often have only 1,024 open files."""

MAX_PENDING_WRITES = 64
"""Blocks that may wait for the disk. An insert beyond this number waits, so that memory does not fill up."""

TOUCH_INTERVAL_S = 600
"""The disk records a block that a nearer tier gives as used at most once in this time, to save time."""


class Tier(StrEnum):
    """The tier that a block came from."""

    device = "device"
    host = "host"
    disk = "disk"


@dataclass(frozen=True)
class CacheHit:
    """A block that a tier has. `entry` is its file if only the disk has it."""

    tier: Tier
    entry: DiskEntry | None = None


class DamagedBlocks(Exception):
    """An entry is damaged, which was found while it was read: look the blocks up again and start over."""


class BlockCache:
    """The tiers of one process. Not safe for several threads at once.

    empty: returns an empty tensor on the host for a block, of a size and a type. Default: in pinned
    memory, from which a GPU copies in the background, if there is a device tier on a GPU.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        host: HostTier,
        device: DeviceTier | None = None,
        disk: DiskTier | None = None,
        empty: Callable[[Sequence[int], torch.dtype], torch.Tensor] | None = None,
    ) -> None:
        self.shape, self.host, self.device, self.disk = shape, host, device, disk
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="blockft-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="blockft-write")
        self._writes: deque[Future[None]] = deque()
        self._invalidated: set[BlockKey] = set()
        self._touched: set[BlockKey] = set()
        self._touched_until = 0.0
        self._copy_stream = torch.cuda.Stream() if device is not None and device.cache_LS2KD.is_cuda else None
        self._empty = empty or partial(_empty, pin_memory=self._copy_stream is not None)

    def lookup(self, keys: Iterable[BlockKey]) -> dict[BlockKey, CacheHit]:
        """Return the nearest tier of each block, without blocks that no tier has. They count as used.

        `keys` are different blocks.
        """
        hits, not_in_memory = {}, []
        for key in keys:
            if self.device is not None and key in self.device:
                hits[key] = CacheHit(Tier.device)
            elif key in self.host:
                hits[key] = CacheHit(Tier.host)
            elif self.disk is not None and key not in self._invalidated:
                not_in_memory.append(key)
            self.host.get(key)
        if self.disk is not None:
            self._touch_on_disk(self.disk, hits.keys())
        if self.disk is not None and not_in_memory:
            keep_open = [index < MAX_OPEN_FILES for index in range(len(not_in_memory))]
            entries = self._readers.map(self.disk.open, not_in_memory, keep_open)
            pairs = zip(not_in_memory, entries, strict=True)
            hits |= {key: CacheHit(Tier.disk, entry) for key, entry in pairs if entry}
        return hits

    def insert(self, key: BlockKey, kv: torch.Tensor) -> None:
        """Insert a computed block into the host tier and the disk tier, without waiting for either.

        `kv` must not be overwritten afterwards.
        """
        if not self.host.max_bytes and self.disk is None:
            return
        self._insert(key, *self._copy_to_host(kv))

    def insert_on_host(self, key: BlockKey, kv: torch.Tensor) -> Future[None] | None:
        """Insert a block that is on the host, without a copy: `kv` belongs to the cache from now on.

        Return the write to the disk, or None without a disk.
        """
        return self._insert(key, kv, None)

    def clear(self) -> None:
        """Drop all blocks from the device and host tiers."""
        if self.device is not None:
            self.device.clear()
        self.host.clear()

    def flush(self) -> None:
        """Wait until the disk has all blocks."""
        while self._writes:
            self._writes.popleft().result()

    def close(self, *, wait: bool = True) -> None:
        """Wait until the disk has all blocks, then stop the threads. The cache cannot be used afterwards.

        wait: otherwise drop what the threads have not begun, and return at once.
        """
        try:
            if wait:
                self.flush()
        finally:
            for threads in (self._writer, self._readers):
                threads.shutdown(wait=wait, cancel_futures=not wait)

    def load(self, hits: Mapping[BlockKey, CacheHit]) -> dict[BlockKey, torch.Tensor]:
        """Return the blocks of the host and disk tiers, on the host. Damaged blocks are missing."""
        if self._copy_stream:
            self._copy_stream.synchronize()
        blocks = {key: self.on_host(key) for key, hit in hits.items() if hit.tier is Tier.host}
        entries = _entries(hits)
        tensors = self._readers.map(self._read, entries.keys(), entries.values())
        for key, kv in zip(entries, tensors, strict=True):
            if kv is not None:
                blocks[key] = kv
                self.host.put(key, kv)
        return blocks

    def load_layers(
        self, hits: Mapping[BlockKey, CacheHit], layer_loaded: Sequence[torch.cuda.Event]
    ) -> None:
        """Copy blocks of the host and disk tiers into their slots on the device, layer by layer.

        On a GPU the copies may still run when this returns; `layer_loaded` has an event per layer, recorded
        after the layer's copies. The reader threads read ahead of the copies.

        Raises:
            DamagedBlocks: an entry is damaged. The contents of the slots of all blocks are then undefined.
        """
        assert self.device is not None
        blocks = {key: self.on_host(key) for key, hit in hits.items() if hit.tier is Tier.host}
        entries = _entries(hits)
        new = {key: self.empty(num_tokens(key)) for key in entries}
        pairs = [(self.device.block(key), kv) for key, kv in (blocks | new).items()]
        stream = None
        if self._copy_stream:
            stream = torch.cuda.Stream()
            # a pass may still read the slots' previous blocks, and host tensors may still be written
            stream.wait_stream(torch.cuda.current_stream())
            stream.wait_stream(self._copy_stream)
        num_layers = self.shape.num_layers if pairs else 0
        reads = [
            [
                self._readers.submit(self._read_layer, key, entry, layer, new[key])
                for key, entry in entries.items()
            ]
            for layer in range(num_layers)
        ]
        try:
            for layer in range(num_layers):
                for read in reads[layer]:
                    read.result()
                with torch.cuda.stream(stream):
                    for slots, kv in pairs:
                        slots[layer].copy_(kv[layer], non_blocking=True)
                if stream:
                    layer_loaded[layer].record(stream)
        except BaseException:
            if stream:
                stream.synchronize()  # other blocks will take these slots
            raise
        finally:
            all_reads = [read for layer_reads in reads for read in layer_reads]
            for read in all_reads:
                read.cancel()
            wait(all_reads)
            for entry in entries.values():
                entry.close()
        for key, kv in new.items():
            self.host.put(key, kv)

    def on_host(self, key: BlockKey) -> torch.Tensor:
        """Return a block that the host tier has."""
        kv = self.host.get(key)
        assert kv is not None
        return kv

    def empty(self, length: int) -> torch.Tensor:
        """Return an empty tensor on the host for a block of `length` tokens."""
        return self._empty((self.shape.num_layers, *self.shape.layer_shape(length)), self.shape.torch_dtype)

    def invalidate(self, key: BlockKey) -> None:
        """Ignore a block's entry on the disk until the block is inserted again. The entry may be damaged."""
        self._invalidated.add(key)

    def revalidate(self, keys: Iterable[BlockKey]) -> None:
        """Read entries of blocks on the disk again: another process may have written them anew."""
        self._invalidated.difference_update(keys)

    def _touch_on_disk(self, disk: DiskTier, keys: AbstractSet[BlockKey]) -> None:
        """Record on the disk that nearer tiers gave blocks, without waiting."""
        now = time.monotonic()
        if now >= self._touched_until:
            self._touched.clear()
            self._touched_until = now + TOUCH_INTERVAL_S
        if new := keys - self._touched:
            self._touched |= new
            self._write_later(disk.touch, new)

    def _insert(
        self, key: BlockKey, kv: torch.Tensor, copied: torch.cuda.Event | None
    ) -> Future[None] | None:
        self.host.put(key, kv)
        if self.disk is None:
            return None
        self._invalidated.discard(key)
        while len(self._writes) >= MAX_PENDING_WRITES:
            self._writes.popleft().result()
        return self._write_later(_write, self.disk, key, kv, copied)

    def _write_later(self, task: Callable[..., None], *args: Any) -> Future[None]:
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()
        write = self._writer.submit(task, *args)
        self._writes.append(write)
        return write

    def _copy_to_host(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Return a copy of a block on the host, and the event to wait for before it is read."""
        copy = self.empty(kv.shape[1])
        if not kv.is_cuda:
            return copy.copy_(kv), None
        stream = self._copy_stream or torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            copy.copy_(kv, non_blocking=True)
        kv.record_stream(stream)
        return copy, stream.record_event()

    def _read_layer(self, key: BlockKey, entry: DiskEntry, layer: int, kv: torch.Tensor) -> None:
        try:
            entry.read_layer(layer, kv[layer])
        except DamagedEntry as error:
            self.invalidate(key)
            raise DamagedBlocks from error

    def _read(self, key: BlockKey, entry: DiskEntry) -> torch.Tensor | None:
        """Return a block of the disk, or None if its entry is damaged."""
        kv = self.empty(num_tokens(key))
        with entry:
            try:
                for layer in range(self.shape.num_layers):
                    entry.read_layer(layer, kv[layer])
            except DamagedEntry:
                self.invalidate(key)
                return None
        return kv


def _empty(size: Sequence[int], dtype: torch.dtype, *, pin_memory: bool) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, pin_memory=pin_memory)


def _entries(hits: Mapping[BlockKey, CacheHit]) -> dict[BlockKey, DiskEntry]:
    return {key: hit.entry for key, hit in hits.items() if hit.entry is not None}


def _write(disk: DiskTier, key: BlockKey, kv: torch.Tensor, copied: torch.cuda.Event | None) -> None:
    if copied is not None:
        copied.synchronize()
    disk.write(key, kv)
