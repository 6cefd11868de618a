"""The block cache: blocks by content in three tiers, device, host and disk.

A block is looked up in the nearest tier first. What is encoded goes into all of them, so a tier that makes
room forgets what the next one still has. A use counts in every tier, or what is used most would be the first
that a farther one forgets. Tensors of blocks are (L, n, 2, K, D): L layers, n tokens, K
key/value heads, D head size.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from blockft.inference.block_key import BlockKey, KVShape, num_tokens
from blockft.inference.device_tier import DeviceTier
from blockft.inference.disk_tier import DamagedEntry, DiskEntry, DiskTier
from blockft.inference.host_tier import HostTier

NUM_READERS = 8
"""Threads that read and verify entries of the disk: one does not reach the speed of a fast drive."""

MAX_OPEN_FILES = 64
"""Entries of the disk that a request holds open, for others may evict them; the rest is opened for each read.
A process may often have no more than 1,024 files open, and most are not ours to take."""

MAX_PENDING_WRITES = 64
"""Blocks that may wait for the disk; encoding more waits, too, or they would fill the memory."""

TOUCH_INTERVAL_S = 600
"""Of a block that nearer tiers give, the disk learns once in so long that it is used: answers are quicker."""


class Tier(StrEnum):
    """Where a block was found."""

    device = "device"
    host = "host"
    disk = "disk"


@dataclass(frozen=True)
class CacheHit:
    """A block that needs not be encoded; `entry` is its file, if it is on the disk alone."""

    tier: Tier
    entry: DiskEntry | None = None


class DamagedBlocks(Exception):
    """Entries turned out to be damaged while they were read: look the blocks up and start again."""


class BlockCache:
    """The tiers of one process. Not for several threads at once."""

    def __init__(
        self,
        shape: KVShape,
        *,
        host: HostTier,
        device: DeviceTier | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        self.shape, self.host, self.device, self.disk = shape, host, device, disk
        self.readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="blockft-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="blockft-write")
        self._writes: deque[Future[None]] = deque()
        self._invalidated: set[BlockKey] = set()
        self._recorded: set[BlockKey] = set()
        self._recorded_until = 0.0
        self._copies = torch.cuda.Stream() if device is not None and device.cache_LS2KD.is_cuda else None

    def lookup(self, keys: Iterable[BlockKey]) -> dict[BlockKey, CacheHit]:
        """Where each of these different blocks is, without those that are nowhere; they count as used."""
        found, elsewhere = {}, []
        for key in keys:
            if self.device is not None and key in self.device:
                found[key] = CacheHit(Tier.device)
            elif key in self.host:
                found[key] = CacheHit(Tier.host)
            elif self.disk is not None and key not in self._invalidated:
                elsewhere.append(key)
            self.host.get(key)
        if self.disk is not None:
            self._record_uses(self.disk, found.keys())
        if self.disk is not None and elsewhere:
            holds = [number < MAX_OPEN_FILES for number in range(len(elsewhere))]
            entries = zip(elsewhere, self.readers.map(self.disk.open, elsewhere, holds), strict=True)
            found |= {key: CacheHit(Tier.disk, entry) for key, entry in entries if entry}
        return found

    def insert(self, key: BlockKey, kv: torch.Tensor) -> None:
        """Keep a block that was just encoded, in the host tier and on the disk; both may be behind.

        `kv` must not be overwritten.
        """
        if not self.host.max_bytes and self.disk is None:
            return
        copy, done = self._copied(kv)
        self.host.put(key, copy)
        if self.disk is not None:
            self._invalidated.discard(key)
            while len(self._writes) >= MAX_PENDING_WRITES:
                self._writes.popleft().result()
            self._write_later(_write, self.disk, key, copy, done)

    def clear(self) -> None:
        """Forget what is in memory, on the device and the host."""
        if self.device is not None:
            self.device.clear()
        self.host.clear()

    def flush(self) -> None:
        """Wait until the disk has all blocks."""
        while self._writes:
            self._writes.popleft().result()

    def load(self, found: Mapping[BlockKey, CacheHit]) -> dict[BlockKey, torch.Tensor]:
        """The blocks of the host and the disk, on the host; those that turn out to be damaged are missing."""
        if self._copies:
            self._copies.synchronize()
        blocks = {key: self.on_host(key) for key, at in found.items() if at.tier is Tier.host}
        entries = _entries(found)
        read = self.readers.map(self._read, entries.keys(), entries.values())
        for key, kv in zip(entries, read, strict=True):
            if kv is not None:
                blocks[key] = kv
                self.host.put(key, kv)
        return blocks

    def load_layers(self, found: Mapping[BlockKey, CacheHit], arrived: Sequence[torch.cuda.Event]) -> None:
        """Copy blocks of the host and the disk into their slots on the device, layer by layer.

        On a GPU copies are under way when this returns; `arrived` has an event per layer that says when it is
        there. The disk's threads read ahead of the copies.

        Raises:
            DamagedBlocks: an entry is not what was written; the slots of all blocks hold nothing of use.
        """
        assert self.device is not None
        blocks = {key: self.on_host(key) for key, at in found.items() if at.tier is Tier.host}
        entries = _entries(found)
        new = {key: self.empty(num_tokens(key)) for key in entries}
        pairs = [(self.device.block(key), kv) for key, kv in (blocks | new).items()]
        stream = None
        if self._copies:
            stream = torch.cuda.Stream()
            # the slots may still be read for the blocks that were there before, or the host be written
            stream.wait_stream(torch.cuda.current_stream())
            stream.wait_stream(self._copies)
        num_layers = self.shape.num_layers if pairs else 0
        reads = [
            [
                self.readers.submit(self._read_layer, key, entry, layer, new[key])
                for key, entry in entries.items()
            ]
            for layer in range(num_layers)
        ]
        try:
            for layer in range(num_layers):
                for read in reads[layer]:
                    read.result()
                with torch.cuda.stream(stream):
                    for place, kv in pairs:
                        place[layer].copy_(kv[layer], non_blocking=True)
                if stream:
                    arrived[layer].record(stream)
        except BaseException:
            if stream:
                stream.synchronize()  # these slots will be given to others
            raise
        finally:
            unread = [read for layer_reads in reads for read in layer_reads]
            for read in unread:
                read.cancel()
            wait(unread)
            for entry in entries.values():
                entry.close()
        for key, kv in new.items():
            self.host.put(key, kv)

    def on_host(self, key: BlockKey) -> torch.Tensor:
        """A block of the host tier."""
        kv = self.host.get(key)
        assert kv is not None
        return kv

    def empty(self, length: int) -> torch.Tensor:
        """Room on the host for a block of `length` tokens, pinned where it will be copied to a GPU."""
        size = (self.shape.num_layers, *self.shape.layer_shape(length))
        return torch.empty(size, dtype=self.shape.torch_dtype, pin_memory=self._copies is not None)

    def invalidate(self, key: BlockKey) -> None:
        """Do not look for a block on the disk until it was encoded again: a damaged entry may stay."""
        self._invalidated.add(key)

    def _record_uses(self, disk: DiskTier, keys: AbstractSet[BlockKey]) -> None:
        """Tell the disk what nearer tiers give, without waiting for it."""
        now = time.monotonic()
        if now >= self._recorded_until:
            self._recorded.clear()
            self._recorded_until = now + TOUCH_INTERVAL_S
        if new := keys - self._recorded:
            self._recorded |= new
            self._write_later(disk.touch, new)

    def _write_later(self, task: Callable[..., None], *given: Any) -> None:
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()
        self._writes.append(self._writer.submit(task, *given))

    def _copied(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """A copy of a block on the host, and what to wait for before it can be read there."""
        copy = self.empty(kv.shape[1])
        if not kv.is_cuda:
            return copy.copy_(kv), None
        stream = self._copies or torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            copy.copy_(kv, non_blocking=True)
        kv.record_stream(stream)
        return copy, stream.record_event()

    def _read_layer(self, key: BlockKey, entry: DiskEntry, layer: int, kv: torch.Tensor) -> None:
        try:
            entry.layer(layer, kv[layer])
        except DamagedEntry as error:
            self.invalidate(key)
            raise DamagedBlocks from error

    def _read(self, key: BlockKey, entry: DiskEntry) -> torch.Tensor | None:
        kv = self.empty(num_tokens(key))
        with entry:
            try:
                for layer in range(self.shape.num_layers):
                    entry.layer(layer, kv[layer])
            except DamagedEntry:
                self.invalidate(key)
                return None
        return kv


def _entries(found: Mapping[BlockKey, CacheHit]) -> dict[BlockKey, DiskEntry]:
    return {key: at.entry for key, at in found.items() if at.entry is not None}


def _write(disk: DiskTier, key: BlockKey, kv: torch.Tensor, done: torch.cuda.Event | None) -> None:
    if done is not None:
        done.synchronize()
    disk.write(key, kv)
