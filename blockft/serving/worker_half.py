"""The connector's half in a worker of vLLM: moves blocks between the block store and the pages.

Blocks on the device are written into pages in the step that computes their request, before its forward pass.
Other blocks are read in a thread, unless memory has them. They are copied to a GPU and written into pages on
a stream of its own, beside the forward passes, which do not use the pages of a request that waits. A request
whose blocks cannot be loaded fails alone. With several tensor-parallel workers each one loads its own heads.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial

import torch

from blockft.attention.rope import RotaryEmbedding
from blockft.errors import first_line, notify
from blockft.held_signals import ignore_signals
from blockft.inference.block_cache import Tier
from blockft.inference.block_key import BlockKey, key_digest, num_first, num_tokens
from blockft.inference.device_tier import DeviceTier
from blockft.serving.block_request import ReplyAddress, page_slots
from blockft.serving.block_store import BlockStore, LoadedBlocks
from blockft.serving.computed_blocks import ComputedBlocks
from blockft.serving.device_work import BackgroundStream, DeviceWork, current_work
from blockft.serving.head_shard import HeadShard
from blockft.serving.page_writer import open_page_writer
from blockft.serving.pages import (
    WHOLE,
    AttentionLayer,
    PageLayout,
    move_keys,
    read_blocks,
    write_blocks,
)
from blockft.serving.report import Report, Reporter
from blockft.serving.scheduler_half import Load, PrefixHit, Save
from blockft.serving.served_model import ServedModel
from blockft.serving.supported_engine import check_backend

IDLE_WAIT_S = 0.005
"""How long a step without tokens waits for blocks. Otherwise the engine would use a core to wait."""

START_WAIT_S = 0.001
"""How long a step waits for the loads that it starts. Blocks in memory come in time, and spare a step."""

IN_STEP_WAIT_S = 0.1
"""How long a step waits for blocks that the device has evicted. All requests wait with it. The front end has
blocks computed that a slow disk, or a folder that hangs, does not give in this time."""

_log = logging.getLogger("blockft.serving")

Gather = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Loading:
    """A load of which some blocks come from the store; `in_memory` are those that it need not load."""

    load: Load
    in_memory: Mapping[BlockKey, torch.Tensor]


@dataclass(frozen=True)
class PendingWrite:
    """Blocks that are being written into the pages of a request. sources: where each of them came from."""

    load: Load
    sources: list[str]
    work: DeviceWork
    blocks: Sequence[torch.Tensor]


class WorkerHalf:
    """Loads blocks into pages and stores computed blocks, for one worker.

    page_len: the number of tokens in a page of vLLM's scheduler.
    """

    def __init__(self, served: ServedModel, page_len: int) -> None:
        self._served, self._page_len = served, page_len
        self._reporter = Reporter()
        self._loading: dict[Future[LoadedBlocks], Loading] = {}
        self._writing: list[PendingWrite] = []
        self._in_use: deque[tuple[DeviceWork, Sequence[torch.Tensor]]] = deque()
        self._finished: set[str] = set()
        self._bad_pages: set[int] = set()
        self._evicted: set[BlockKey] = set()
        self._loaded_in_step: list[tuple[Load, Sequence[str]]] = []
        self._store: BlockStore | None = None

    def use_layers(
        self, layers: Sequence[AttentionLayer], shard: HeadShard = WHOLE, gather: Gather | None = None
    ) -> None:
        """Take the attention layers of the model, in order, and open the tiers.

        shard: the heads of this worker. gather: returns the heads of all workers in order (..., K, D), from
        those of this worker; all workers call it together.

        Raises:
            UserError: the attention backend cannot write pages by itself, their layout is not supported, the
                model's files have changed, the cache folder cannot be used, or the device lacks memory for
                its tier.
        """
        assert len(layers) == self._served.shape.num_layers, f"vLLM has {len(layers)} attention layers"
        check_backend(layers)
        self._served.check_files()
        self._layers, self._shard, self._gather = layers, shard, gather
        self._shape = shard.local_shape(self._served.shape)
        PageLayout(layers[0], self._shape, self._page_len)  # raises an error for an unknown layout
        device = layers[0].kv_cache.device
        self._rotaries = _on_device(self._served.rotaries, device)
        self._stream = BackgroundStream(device)
        self._write_pages = self._page_writer()
        self._device_tier = None
        if self._served.device_bytes:
            bytes_of_worker = self._served.device_bytes // shard.num_workers
            self._device_tier = DeviceTier(self._shape, device, bytes_of_worker)
        if device.type == "cuda" and shard.worker == 0:
            notify("memory for blocks (--host-bytes) is being pinned, which takes a while")
        self._store = BlockStore(
            self._served, num_workers=shard.num_workers, pin_memory=device.type == "cuda"
        )
        self._computed = ComputedBlocks(self._store, device, wait_for_disk=shard.num_workers > 1)

    def load(self, loads: Sequence[Load], *, is_idle: bool) -> None:
        """Start loads, and write the blocks of earlier loads that are on the host now."""
        while self._in_use and self._in_use[0][0].is_done():
            self._in_use.popleft()
        started, wait_until = [], time.monotonic() + IN_STEP_WAIT_S
        for load in loads:
            if load.refusal:
                self._fail(load, Report(failure=load.refusal))
            elif load.in_step:
                self._load_in_step(load, wait_until)
            elif future := self._start(load):
                started.append(future)
        if is_idle and not self._finished and not self._writing:
            wait([*self._loading], IDLE_WAIT_S, FIRST_COMPLETED)
        else:
            wait(started, START_WAIT_S)
        for future in [future for future in self._loading if future.done()]:
            self._end_load(self._loading.pop(future), future)
        if is_idle and self._writing:
            self._writing[0].work.wait()  # no forward pass is delayed

    def report(self, prefix_hits: Sequence[PrefixHit]) -> None:
        """Report the blocks of this step's requests, whose forward pass is enqueued and does not wait."""
        loaded, self._loaded_in_step = self._loaded_in_step, []
        for load, sources in loaded:
            self._send_sources(load.reply_to, sources)
            self._opened.touch(load.keys)
        for hit in prefix_hits:
            self._send_sources(hit.reply_to, [Tier.device.value] * hit.num_blocks)

    def save(self, saves: Sequence[Save]) -> None:
        """Read blocks from their pages, and store them in the background."""
        if not saves:
            return
        others_wait = self._gather is not None
        try:
            kv = self._read(saves)
            others_wait = False
            if self._shard.worker == 0:
                self._keep(saves, kv)
        except Exception as error:  # such as too little memory: the requests of these blocks fail alone
            if others_wait:
                raise  # for the heads of this worker, in the same step
            for save in saves:
                self._report_unsaved(save, error)

    def take_finished(self) -> set[str]:
        """Return the requests whose loads have ended, well or not, since the last call."""
        for pending in [pending for pending in self._writing if pending.work.is_done()]:
            self._writing.remove(pending)
            self._finished.add(pending.load.request_id)
            self._send_sources(pending.load.reply_to, pending.sources)
        finished, self._finished = self._finished, set()
        return finished

    def take_bad_pages(self) -> set[int]:
        """Return the pages that could not be written since the last call. vLLM fails their requests."""
        bad_pages, self._bad_pages = self._bad_pages, set()
        return bad_pages

    def take_evicted(self) -> set[BlockKey]:
        """Return the blocks that the device tier has lost, or has never got, since the last call."""
        evicted, self._evicted = self._evicted, set()
        return {key for key in evicted if not self._is_in_device_tier(key)}

    def close(self, limit_s: float) -> None:
        """Wait until the folder has all blocks, at most `limit_s`, and warn if it does not get all."""
        if self._store is not None:
            # Ctrl-C reaches every process of a server, and vLLM then sends this one SIGTERM, too
            with ignore_signals():
                num_unwritten = self._computed.close(limit_s)
            if num_unwritten:
                _log.warning(
                    f"the server ends, and {self._served.folder} does not get all computed blocks: "
                    f"{num_unwritten} were not written within {limit_s:g} s and will be computed again"
                )
            self._store.close(wait=not num_unwritten)
        self._reporter.close()

    @property
    def _opened(self) -> BlockStore:
        assert self._store is not None
        return self._store

    def _page_writer(self) -> Callable[[Sequence[torch.Tensor], int, torch.Tensor], None]:
        """Return the function that writes blocks into pages; see `write_blocks`."""
        model = (self._layers, self._rotaries, self._shape, self._page_len, self._shard)
        writer, reason = open_page_writer(self._served.page_writer, *model)
        if self._shard.worker == 0:
            notify(f"{'Triton' if writer else 'PyTorch'} writes cached blocks into pages: {reason}")
        if writer:
            return writer.write
        return lambda blocks, context_len, slots: write_blocks(
            self._layers, self._rotaries, blocks, context_len, slots, self._shape, self._shard
        )

    def _read(self, saves: Sequence[Save]) -> torch.Tensor:
        """Return the keys and values of blocks, one after the other, with the heads of all workers."""
        slots = []
        for save in saves:
            start = num_first(save.key)
            slots.append(page_slots(save.pages, self._page_len, start, start + num_tokens(save.key)))
        kv = read_blocks(self._layers, self._shape, self._page_len, torch.cat(slots))
        if self._gather is None:
            return kv
        return self._shard.join(self._gather(kv), self._served.shape.num_kv_heads)

    def _keep(self, saves: Sequence[Save], kv: torch.Tensor) -> None:
        """Keep blocks that `_read` returned for the requests that need them, and store them."""
        blocks = []
        for save, part in zip(saves, kv.split([num_tokens(save.key) for save in saves], dim=1), strict=True):
            start = num_first(save.key)  # a stored block has positions 0..n-1
            blocks.append((save.key, move_keys(part, self._rotaries, -start) if start else part))
        for save, future in zip(saves, self._computed.add(blocks), strict=True):
            future.add_done_callback(partial(self._report_saved, save))

    def _load_in_step(self, load: Load, wait_until: float) -> None:
        """Write the blocks of a load before the forward pass of this step, which uses them.

        They are on the device. If it has evicted some, the step waits for them, but not longer than until
        `wait_until`.
        """
        in_memory, to_load = self._find(load)
        if not to_load:
            self._write(load, in_memory, {})
        elif loaded := self._take(load, lambda: self._load_until(wait_until, to_load)):
            self._write(load, {**in_memory, **loaded.blocks}, loaded.tiers)

    def _load_until(self, wait_until: float, keys: Sequence[BlockKey]) -> LoadedBlocks:
        """Return blocks from the store. They are missing if it does not have them in time."""
        future = self._opened.load(keys)
        wait([future], max(wait_until - time.monotonic(), 0))
        if future.done():
            return future.result()
        _log.warning(
            f"{len(keys)} blocks take longer to load than a step may wait ({IN_STEP_WAIT_S} s): they are "
            "computed again"
        )
        return LoadedBlocks(missing={*keys})

    def _start(self, load: Load) -> Future[LoadedBlocks] | None:
        """Write the blocks of a load, or start to load those that memory does not have."""
        self._opened.touch(load.keys)
        in_memory, to_load = self._find(load)
        if not to_load:
            self._write(load, in_memory, {})
            return None
        future = self._opened.load(to_load)
        self._loading[future] = Loading(load, in_memory)
        return future

    def _find(self, load: Load) -> tuple[dict[BlockKey, torch.Tensor], list[BlockKey]]:
        """Return the needed blocks that were computed just now, and those that the store must load.

        The device tier has the others.
        """
        in_memory, to_load = dict[BlockKey, torch.Tensor](), list[BlockKey]()
        for key in dict.fromkeys(load.needed_keys):
            if self._is_in_device_tier(key):
                continue
            kv = self._computed.get(key)
            if kv is None:
                to_load.append(key)
            else:
                in_memory[key] = kv
        return in_memory, to_load

    def _take(self, load: Load, result: Callable[[], LoadedBlocks]) -> LoadedBlocks | None:
        """Return what the store has loaded. If that is not all, the request of the load fails: None."""
        try:
            loaded = result()
        except Exception as error:  # the request fails with it, and no other request
            self._fail_with(load, error)
            return None
        if loaded.missing:
            missing = [index for index, key in enumerate(load.keys) if key in loaded.missing]
            self._fail(load, Report(missing=missing))
            return None
        return loaded

    def _end_load(self, loading: Loading, future: Future[LoadedBlocks]) -> None:
        load = loading.load
        loaded = self._take(load, future.result)
        if loaded is None:
            return
        blocks = {**loading.in_memory, **loaded.blocks}
        if all(key in blocks or self._is_in_device_tier(key) for key in load.needed_keys):
            self._write(load, blocks, loaded.tiers)
        else:  # the device tier has evicted a block meanwhile
            self._start(load)

    def _write(
        self, load: Load, blocks: Mapping[BlockKey, torch.Tensor], tiers: Mapping[BlockKey, Tier]
    ) -> None:
        """Enqueue writes of needed blocks into pages, beside the forward passes or before the next one.

        The device tier has all needed blocks but `blocks`.
        """
        try:
            sources = self._sources(load, blocks, tiers)
            slots = page_slots(load.pages, self._page_len, load.start, load.context_len)
            with self._stream.run():
                used = self._through_device_tier(load.needed_keys, blocks)
                if not load.in_step:
                    self._write_pages(used, load.context_len, slots)
            if load.in_step:
                self._wait_for_device_tier(load.needed_keys, blocks)
                self._write_pages(used, load.context_len, slots)
        except Exception as error:  # the request fails with it, and no other request
            # its pages go to other requests
            self._stream.enqueued().wait()
            current_work(self._layers[0].kv_cache.device).wait()
            self._fail_with(load, error)
            return
        # the blocks stay in memory until the device has read them
        read = used + [*blocks.values()]
        if load.in_step:
            self._in_use.append((current_work(self._layers[0].kv_cache.device), read))
            self._loaded_in_step.append((load, sources))
        else:
            self._writing.append(PendingWrite(load, sources, self._stream.enqueued(), read))

    def _wait_for_device_tier(self, keys: Sequence[BlockKey], new: Mapping[BlockKey, torch.Tensor]) -> None:
        """Let the current stream wait for the copies of blocks into the device tier, which may still run.

        new: blocks that were not there before.
        """
        if new:
            self._stream.enqueued().hold_back_stream()
        for pending in self._writing:
            if not {*keys}.isdisjoint(pending.load.needed_keys):
                pending.work.hold_back_stream()

    def _is_in_device_tier(self, key: BlockKey) -> bool:
        return self._device_tier is not None and key in self._device_tier

    def _through_device_tier(
        self, keys: Sequence[BlockKey], blocks: Mapping[BlockKey, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return blocks, if they fit there from the device tier, into which the new ones are copied.

        The tier has the heads of this worker alone.
        """
        tier, distinct = self._device_tier, dict.fromkeys(keys)
        if tier is None or sum(map(num_tokens, distinct)) > tier.num_slots:
            return [tier.block(key) if tier is not None and key in tier else blocks[key] for key in keys]
        new = [key for key in distinct if key not in tier]
        with tier.add(new, distinct) as evicted:
            self._evicted.update(evicted)
            for key in new:
                on_device = blocks[key].to(tier.cache_LS2KD.device, non_blocking=True)
                tier.block(key).copy_(self._shard.take(on_device))
        for key in distinct:
            tier.slot(key)  # counts as used
        return [tier.block(key) for key in keys]

    def _sources(
        self, load: Load, blocks: Mapping[BlockKey, torch.Tensor], tiers: Mapping[BlockKey, Tier]
    ) -> list[str]:
        """Return where each block came from. Blocks before `load.start` were in pages already."""
        sources = [Tier.device.value] * len(load.keys)
        for index in range(len(load.keys) - len(load.needed_keys), len(load.keys)):
            key = load.keys[index]
            if self._is_in_device_tier(key):
                continue
            on_device = key not in tiers and blocks[key].is_cuda
            sources[index] = (Tier.device if on_device else tiers.get(key, Tier.host)).value
        return sources

    def _fail_with(self, load: Load, error: Exception) -> None:
        _log.error(f"the blocks of request {load.request_id} could not be loaded", exc_info=error)
        self._fail(load, Report(failure=f"its blocks could not be loaded: {first_line(error)}"))

    def _fail(self, load: Load, report: Report) -> None:
        if load.in_step:
            self._evicted.update(load.needed_keys)  # the scheduler believes that the device tier has them
        else:  # vLLM waits for the end of these loads alone
            self._finished.add(load.request_id)
        self._bad_pages.update(load.pages[load.start // self._page_len :])
        self._reporter.send(load.reply_to, report)

    def _send_sources(self, reply_to: ReplyAddress, sources: Sequence[str]) -> None:
        if self._shard.worker == 0:
            self._reporter.send(reply_to, Report(sources=sources))

    def _report_saved(self, save: Save, future: Future[str]) -> None:
        if error := future.exception():
            self._report_unsaved(save, error)
        else:
            self._reporter.send(save.reply_to, Report(block=key_digest(save.key), failure=future.result()))

    def _report_unsaved(self, save: Save, error: BaseException) -> None:
        _log.error("a block could not be stored", exc_info=error)
        failure = f"a block could not be stored: {first_line(error)}"
        self._reporter.send(save.reply_to, Report(block=key_digest(save.key), failure=failure))


def _on_device(rotaries: Sequence[RotaryEmbedding], device: torch.device) -> list[RotaryEmbedding]:
    """Return the rotary embeddings on a device, so that no shift waits for a copy. Equal layers share one."""
    moved = {id(rotary): RotaryEmbedding(rotary.inv_freq.to(device)) for rotary in rotaries}
    return [moved[id(rotary)] for rotary in rotaries]
