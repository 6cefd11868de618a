"""What the scheduler knows of the blocks that workers have on the device.

Their load is one write into pages, so short that a request is computed in the same step. Other loads run
beside the steps, and their requests wait.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable

from blockft.inference.block_key import BlockKey, num_tokens

COMPUTED_S = 1.0
"""How long a computed block counts as one that is on the device. Memory has it, until the folder has it."""


class DeviceRecord:
    """The blocks of the workers' device tiers, and those that were computed just now.

    It follows the rules of the tiers, but may be wrong for a step or two: a tier whose free slots are too
    scattered for a block evicts more blocks, of which its worker tells. The step of a worker without a block
    of the record waits until the block is loaded.

    num_slots: tokens in the device tier of a worker; 0 without a tier.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots, self._num_used = num_slots, 0
        self._in_tier: OrderedDict[BlockKey, None] = OrderedDict()
        self._computed: OrderedDict[BlockKey, float] = OrderedDict()

    def has_all(self, keys: Iterable[BlockKey]) -> bool:
        """Return whether all blocks are on the device."""
        now = time.monotonic()
        while self._computed and next(iter(self._computed.values())) < now:
            self._computed.popitem(last=False)
        return all(key in self._in_tier or key in self._computed for key in keys)

    def add_computed(self, key: BlockKey) -> None:
        """Record a block that the workers compute in this step."""
        self._computed.pop(key, None)
        self._computed[key] = time.monotonic() + COMPUTED_S

    def use(self, keys: Iterable[BlockKey]) -> None:
        """Record blocks that were written into pages. They are in the tiers now, if they fit there together.

        The least recently used blocks are evicted.
        """
        distinct = dict.fromkeys(keys)
        if sum(map(num_tokens, distinct)) > self._num_slots:
            return
        for key in distinct:
            if key not in self._in_tier:
                self._num_used += num_tokens(key)
            self._in_tier[key] = None
            self._in_tier.move_to_end(key)
        while self._num_used > self._num_slots:
            key, _ = self._in_tier.popitem(last=False)
            self._num_used -= num_tokens(key)

    def drop(self, keys: Iterable[BlockKey]) -> None:
        """Record blocks that the tier of a worker has evicted, or has never got."""
        for key in keys:
            if key in self._in_tier:
                del self._in_tier[key]
                self._num_used -= num_tokens(key)
