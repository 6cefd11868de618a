"""The host tier: keys and values of blocks in memory. The least recently used blocks are evicted."""

import logging
import threading
from collections import OrderedDict

import torch

from blockft.inference.block_key import BlockKey
from blockft.units import format_bytes

_log = logging.getLogger("blockft.cache")


class HostTier:
    """Blocks as (L, n, 2, K, D) tensors on the CPU, with a total size of at most `max_bytes`.

    A block that is larger than that is not kept. A warning says so once, unless `max_bytes` is 0.
    Several threads may use the tier.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.num_evicted = 0
        self._blocks: OrderedDict[BlockKey, torch.Tensor] = OrderedDict()
        self._has_warned = max_bytes == 0
        self._lock = threading.Lock()

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._blocks

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def get(self, key: BlockKey) -> torch.Tensor | None:
        """Return a block, or None if it is not in the tier. The block counts as used."""
        with self._lock:
            kv = self._blocks.get(key)
            if kv is not None:
                self._blocks.move_to_end(key)
            return kv

    def put(self, key: BlockKey, kv: torch.Tensor) -> None:
        """Insert a block without copying it."""
        with self._lock:
            self._put(key, kv)

    def clear(self) -> None:
        """Drop all blocks."""
        with self._lock:
            self._blocks.clear()
            self.used_bytes = 0

    def _put(self, key: BlockKey, kv: torch.Tensor) -> None:
        if key in self._blocks:
            return
        if kv.nbytes > self.max_bytes:
            if not self._has_warned:
                self._has_warned = True
                budget, size = format_bytes(self.max_bytes), format_bytes(kv.nbytes)
                _log.warning(
                    f"a block of {size} is larger than the memory budget of {budget}: it is not kept"
                )
            return
        while self.used_bytes + kv.nbytes > self.max_bytes:
            _, old = self._blocks.popitem(last=False)
            self.used_bytes -= old.nbytes
            self.num_evicted += 1
        self._blocks[key] = kv
        self.used_bytes += kv.nbytes
