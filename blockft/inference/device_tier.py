"""The device tier: keys and values of blocks in one piece of GPU memory, where attention reads them in place.

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
from blockft.units import format_bytes


def use_device(device: torch.device) -> AbstractContextManager[Any]:
    """A GPU that is not the current one is so within: streams, events and kernels go by the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_bytes(device: torch.device) -> int:
    """Memory that is free, of a GPU or of the host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available


class DeviceTier:
    """Blocks in slots of one (L, S, 2, K, D) tensor, the least recently used making way.

    A block takes consecutive slots, so a layer of it is one copy. `slack` more slots follow the last one that
    a block may take, for kernels that load whole tiles.

    Whatever fails, and wherever it is interrupted, a block that is there is what was written: slots are taken
    before they are given, and given up before they are free. Those that nobody has after that are found again
    when blocks move.

    Raises:
        UserError: the device does not have so much memory.
    """

    def __init__(self, shape: KVShape, device: torch.device, max_bytes: int, slack: int = 0) -> None:
        self.shape = shape
        self.num_slots = max_bytes // shape.token_bytes
        size = (shape.num_layers, *shape.layer_shape(self.num_slots + slack))
        # zeros: what a tile reads beyond a block is weighted with 0, and 0 times NaN would be NaN
        try:
            self.cache_LS2KD = torch.zeros(size, dtype=shape.torch_dtype, device=device)
        except RuntimeError as error:  # out of memory has a class of its own on GPUs alone
            size_text = format_bytes(max_bytes)
            raise UserError(f"{device} has no {size_text} for blocks: lower the device budget") from error
        self.evicted = 0
        self._slots: OrderedDict[BlockKey, int] = OrderedDict()
        self._holes = [(0, self.num_slots)]
        self._unfilled: set[BlockKey] = set()

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._slots and key not in self._unfilled

    @property
    def num_blocks(self) -> int:
        return len(self._slots.keys() - self._unfilled)

    @property
    def used_bytes(self) -> int:
        return sum(map(self.shape.block_bytes, self._slots.keys() - self._unfilled))

    def slot(self, key: BlockKey) -> int:
        """The first slot of a block that has some; it counts as used."""
        self._slots.move_to_end(key)
        return self._slots[key]

    def block(self, key: BlockKey) -> torch.Tensor:
        """The keys and values of a block that has slots, in place: (L, n, 2, K, D)."""
        start = self._slots[key]
        return self.cache_LS2KD[:, start : start + num_tokens(key)]

    def check_fits(self, keys: Iterable[BlockKey]) -> None:
        """Raises:
        UserError: these blocks do not fit together.
        """
        needed = sum(map(num_tokens, keys))
        if needed > self.num_slots:
            gib = self.shape.token_bytes / 2**30
            raise UserError(
                f"the blocks of these prompts need {needed * gib:.2f} GiB on the device, its budget is "
                f"{self.num_slots * gib:.2f} GiB: raise the device budget, or ask fewer prompts at once"
            )

    @contextmanager
    def add(self, keys: Sequence[BlockKey], keep: Collection[BlockKey]) -> Iterator[None]:
        """Give slots to blocks that are not there yet; others than these and `keep` may be evicted.

        The body fills them: they are there when it has come to its end, and not if it has failed.

        Raises:
            UserError: they do not fit together with those to keep; see `check_fits`.
        """
        self._reclaim()
        kept = {*keys, *keep}
        self.check_fits(kept)
        self._unfilled.update(keys)
        for key in keys:
            while (slot := self._take(num_tokens(key))) is None:
                victim = next((other for other in self._slots if other not in kept), None)
                if victim is None:
                    # everything left is needed, but lies so that no hole is large enough
                    self._compact()
                else:
                    self.drop(victim)
                    self.evicted += 1
            self._slots[key] = slot
        yield
        self._unfilled.clear()

    def drop(self, key: BlockKey) -> None:
        """Free the slots of a block."""
        start = self._slots.pop(key)
        self._holes.append((start, num_tokens(key)))
        self._holes = _merged(self._holes)

    def clear(self) -> None:
        """Free all slots."""
        self._reclaim()
        self._slots.clear()
        self._holes = [(0, self.num_slots)]

    def _reclaim(self) -> None:
        """Free the slots of blocks whose filling has failed."""
        if self._unfilled and self.cache_LS2KD.is_cuda:
            # copies may be under way to slots that others will get
            torch.cuda.synchronize(self.cache_LS2KD.device)
        for key in self._slots.keys() & self._unfilled:
            self.drop(key)
        self._unfilled.clear()

    def _take(self, length: int) -> int | None:
        """The start of `length` consecutive free slots, taken from the first hole that holds them."""
        for i, (start, size) in enumerate(self._holes):
            if size >= length:
                self._holes[i : i + 1] = [(start + length, size - length)] if size > length else []
                return start
        return None

    def _compact(self) -> None:
        """Move all blocks to the front. They are gone if that fails, for one may be half moved."""
        slots, self._slots = self._slots, OrderedDict()
        free = 0
        for key, start in sorted(slots.items(), key=lambda item: item[1]):
            length = num_tokens(key)
            if start != free:
                moved = self.cache_LS2KD[:, start : start + length].clone()
                self.cache_LS2KD[:, free : free + length] = moved
                slots[key] = free
            free += length
        self._holes = [(free, self.num_slots - free)]
        self._slots = slots


def _merged(holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same free slots as few holes, in order."""
    merged: list[tuple[int, int]] = []
    for start, size in sorted(holes):
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((start, size))
    return merged
