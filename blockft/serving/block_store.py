"""The blocks of a server on the host: blocks that blockft computed, and blocks that vLLM computed.

Both kinds are right for the model and differ in rounding alone. They share the host tier.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from blockft.inference.block_cache import BlockCache, Tier
from blockft.inference.block_key import BlockKey
from blockft.inference.host_tier import HostTier
from blockft.serving.pinned_memory import PinnedMemory
from blockft.serving.served_model import ServedModel


@dataclass(frozen=True, kw_only=True)
class LoadedBlocks:
    """Blocks on the host, (L, n, 2, K, D) each, and the tier of each.

    missing: the blocks that no tier has.
    """

    blocks: Mapping[BlockKey, torch.Tensor] = field(default_factory=dict)
    tiers: Mapping[BlockKey, Tier] = field(default_factory=dict)
    missing: AbstractSet[BlockKey] = frozenset()


class BlockStore:
    """The host and disk tiers of a server. One background thread uses the disk tiers.

    num_workers: the number of workers of the server. Each has a host tier, and they share its size.
    pin_memory: keep blocks in pinned memory, from which a GPU copies in the background.

    Raises:
        UserError: the cache folder cannot be used.
    """

    def __init__(self, served: ServedModel, *, num_workers: int = 1, pin_memory: bool = False) -> None:
        self._host = HostTier(served.host_bytes // num_workers)
        empty = PinnedMemory(served.host_bytes // num_workers).empty if pin_memory else None
        self._caches = tuple(
            BlockCache(served.shape, host=self._host, disk=disk, empty=empty)
            for disk in served.open_disk_tiers()
        )
        self._vllm_cache = self._caches[1]
        # the caches are not safe for several threads; they have threads of their own for each file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blockft-store")

    def load(self, keys: Sequence[BlockKey]) -> Future[LoadedBlocks]:
        """Load blocks in the background.

        Blocks that are all in memory are loaded at once: they do not wait for reads and writes of the disk.
        """
        blocks = {key: kv for key in keys if (kv := self._host.get(key)) is not None}
        if len(blocks) < len({*keys}):
            return self._thread.submit(self._load, keys)
        loaded = Future[LoadedBlocks]()
        loaded.set_result(LoadedBlocks(blocks=blocks, tiers=dict.fromkeys(blocks, Tier.host)))
        return loaded

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Count blocks as used on the host: a nearer place had them. The front end does it for the disk."""
        for key in keys:
            self._host.get(key)

    def empty(self, length: int) -> torch.Tensor:
        """Return an empty tensor on the host for a block of `length` tokens; any thread may ask for it."""
        return self._vllm_cache.empty(length)

    def insert(self, key: BlockKey, kv: torch.Tensor) -> Future[Future[None]]:
        """Insert a block that vLLM computed, (L, n, 2, K, D) on the host, in the background.

        `kv` belongs to the store from now on. The result is the write to the folder.
        """
        return self._thread.submit(self._insert, key, kv)

    def close(self, *, wait: bool = True) -> None:
        """Wait until the folder has all blocks, then stop the threads.

        wait: otherwise drop what the threads have not begun, and return at once.
        """
        self._thread.shutdown(wait=wait, cancel_futures=not wait)
        for cache in self._caches:
            cache.close(wait=wait)

    def _load(self, keys: Sequence[BlockKey]) -> LoadedBlocks:
        blocks: dict[BlockKey, torch.Tensor] = {}
        tiers: dict[BlockKey, Tier] = {}
        for cache in self._caches:
            hits = cache.lookup(key for key in dict.fromkeys(keys) if key not in blocks)
            loaded = cache.load(hits)
            blocks |= loaded
            tiers |= {key: hits[key].tier for key in loaded}
        if missing := {*keys} - blocks.keys():
            # damaged entries are computed and written anew, possibly by another worker
            for cache in self._caches:
                cache.revalidate(missing)
        return LoadedBlocks(blocks=blocks, tiers=tiers, missing=missing)

    def _insert(self, key: BlockKey, kv: torch.Tensor) -> Future[None]:
        write = self._vllm_cache.insert_on_host(key, kv)
        assert write is not None, "the folder is always there"
        return write
