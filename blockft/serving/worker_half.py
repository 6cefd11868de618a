"""The connector's half in a worker of vLLM: moves blocks between the block store and the pages.

Blocks are read in a thread. They are copied to a GPU and written into pages on a stream of its own, beside
the forward passes, which do not use the pages of a request that waits. A request whose blocks cannot be
loaded fails alone. With several tensor-parallel workers each one loads its own heads.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial

import torch

from blockft.attention.rope import RotaryEmbedding
from blockft.errors import first_line
from blockft.inference.block_cache import Tier
from blockft.inference.block_key import BlockKey, num_first, num_tokens
from blockft.inference.device_tier import DeviceTier
from blockft.serving.block_request import ReplyAddress, page_slots
from blockft.serving.block_store import BlockStore, LoadedBlocks
from blockft.serving.device_work import BackgroundStream, DeviceWork
from blockft.serving.head_shard import HeadShard
from blockft.serving.pages import (
    WHOLE,
    AttentionLayer,
    PageLayout,
    move_keys,
    read_block,
    write_blocks,
)
from blockft.serving.report import Report, Reporter
from blockft.serving.scheduler_half import Load, Save
from blockft.serving.served_model import ServedModel
from blockft.serving.supported_engine import check_backend

IDLE_WAIT_S = 0.005
"""How long a step without tokens waits for blocks. Otherwise the engine would use a core to wait."""

START_WAIT_S = 0.001
"""How long a step waits for the loads that it starts. Blocks in memory come in time, and spare a step."""

_log = logging.getLogger("blockft.serving")

Gather = Callable[[torch.Tensor], torch.Tensor]


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
        self._loading: dict[Future[LoadedBlocks], Load] = {}
        self._writing: list[PendingWrite] = []
        self._finished: set[str] = set()
        self._bad_pages: set[int] = set()
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
        self._device_tier = None
        if self._served.device_bytes:
            bytes_of_worker = self._served.device_bytes // shard.num_workers
            self._device_tier = DeviceTier(self._shape, device, bytes_of_worker)
        self._store = BlockStore(
            self._served, num_workers=shard.num_workers, pin_memory=device.type == "cuda"
        )

    def load(self, loads: Sequence[Load], *, is_idle: bool) -> None:
        """Start loads, and write the blocks of earlier loads that are on the host now."""
        started = []
        for load in loads:
            if load.refusal:
                self._fail(load, Report(failure=load.refusal))
            elif self._device_tier is not None and all(key in self._device_tier for key in load.keys):
                self._opened.touch(load.keys)
                self._write(load, LoadedBlocks(tiers=[Tier.device] * len(load.keys)))
            else:
                started.append(self._opened.load(load.keys))
                self._loading[started[-1]] = load
        if is_idle and not self._finished and not self._writing:
            wait([*self._loading], IDLE_WAIT_S, FIRST_COMPLETED)
        else:
            wait(started, START_WAIT_S)
        for future in [future for future in self._loading if future.done()]:
            self._end_load(self._loading.pop(future), future)
        if is_idle and self._writing:
            self._writing[0].work.wait()  # no forward pass is delayed

    def save(self, saves: Sequence[Save]) -> None:
        """Read blocks from their pages, and store them in the background."""
        for save in saves:
            try:
                self._save(save)
            except Exception as error:  # such as too little memory: the block's requests fail alone
                if self._gather is not None:
                    raise  # the other workers wait for the heads of this one
                self._report_unsaved(save.reply_to, error)

    def take_finished(self) -> set[str]:
        """Return the requests whose loads have ended, well or not, since the last call."""
        for pending in [pending for pending in self._writing if pending.work.is_done()]:
            self._writing.remove(pending)
            self._finished.add(pending.load.request_id)
            if self._shard.worker == 0:
                self._reporter.send(pending.load.reply_to, Report(sources=pending.sources))
        finished, self._finished = self._finished, set()
        return finished

    def take_bad_pages(self) -> set[int]:
        """Return the pages that could not be written since the last call. vLLM fails their requests."""
        bad_pages, self._bad_pages = self._bad_pages, set()
        return bad_pages

    def close(self) -> None:
        """Wait until the folder has all blocks."""
        if self._store is not None:
            self._store.close()
        self._reporter.close()

    @property
    def _opened(self) -> BlockStore:
        assert self._store is not None
        return self._store

    def _save(self, save: Save) -> None:
        start = num_first(save.key)
        slots = page_slots(save.pages, self._page_len, start, start + num_tokens(save.key))
        kv = read_block(self._layers, self._shape, self._page_len, slots)
        if start:  # a stored block has positions 0..n-1
            kv = move_keys(kv, self._rotaries, -start)
        if self._gather is not None:
            kv = self._shard.join(self._gather(kv), self._served.shape.num_kv_heads)
        if self._shard.worker == 0:
            future = self._opened.insert(save.key, *self._stream.copy_to_host(kv))
            future.add_done_callback(partial(self._report_saved, save.reply_to))

    def _end_load(self, load: Load, future: Future[LoadedBlocks]) -> None:
        try:
            loaded = future.result()
        except Exception as error:  # the request fails with it, and no other request
            self._fail_with(load, error)
            return
        if loaded.missing:
            self._fail(load, Report(missing=loaded.missing))
        else:
            self._write(load, loaded)

    def _write(self, load: Load, loaded: LoadedBlocks) -> None:
        """Start to write the blocks of a load into its pages."""
        try:
            sources = _sources(load, self._device_tier, loaded.tiers)
            slots = page_slots(load.pages, self._page_len, load.start, sum(map(num_tokens, load.keys)))
            with self._stream.run():
                blocks, shard = self._through_device_tier(load.keys, loaded.blocks)
                write_blocks(self._layers, self._rotaries, blocks, slots, shard)
        except Exception as error:  # the request fails with it, and no other request
            self._stream.enqueued().wait()  # its pages go to other requests
            self._fail_with(load, error)
            return
        # the blocks stay in memory until the device has read them
        self._writing.append(PendingWrite(load, sources, self._stream.enqueued(), blocks))

    def _through_device_tier(
        self, keys: Sequence[BlockKey], blocks: Sequence[torch.Tensor]
    ) -> tuple[Sequence[torch.Tensor], HeadShard]:
        """Return the blocks from the device tier, into which the new ones are copied, if they fit there.

        The second result says which of their heads this worker needs.
        """
        tier, distinct = self._device_tier, dict.fromkeys(keys)
        if tier is None or sum(map(num_tokens, distinct)) > tier.num_slots:
            return blocks, self._shard
        new = {key: kv for key, kv in zip(keys, blocks, strict=False) if key not in tier}
        with tier.add([*new], distinct):
            for key, kv in new.items():
                on_device = kv.to(tier.cache_LS2KD.device, non_blocking=True)
                tier.block(key).copy_(self._shard.take(on_device))
        for key in distinct:
            tier.slot(key)  # counts as used
        return [tier.block(key) for key in keys], WHOLE

    def _fail_with(self, load: Load, error: Exception) -> None:
        _log.error(f"the blocks of request {load.request_id} could not be loaded", exc_info=error)
        self._fail(load, Report(failure=f"its blocks could not be loaded: {first_line(error)}"))

    def _fail(self, load: Load, report: Report) -> None:
        self._finished.add(load.request_id)
        self._bad_pages.update(load.pages[load.start // self._page_len :])
        self._reporter.send(load.reply_to, report)

    def _report_saved(self, reply_to: ReplyAddress, future: Future[str]) -> None:
        if error := future.exception():
            self._report_unsaved(reply_to, error)
        else:
            self._reporter.send(reply_to, Report(failure=future.result()))

    def _report_unsaved(self, reply_to: ReplyAddress, error: BaseException) -> None:
        _log.error("a block could not be stored", exc_info=error)
        self._reporter.send(reply_to, Report(failure=f"a block could not be stored: {first_line(error)}"))


def _on_device(rotaries: Sequence[RotaryEmbedding], device: torch.device) -> list[RotaryEmbedding]:
    """Return the rotary embeddings on a device, so that no shift waits for a copy. Equal layers share one."""
    moved = {id(rotary): RotaryEmbedding(rotary.inv_freq.to(device)) for rotary in rotaries}
    return [moved[id(rotary)] for rotary in rotaries]


def _sources(load: Load, device_tier: DeviceTier | None, tiers: Sequence[Tier]) -> list[str]:
    """Return where each block came from. Blocks before `load.start` were in pages already."""
    sources, end = [], 0
    for key, tier in zip(load.keys, tiers, strict=True):
        end += num_tokens(key)
        is_on_device = end <= load.start or (device_tier is not None and key in device_tier)
        sources.append(Tier.device.value if is_on_device else tier.value)
    return sources
