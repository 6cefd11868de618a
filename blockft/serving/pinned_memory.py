"""Pinned memory for blocks, taken from the system before requests come.

Pinning memory takes long and holds a lock of the driver, for which threads wait that start work on the GPU. A
server that pins memory for each new block delays the request that needs the block, so all is pinned at once.
"""

import ctypes
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch

from blockft.errors import first_line
from blockft.inference.free_ranges import FreeRanges

CHUNK_BYTES = 1 << 30
"""Size of the parts in which memory is pinned: a power of 2, as PyTorch pins. Larger blocks have others."""

SPARE_SHARE = 0.125
"""Memory beyond that of the host tier, as a share of it: for blocks before and after they are in the tier."""

ALIGNMENT = 4096

_log = logging.getLogger("blockft.serving")

Place = tuple[int, int, int]
"""A chunk, and the first byte and the number of bytes there."""


def pin(num_bytes: int) -> torch.Tensor:
    """Return pinned memory: (num_bytes,) uint8."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class PinnedMemory:
    """Memory for the blocks of a host tier of `host_bytes`, which is pinned at once.

    Memory is free again when no tensor uses it any more. The device must not read or write it then. Several
    threads may take memory.

    A thread must not pin it later, beside the start of a server: a call of the driver for memory breaks the
    capture of CUDA graphs in another thread.

    pin_chunk: returns a chunk of memory, (n,) uint8.
    """

    def __init__(self, host_bytes: int, pin_chunk: Callable[[int], torch.Tensor] = pin) -> None:
        self._pin_chunk = pin_chunk
        self._chunks = self._pin_chunks(math.ceil(host_bytes * (1 + SPARE_SHARE) / CHUNK_BYTES))
        self._free = [FreeRanges(chunk.nbytes) for chunk in self._chunks]
        self._returned: deque[Place] = deque()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """The size of the memory."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an empty pinned tensor."""
        num_bytes = math.prod(size) * dtype.itemsize
        place = self._take(-(-num_bytes // ALIGNMENT) * ALIGNMENT)
        if place is None:  # all memory is in use, or what is free is too scattered
            return self._pin_chunk(num_bytes).view(dtype).view(*size)
        memory, start = self._chunks[place[0]], place[1]
        # a tensor keeps the buffer as long as any view of it lives
        buffer = (ctypes.c_uint8 * num_bytes).from_address(memory.data_ptr() + start)
        weakref.finalize(buffer, _give_back, self._returned, place, memory).atexit = False
        return torch.frombuffer(buffer, dtype=dtype).view(*size)

    def _pin_chunks(self, number: int) -> list[torch.Tensor]:
        chunks: list[torch.Tensor] = []
        try:
            while len(chunks) < max(number, 1):
                chunks.append(self._pin_chunk(CHUNK_BYTES))
        except RuntimeError as error:  # blocks are pinned one by one, as long as there is memory
            missing = f"{number - len(chunks)} of {number} GiB for blocks"
            _log.warning(f"{missing} could not be pinned: lower --host-bytes ({first_line(error)})")
        return chunks

    def _take(self, num_bytes: int) -> Place | None:
        with self._lock:
            # given back by the garbage collector, which may run at any line, in any thread
            while self._returned:
                chunk, *place = self._returned.popleft()
                self._free[chunk].give_back(*place)
            for chunk, free in enumerate(self._free):
                if (start := free.take(num_bytes)) is not None:
                    return chunk, start, num_bytes
        return None


def _give_back(returned: deque[Place], place: Place, memory: torch.Tensor) -> None:
    """Return a place. The argument `memory` keeps the chunk until then."""
    returned.append(place)
