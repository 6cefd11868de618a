"""The device tier: keys and values of blocks in one tensor on the device, which attention reads directly.

Shapes: L layers, S token slots, n tokens of a block, K key/value heads, D head size.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import psutil
import torch

from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, KVShape, num_tokens
from blockft.inference.free_ranges import FreeRanges
from blockft.units import format_bytes


def use_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a GPU is the current one, for streams, events and kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, or of the host for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available


class DeviceTier:
    """Blocks in slots of one (L, S, 2, K, D) tensor. The least recently used blocks are evicted.

    A block takes consecutive slots, so that a layer of it is one copy. `padding` more slots follow the last
    one that a block can take, for kernels that load whole tiles.

    A block in the tier is always what was written, even after an exception or interrupt at any line: slots
    leave the free list before a block gets them, and a block loses its slots before they are free. Slots that
    an interrupt leaves without a block are free again after the next compaction.

    Raises:
        UserError: the device does not have enough memory.
    """

    def __init__(self, shape: KVShape, device: torch.device, max_bytes: int, padding: int = 0) -> None:
        self.shape = shape
        self.num_slots = max_bytes // shape.token_bytes
        size = (shape.num_layers, *shape.layer_shape(self.num_slots + padding))
        # zeros: a tile weights values beyond a block with 0, and 0 times NaN is NaN
        try:
            self.cache_LS2KD = torch.zeros(size, dtype=shape.torch_dtype, device=device)
        except RuntimeError as error:  # only GPUs have a class of their own for it
            size_text = format_bytes(max_bytes)
            raise UserError(
                f"{device} does not have {size_text} for blocks: lower the device budget"
            ) from error
        self.num_evicted = 0
        self._slots: OrderedDict[BlockKey, int] = OrderedDict()
        self._free = FreeRanges(self.num_slots)
        self._unwritten: set[BlockKey] = set()

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._slots and key not in self._unwritten

    @property
    def num_blocks(self) -> int:
        return len(self._slots.keys() - self._unwritten)

    @property
    def used_bytes(self) -> int:
        return sum(map(self.shape.block_bytes, self._slots.keys() - self._unwritten))

    def slot(self, key: BlockKey) -> int:
        """Return the first slot of a block. The block counts as used."""
        self._slots.move_to_end(key)
        return self._slots[key]

    def block(self, key: BlockKey) -> torch.Tensor:
        """Return the keys and values of a block that has slots, as a view: (L, n, 2, K, D)."""
        start = self._slots[key]
        return self.cache_LS2KD[:, start : start + num_tokens(key)]

    def check_fits(self, keys: Iterable[BlockKey]) -> None:
        """Check that the tier has enough slots for these blocks together.

        Raises:
            UserError: the blocks need more slots than the tier has.
        """
        needed = sum(map(num_tokens, keys))
        if needed > self.num_slots:
            gib = self.shape.token_bytes / 2**30
            raise UserError(
                f"the blocks of these prompts need {needed * gib:.2f} GiB on the device, its budget is "
                f"{self.num_slots * gib:.2f} GiB: raise the device budget, or answer fewer prompts at once"
            )

    @contextmanager
    def add(self, keys: Sequence[BlockKey], keep: Collection[BlockKey]) -> Iterator[list[BlockKey]]:
        """Allocate slots for new blocks. Blocks outside `keys` and `keep` may be evicted, and are returned.

        The body of the `with` statement writes the blocks. They are in the tier after the body ends without
        an exception.

        Raises:
            UserError: the new blocks and those in `keep` do not fit together.
        """
        self._reclaim()
        kept = {*keys, *keep}
        self.check_fits(kept)
        self._unwritten.update(keys)
        evicted: list[BlockKey] = []
        for key in keys:
            while (slot := self._free.take(num_tokens(key))) is None:
                victim = next((other for other in self._slots if other not in kept), None)
                if victim is None:
                    # all blocks are needed, but no free range is long enough
                    self._compact()
                else:
                    self.drop(victim)
                    evicted.append(victim)
                    self.num_evicted += 1
            self._slots[key] = slot
        yield evicted
        self._unwritten.clear()

    def drop(self, key: BlockKey) -> None:
        """Free the slots of a block."""
        start = self._slots.pop(key)
        self._free.give_back(start, num_tokens(key))

    def clear(self) -> None:
        """Free all slots."""
        self._reclaim()
        self._slots.clear()
        self._free = FreeRanges(self.num_slots)

    def _reclaim(self) -> None:
        """Free the slots of blocks that were not written because of an exception."""
        if self._unwritten and self.cache_LS2KD.is_cuda:
            # copies to these slots may still run
            torch.cuda.synchronize(self.cache_LS2KD.device)
        for key in self._slots.keys() & self._unwritten:
            self.drop(key)
        self._unwritten.clear()

    def _compact(self) -> None:
        """Move all blocks to the front. An exception drops all blocks, because one may be partly moved."""
        slots, self._slots = self._slots, OrderedDict()
        next_slot = 0
        for key, start in sorted(slots.items(), key=lambda item: item[1]):
            length = num_tokens(key)
            if start != next_slot:
                moved = self.cache_LS2KD[:, start : start + length].clone()
                self.cache_LS2KD[:, next_slot : next_slot + length] = moved
                slots[key] = next_slot
            next_slot += length
        free = FreeRanges(self.num_slots)
        if next_slot:
            free.take(next_slot)
        self._free, self._slots = free, slots
