"""The connector's half in a worker of vLLM: moves blocks between the block store and the pages.

Blocks are loaded in the background. Pages are written by the worker's own thread between two forward passes,
so that no page is written while it may be read. A request whose blocks cannot be loaded fails alone.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial

from blockft.errors import first_line
from blockft.inference.block_cache import Tier
from blockft.inference.block_key import num_tokens
from blockft.serving.block_request import ReplyAddress, page_slots
from blockft.serving.block_store import BlockStore, LoadedBlocks
from blockft.serving.pages import AttentionLayer, PageLayout, read_block, write_blocks
from blockft.serving.report import Report, Reporter
from blockft.serving.scheduler_half import Load, Save
from blockft.serving.served_model import ServedModel
from blockft.serving.supported_engine import check_backend

IDLE_WAIT_S = 0.005
"""How long a step without tokens waits for blocks. Otherwise the engine would use a core to wait."""

_log = logging.getLogger("blockft.serving")


class WorkerHalf:
    """Loads blocks into pages and stores computed blocks, for one worker.

    Raises:
        UserError: the cache folder cannot be used.
    """

    def __init__(self, served: ServedModel, page_len: int) -> None:
        self._served, self._page_len = served, page_len
        self._store = BlockStore(served)
        self._reporter = Reporter()
        self._layers: Sequence[AttentionLayer] = ()
        self._loading: dict[Future[LoadedBlocks], Load] = {}
        self._finished: set[str] = set()
        self._bad_pages: set[int] = set()

    def use_layers(self, layers: Sequence[AttentionLayer]) -> None:
        """Take the attention layers of the model, in order.

        Raises:
            UserError: the attention backend cannot write pages by itself, or their layout is not supported.
        """
        assert len(layers) == self._served.shape.num_layers, f"vLLM has {len(layers)} attention layers"
        check_backend(layers)
        PageLayout(layers[0], self._served.shape, self._page_len)  # raises an error for an unknown layout
        self._layers = layers

    def load(self, loads: Sequence[Load], *, is_idle: bool) -> None:
        """Start loads, and write the blocks of earlier loads that are on the host now."""
        for load in loads:
            if load.refusal:
                self._fail(load, Report(failure=load.refusal))
            else:
                self._loading[self._store.load(load.keys)] = load
        if is_idle and not self._finished:
            wait([*self._loading], IDLE_WAIT_S, FIRST_COMPLETED)
        for future in [future for future in self._loading if future.done()]:
            self._write(self._loading.pop(future), future)

    def save(self, saves: Sequence[Save]) -> None:
        """Read blocks from their pages, and store them in the background."""
        for save in saves:
            slots = page_slots(save.pages, self._page_len, 0, num_tokens(save.key))
            kv = read_block(self._layers, self._served.shape, self._page_len, slots).cpu()
            future = self._store.insert(save.key, kv)
            future.add_done_callback(partial(self._report_saved, save.reply_to))

    def take_finished(self) -> set[str]:
        """Return the requests whose loads have ended, well or not, since the last call."""
        finished, self._finished = self._finished, set()
        return finished

    def take_bad_pages(self) -> set[int]:
        """Return the pages that could not be written since the last call. vLLM fails their requests."""
        bad_pages, self._bad_pages = self._bad_pages, set()
        return bad_pages

    def close(self) -> None:
        """Wait until the folder has all blocks."""
        self._store.close()
        self._reporter.close()

    def _write(self, load: Load, future: Future[LoadedBlocks]) -> None:
        try:
            loaded = future.result()
            if not loaded.missing:
                context_len = sum(map(num_tokens, load.keys))
                slots = page_slots(load.pages, self._page_len, load.start, context_len)
                write_blocks(self._layers, self._served.rotaries, loaded.blocks, slots)
        except Exception as error:  # the request fails with it, and no other request
            _log.exception(f"the blocks of request {load.request_id} could not be loaded")
            self._fail(load, Report(failure=f"its blocks could not be loaded: {first_line(error)}"))
            return
        if loaded.missing:
            self._fail(load, Report(missing=loaded.missing))
            return
        self._finished.add(load.request_id)
        self._reporter.send(load.reply_to, Report(sources=_sources(load, loaded.tiers)))

    def _fail(self, load: Load, report: Report) -> None:
        self._finished.add(load.request_id)
        self._bad_pages.update(load.pages[load.start // self._page_len :])
        self._reporter.send(load.reply_to, report)

    def _report_saved(self, reply_to: ReplyAddress, future: Future[str]) -> None:
        error = future.exception()
        if error is not None:
            _log.error("a block could not be stored", exc_info=error)
        failure = future.result() if error is None else f"a block could not be stored: {error}"
        self._reporter.send(reply_to, Report(failure=failure))


def _sources(load: Load, tiers: Sequence[Tier]) -> list[str]:
    """Return where each block came from. Blocks before `load.start` were in pages already."""
    sources, end = [], 0
    for key, tier in zip(load.keys, tiers, strict=True):
        end += num_tokens(key)
        sources.append(Tier.device.value if end <= load.start else tier.value)
    return sources
