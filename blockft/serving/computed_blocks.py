"""Blocks that vLLM has computed, until the folder has them.

A block may be used as soon as its numbers are checked, from the tensor into which it was read from its pages.
Its copy to the host and its entry in the folder follow in the background.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial

import torch

from blockft.inference.block_cache import MAX_PENDING_WRITES
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.serving.block_store import BlockStore
from blockft.serving.device_work import BackgroundStream, DeviceWork

MAX_WAITING_BYTES = 2 << 30
"""Size of the blocks that may wait for their copy to the host. A step with more blocks waits for copies, so
that the memory of the device does not fill up."""

POLL_S = 0.01
"""How often the end looks whether the folder has all blocks."""

_log = logging.getLogger("blockft.serving")

Block = tuple[BlockKey, torch.Tensor]


class ComputedBlocks:
    """Blocks (L, n, 2, K, D) on the device, then on the host, until the store has written them to the folder.

    wait_for_disk: report a block only when it is in the folder, because other workers read it there.
    """

    def __init__(self, store: BlockStore, device: torch.device, *, wait_for_disk: bool = False) -> None:
        self._store, self._wait_for_disk = store, wait_for_disk
        self._stream = BackgroundStream(device)
        self._blocks: dict[BlockKey, torch.Tensor] = {}
        self._unwritten: set[BlockKey] = set()
        self._waiting: deque[tuple[int, Future[str]]] = deque()
        # a check never waits for the copies of earlier blocks, for which memory has to be found
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="blockft-check")
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="blockft-copy")
        self._writes: deque[Future[None]] = deque()

    def get(self, key: BlockKey) -> torch.Tensor | None:
        """Return a block that may be used, on the device or on the host, or None."""
        return self._blocks.get(key)

    def add(self, blocks: Sequence[Block]) -> list[Future[str]]:
        """Add blocks that the current stream of the device writes, and that nothing overwrites.

        A result is "" once the block may be used, or the reason why it cannot be used.
        """
        self._limit_waiting()
        peaks, checked = self._stream.copy_to_host(torch.stack([_peak(kv) for _, kv in blocks]))
        reports, copies = ([Future[str]() for _ in blocks] for _ in range(2))
        self._unwritten.update(key for key, _ in blocks)
        self._checker.submit(self._check, blocks, peaks, checked, reports, copies)
        self._waiting.extend(zip((kv.nbytes for _, kv in blocks), copies, strict=True))
        return reports

    def close(self, timeout_s: float) -> int:
        """Wait until the folder has all blocks, at most `timeout_s`. Return how many of them it lacks."""
        end = time.monotonic() + timeout_s
        while self._unwritten and time.monotonic() < end:
            time.sleep(POLL_S)
        num_unwritten = len(self._unwritten)
        for threads in (self._checker, self._copier):
            threads.shutdown(wait=not num_unwritten, cancel_futures=True)
        return num_unwritten

    def _limit_waiting(self) -> None:
        """Wait until the blocks that wait for their copy are few."""
        while self._waiting and self._waiting[0][1].done():
            self._waiting.popleft()
        while sum(num_bytes for num_bytes, _ in self._waiting) > MAX_WAITING_BYTES:
            self._waiting.popleft()[1].exception()

    def _check(
        self,
        blocks: Sequence[Block],
        peaks: torch.Tensor,
        checked: DeviceWork,
        reports: Sequence[Future[str]],
        copies: Sequence[Future[str]],
    ) -> None:
        try:
            checked.wait()
            is_finite = peaks.isfinite().tolist()
            for (key, kv), is_usable, report, copied in zip(blocks, is_finite, reports, copies, strict=True):
                if not is_usable:
                    self._unwritten.discard(key)
                    copied.set_result("")
                    report.set_result(_overflow(kv))
                    continue
                self._blocks[key] = kv
                if not self._wait_for_disk:
                    report.set_result("")
                self._copier.submit(self._copy, key, kv, report, copied)
        except Exception as error:  # such as an error of the device: nobody may wait for ever
            for (key, _), report, copied in zip(blocks, reports, copies, strict=True):
                self._lose(key, error, report, copied)

    def _copy(self, key: BlockKey, kv: torch.Tensor, report: Future[str], copied: Future[str]) -> None:
        """Copy a block to the host and give it to the store."""
        try:
            empty = self._store.empty(kv.shape[1])
            on_host, work = self._stream.copy_to_host(kv, empty, is_written=True)
            work.wait()
            self._blocks[key] = on_host
            copied.set_result("")
            # the store must not wait, because it also loads
            while len(self._writes) >= MAX_PENDING_WRITES // 2:
                self._writes.popleft().exception()
            written = self._store.insert(key, on_host).result()
            self._writes.append(written)
            written.add_done_callback(partial(self._end, key, report))
        except CancelledError:  # the server ends
            pass
        except Exception as error:  # such as too little memory
            self._lose(key, error, report, copied)

    def _end(self, key: BlockKey, report: Future[str], written: Future[None]) -> None:
        if written.cancelled():  # the server ends
            return
        if error := written.exception():
            self._lose(key, error, report)
            return
        self._forget(key)
        if not report.done():
            report.set_result("")

    def _lose(
        self, key: BlockKey, error: BaseException, report: Future[str], copied: Future[str] | None = None
    ) -> None:
        """Forget a block that the folder does not get. A prompt that needs the block computes it again."""
        self._forget(key)
        if report.done():  # nobody else tells of this error
            _log.error(f"the folder does not get a block of {num_tokens(key)} tokens", exc_info=error)
        for future in (report, copied):
            if future is not None and not future.done():
                future.set_exception(error)

    def _forget(self, key: BlockKey) -> None:
        self._blocks.pop(key, None)
        self._unwritten.discard(key)


def _peak(kv: torch.Tensor) -> torch.Tensor:
    """Return a number that is finite if all numbers of a block are, without a copy of the block."""
    return torch.linalg.vector_norm(kv, ord=float("inf"))


def _overflow(kv: torch.Tensor) -> str:
    # a masked value has weight 0, but 0 times infinity is not 0: the block would change other tokens
    dtype = str(kv.dtype).removeprefix("torch.")
    return (
        f"in {dtype} the model computes values that are not finite for a block of {kv.shape[1]} tokens: "
        "leave the document out, or serve the model with another dtype"
    )
