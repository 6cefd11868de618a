"""The blocks of a server on the host: blocks that blockft computed, and blocks that vLLM computed.

Both kinds are right for the model and differ in rounding alone. They share the host tier.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from blockft.inference.block_cache import BlockCache, Tier
from blockft.inference.block_key import BlockKey
from blockft.inference.host_tier import HostTier
from blockft.serving.device_work import DeviceWork
from blockft.serving.served_model import ServedModel


@dataclass(frozen=True, kw_only=True)
class LoadedBlocks:
    """Blocks on the host, (L, n, 2, K, D) each, and the tier of each, in the order of the request.

    missing: the indices of blocks that no tier has. There are no `blocks` then.
    """

    blocks: Sequence[torch.Tensor] = ()
    tiers: Sequence[Tier] = ()
    missing: Sequence[int] = ()


class BlockStore:
    """The host and disk tiers of a server. One background thread uses the disk tiers.

    num_workers: the number of workers of the server. Each has a host tier, and they share its size.
    pin_memory: keep blocks in pinned memory, from which a GPU copies in the background.

    Raises:
        UserError: the cache folder cannot be used.
    """

    def __init__(self, served: ServedModel, *, num_workers: int = 1, pin_memory: bool = False) -> None:
        self._host = HostTier(served.host_bytes // num_workers)
        self._caches = tuple(
            BlockCache(served.shape, host=self._host, disk=disk, pin_memory=pin_memory)
            for disk in served.open_disk_tiers()
        )
        self._vllm_cache = self._caches[1]
        # the caches are not safe for several threads; they have threads of their own for each file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blockft-store")

    def load(self, keys: Sequence[BlockKey]) -> Future[LoadedBlocks]:
        """Load blocks in the background.

        Blocks that are all in memory are loaded at once: they do not wait for reads and writes of the disk.
        """
        found = [self._host.get(key) for key in keys]
        blocks = [kv for kv in found if kv is not None]
        if len(blocks) < len(keys):
            return self._thread.submit(self._load, keys)
        self.touch(keys)
        loaded = Future[LoadedBlocks]()
        loaded.set_result(LoadedBlocks(blocks=blocks, tiers=[Tier.host] * len(blocks)))
        return loaded

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Count blocks as used on the host and on disk, in the background: a nearer place had them."""
        for cache in self._caches:
            self._thread.submit(cache.touch, {*keys})

    def insert(self, key: BlockKey, kv: torch.Tensor, copied: DeviceWork) -> Future[str]:
        """Insert a block that vLLM computed, (L, n, 2, K, D) on the CPU, in the background.

        copied: the work that writes `kv`. The result is "" once the folder has the block, or the reason why
        the block cannot be used.
        """
        return self._thread.submit(self._insert, key, kv, copied)

    def close(self) -> None:
        """Wait until the folder has all blocks, then stop the threads."""
        self._thread.shutdown()
        for cache in self._caches:
            cache.close()

    def _load(self, keys: Sequence[BlockKey]) -> LoadedBlocks:
        blocks: dict[BlockKey, torch.Tensor] = {}
        tiers: dict[BlockKey, Tier] = {}
        for cache in self._caches:
            hits = cache.lookup(key for key in dict.fromkeys(keys) if key not in blocks)
            loaded = cache.load(hits)
            blocks |= loaded
            tiers |= {key: hits[key].tier for key in loaded}
        if missing := [index for index, key in enumerate(keys) if key not in blocks]:
            # damaged entries are computed and written anew, possibly by another worker
            for cache in self._caches:
                cache.revalidate(keys[index] for index in missing)
            return LoadedBlocks(missing=missing)
        return LoadedBlocks(blocks=[blocks[key] for key in keys], tiers=[tiers[key] for key in keys])

    def _insert(self, key: BlockKey, kv: torch.Tensor, copied: DeviceWork) -> str:
        copied.wait()
        # a masked value has weight 0, but 0 times infinity is not 0: the block would change other tokens
        if not bool(kv.isfinite().all()):
            dtype = str(kv.dtype).removeprefix("torch.")
            return (
                f"in {dtype} the model computes values that are not finite for a block of {kv.shape[1]} "
                "tokens: leave the document out, or serve the model with another dtype"
            )
        self._vllm_cache.insert(key, kv)
        self._vllm_cache.flush()
        return ""
