"""The host tier: keys and values of blocks in memory, the least recently used making way."""

import logging
from collections import OrderedDict

import torch

from blockft.inference.block_key import BlockKey
from blockft.units import format_bytes

_log = logging.getLogger("blockft.cache")


class HostTier:
    """Blocks as (L, n, 2, K, D) tensors on the CPU, of `max_bytes` together.

    A block that is larger than the budget is not kept, which is said once.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.evicted = 0
        self._blocks: OrderedDict[BlockKey, torch.Tensor] = OrderedDict()
        self._said = max_bytes == 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._blocks

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def get(self, key: BlockKey) -> torch.Tensor | None:
        """A block, if it is there; it counts as used."""
        kv = self._blocks.get(key)
        if kv is not None:
            self._blocks.move_to_end(key)
        return kv

    def put(self, key: BlockKey, kv: torch.Tensor) -> None:
        """Keep a block. The tensor is not copied."""
        if key in self._blocks:
            return
        if kv.nbytes > self.max_bytes:
            if not self._said:
                self._said = True
                budget, size = format_bytes(self.max_bytes), format_bytes(kv.nbytes)
                _log.warning(f"the memory budget of {budget} does not hold a block of {size}: it is not kept")
            return
        while self.used_bytes + kv.nbytes > self.max_bytes:
            _, old = self._blocks.popitem(last=False)
            self.used_bytes -= old.nbytes
            self.evicted += 1
        self._blocks[key] = kv
        self.used_bytes += kv.nbytes

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()
        self.used_bytes = 0
