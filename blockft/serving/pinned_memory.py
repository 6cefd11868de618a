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

from blockft.inference.free_ranges import FreeRanges

CHUNK_BYTES = 1 << 30
"""Size of the parts in which memory is pinned: a power of 2, as PyTorch pins. Larger blocks have others."""

SPARE_SHARE = 0.125
"""Memory beyond that of the host tier, as a share of it, and at least a chunk: for blocks that are not in the
tier yet, or no more."""

ALIGNMENT = 4096

_log = logging.getLogger("blockft.serving")

Place = tuple[int, int, int]
"""A chunk, and the first byte and the number of bytes there."""


def pin(num_bytes: int) -> torch.Tensor:
    """Return pinned memory: (num_bytes,) uint8."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class PinnedMemory:
    """Memory for the blocks of a host tier of `host_bytes`, pinned in a thread that starts at once.

    Memory is free again when no tensor uses it any more. The device must not read or write it then. Several
    threads may take memory.

    pin_chunk: returns a chunk of memory, (n,) uint8.
    """

    def __init__(self, host_bytes: int, pin_chunk: Callable[[int], torch.Tensor] = pin) -> None:
        self._pin_chunk = pin_chunk
        self._chunks: list[torch.Tensor] = []
        self._free: list[FreeRanges] = []
        self._returned: deque[Place] = deque()
        self._lock, self._is_closed = threading.Lock(), False
        num_chunks = math.ceil((host_bytes + max(SPARE_SHARE * host_bytes, CHUNK_BYTES)) / CHUNK_BYTES)
        self._thread = threading.Thread(
            target=self._fill, args=(num_chunks,), name="blockft-pin", daemon=True
        )
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """The memory that is pinned now."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an empty pinned tensor."""
        num_bytes = math.prod(size) * dtype.itemsize
        place = self._take(-(-num_bytes // ALIGNMENT) * ALIGNMENT)
        if place is None:  # the memory is not pinned yet, or too scattered
            return self._pin_chunk(num_bytes).view(dtype).view(*size)
        memory, start = self._chunks[place[0]], place[1]
        # a tensor keeps the buffer as long as any view of it lives
        buffer = (ctypes.c_uint8 * num_bytes).from_address(memory.data_ptr() + start)
        weakref.finalize(buffer, _give_back, self._returned, place, memory).atexit = False
        return torch.frombuffer(buffer, dtype=dtype).view(*size)

    def close(self) -> None:
        """Pin no further memory."""
        self._is_closed = True
        self._thread.join()

    def _fill(self, num_chunks: int) -> None:
        for index in range(num_chunks):
            if self._is_closed:
                return
            try:
                chunk = self._pin_chunk(CHUNK_BYTES)
            except RuntimeError as error:  # blocks are pinned one by one, as long as there is memory
                _log.warning(
                    f"{num_chunks - index} of {num_chunks} GiB for blocks could not be pinned: lower "
                    f"--host-bytes ({error})"
                )
                return
            with self._lock:
                self._chunks.append(chunk)
                self._free.append(FreeRanges(chunk.nbytes))

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
