"""The worker's half: loads blocks in the background, stores computed blocks, and fails single requests."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.testing import assert_close

from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, block_key, key_digest, num_tokens, token_ids
from blockft.inference.disk_tier import DiskTier
from blockft.serving.block_request import ReplyAddress, page_slots
from blockft.serving.block_store import BlockStore
from blockft.serving.computed_blocks import ComputedBlocks
from blockft.serving.head_shard import HeadShard
from blockft.serving.page_writer import open_page_writer
from blockft.serving.pages import read_blocks, write_blocks
from blockft.serving.report import Report, Reporter
from blockft.serving.scheduler_half import Load, PrefixHit, Save
from blockft.serving.served_model import ServedModel, list_files
from blockft.serving.worker_half import WorkerHalf
from tests.commands import TIMEOUT_S, wait_until
from tests.faults.interruption import Interruption
from tests.inference.cached import random_key
from tests.serving.stubs import PAGE_LEN, SHAPE, OneHeadPages, kv_of, make_layers, make_served

KEYS = [random_key(seed, length) for seed, length in enumerate((5, 4, 6))]
ADDRESS = ReplyAddress(socket="s", id="7")
SAVED = Report(block=key_digest(KEYS[0]))
DISK_TIER = "blockft.inference.disk_tier.DiskTier"


class Worker:
    """A worker with blocks in its folder, and the reports that it has sent."""

    def __init__(self, served: ServedModel, keys: Sequence[BlockKey]) -> None:
        by_blockft, by_vllm = served.open_disk_tiers()
        for index, key in enumerate(keys):  # of both kinds
            (by_blockft if index % 2 else by_vllm).write(key, kv_of(key))
        self.half, self.layers = WorkerHalf(served, PAGE_LEN), make_layers()
        self.half.use_layers(self.layers)

    def load(self, load: Load) -> tuple[set[str], set[int]]:
        """Run steps until a load has ended. Return the finished requests and the bad pages of its step."""
        self.half.load([load], is_idle=True)
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if finished := self.half.take_finished():
                return finished, self.half.take_bad_pages()
            assert not self.half.take_bad_pages()
            self.half.load([], is_idle=True)
        raise AssertionError("the load has not ended")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    sent: list[Report] = []
    monkeypatch.setattr(Reporter, "send", lambda self, address, report: sent.append(report))
    return sent


@pytest.fixture
def open_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def open_worker(keys: list[BlockKey], **changes: Any) -> Worker:
        workers.append(Worker(replace(make_served(tmp_path), **changes), keys))
        return workers[-1]

    yield open_worker
    for worker in workers:
        worker.half.close(TIMEOUT_S)


def make_load(start: int = 0, **changes: Any) -> Load:
    load = Load(request_id="a", keys=KEYS, pages=[7, 3, 9, 1, 12], start=start, reply_to=ADDRESS)
    return replace(load, **changes)


def wait_for(reports: list[Report]) -> Report:
    wait_until(lambda: reports)
    return reports.pop()


def test_blocks_of_both_kinds_are_loaded_into_pages(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker = open_worker(KEYS)
    assert worker.load(make_load()) == ({"a"}, set())
    found = read_blocks(worker.layers, SHAPE, PAGE_LEN, page_slots([7, 3, 9, 1], PAGE_LEN, 0, 15))
    values = torch.cat([kv_of(key) for key in KEYS], dim=1)[:, :, 1]
    assert_close(found[:, :, 1], values)
    assert_close(found[:, :5], kv_of(KEYS[0]), rtol=1e-6, atol=1e-6)
    assert reports == [Report(sources=["disk", "disk", "disk"])]
    worker.load(make_load(start=9, request_id="b"))
    assert reports[1:] == [Report(sources=["device", "device", "host"])]


def test_blocks_in_memory_are_ready_in_the_step_that_asks_for_them(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests are computed in this step. A second step would delay the first token."""
    worker = open_worker(KEYS)
    worker.load(make_load())
    monkeypatch.setattr("blockft.serving.worker_half.START_WAIT_S", TIMEOUT_S)
    worker.half.load([make_load(request_id="b"), make_load(request_id="c")], is_idle=False)
    assert worker.half.take_finished() == {"b", "c"}
    assert [report.sources for report in reports[1:]] == [["host"] * 3] * 2


def test_blocks_in_memory_do_not_wait_for_the_disk(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    """A slow disk, or a long write, would delay the requests that need no disk at all."""
    worker, may_end = open_worker(KEYS), Event()
    worker.load(make_load())
    reports.clear()
    stuck = worker.half._opened._thread.submit(may_end.wait, TIMEOUT_S)
    try:
        assert worker.load(make_load(request_id="b")) == ({"b"}, set())
        assert reports == [Report(sources=["host"] * 3)] and not stuck.done()
    finally:
        may_end.set()
    assert stuck.result(TIMEOUT_S)


def test_a_step_with_tokens_does_not_wait_for_a_slow_load(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, is_released = open_worker(KEYS), Event()
    load_now = BlockStore._load
    monkeypatch.setattr(
        BlockStore, "_load", lambda self, keys: is_released.wait(TIMEOUT_S) and load_now(self, keys)
    )
    worker.half.load([make_load()], is_idle=False)
    worker.half.load([], is_idle=False)
    assert not worker.half.take_finished() and not reports
    is_released.set()
    assert "a" in worker.load(make_load(request_id="b"))[0]


def test_a_missing_block_fails_its_request_alone(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker = open_worker([KEYS[0], KEYS[2]])
    finished, bad_pages = worker.load(make_load(start=4))
    assert finished == {"a"} and bad_pages == {3, 9, 1, 12}, "pages before the load are good"
    assert reports == [Report(missing=[1])]
    assert worker.load(make_load(keys=[KEYS[0]], request_id="b")) == ({"b"}, set())


def test_a_damaged_block_is_missing(open_worker: Callable[..., Worker], reports: list[Report]) -> None:
    worker = open_worker(KEYS)
    for file in Path(worker.half._served.folder).rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert worker.load(make_load())[1]
    assert reports == [Report(missing=[0, 1, 2])]


def test_a_refused_request_fails(open_worker: Callable[..., Worker], reports: list[Report]) -> None:
    assert open_worker(KEYS).load(make_load(start=8, keys=[], refusal="no")) == ({"a"}, {9, 1, 12})
    assert reports == [Report(failure="no")]


def test_an_error_while_blocks_are_written_fails_one_request(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker = open_worker(KEYS)
    assert worker.load(make_load(pages=[7]))[0] == {"a"}
    assert "could not be loaded" in reports.pop().failure
    assert worker.load(make_load(request_id="b")) == ({"b"}, set())


def test_a_computed_block_is_stored_for_later_servers(
    open_worker: Callable[..., Worker], reports: list[Report], tmp_path: Path
) -> None:
    worker = open_worker([])
    write_pages(worker, KEYS[0], [4, 2])
    worker.half.save([Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)])
    assert wait_for(reports) == SAVED
    worker.half.close(TIMEOUT_S)
    by_blockft, by_vllm = make_served(tmp_path).open_disk_tiers()
    assert KEYS[0] in by_vllm and KEYS[0] not in by_blockft
    later = open_worker([])
    assert later.load(make_load(keys=[KEYS[0]])) == ({"a"}, set())
    assert torch.equal(
        read_blocks(later.layers, SHAPE, PAGE_LEN, page_slots([7, 3], PAGE_LEN, 0, 5)), kv_of(KEYS[0])
    )


def test_a_block_that_sees_the_first_block_is_stored_without_it(
    open_worker: Callable[..., Worker], reports: list[Report], tmp_path: Path
) -> None:
    """Its keys move back to the first positions, where the keys of every stored block are."""
    worker, first_len, key = open_worker([]), 5, block_key(token_ids(KEYS[1]), token_ids(KEYS[0]))
    pages, served = [4, 2, 9], make_served(tmp_path)
    blocks = [kv_of(KEYS[0]), kv_of(key)]
    write_blocks(
        worker.layers, served.rotaries, blocks, 9, page_slots(pages, PAGE_LEN, 0, first_len + 4), SHAPE
    )
    worker.half.save([Save(key=key, pages=pages, reply_to=ADDRESS)])
    assert wait_for(reports) == Report(block=key_digest(key))
    worker.half.close(TIMEOUT_S)
    _, by_vllm = served.open_disk_tiers()
    assert key in by_vllm and KEYS[1] not in by_vllm and KEYS[0] not in by_vllm
    entry = by_vllm.open(key)
    assert entry is not None
    with entry:
        found = torch.stack([entry.read_layer(layer) for layer in range(SHAPE.num_layers)])
    assert_close(found, kv_of(key), rtol=1e-5, atol=1e-5)
    assert open_worker([]).load(make_load(keys=[KEYS[1]]))[1], "the same tokens behind no first block"


def write_pages(worker: Worker, key: BlockKey, pages: list[int]) -> None:
    """Write what vLLM has computed for a prompt that is one block."""
    slots = page_slots(pages, PAGE_LEN, 0, num_tokens(key))
    for index, layer in enumerate(worker.layers):
        layer.impl.do_kv_cache_update(layer, *kv_of(key)[index].unbind(1), layer.kv_cache, slots)


def test_computed_blocks_are_used_before_the_folder_has_them(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages have other contents by then. A cold prompt would wait for the disk otherwise."""
    worker, may_write = open_worker([], host_bytes=0), Event()
    write = DiskTier.write
    monkeypatch.setattr(DiskTier, "write", lambda *args: may_write.wait(TIMEOUT_S) and write(*args))
    for key, pages in zip(KEYS, ([4, 2], [5], [6, 8]), strict=True):
        write_pages(worker, key, pages)
    saves = zip(KEYS, ([4, 2], [5], [6, 8]), strict=True)
    worker.half.save([Save(key=key, pages=pages, reply_to=ADDRESS) for key, pages in saves])
    for layer in worker.layers:
        layer.kv_cache.fill_(-1)
    assert {wait_for(reports).block for _ in KEYS} == {*map(key_digest, KEYS)}
    for number in range(2):
        assert worker.load(make_load(request_id=str(number))) == ({str(number)}, set())
        assert reports.pop() == Report(sources=["host"] * 3)
    found = read_blocks(worker.layers, SHAPE, PAGE_LEN, page_slots([7, 3, 9, 1], PAGE_LEN, 0, 15))
    assert_close(found[:, :, 1], torch.cat([kv_of(key)[:, :, 1] for key in KEYS], dim=1))
    may_write.set()
    worker.half.close(TIMEOUT_S)
    assert open_worker([]).load(make_load()) == ({"a"}, set())
    assert reports == [Report(sources=["disk"] * 3)]


def save(worker: Worker, key: BlockKey, pages: list[int]) -> None:
    """Compute a block, and store it."""
    write_pages(worker, key, pages)
    worker.half.save([Save(key=key, pages=pages, reply_to=ADDRESS)])


def num_stored(served: ServedModel) -> int:
    return len([*Path(served.folder).rglob("*.safetensors")])


def test_the_end_waits_for_the_blocks_that_the_folder_does_not_have(
    open_worker: Callable[..., Worker],
    reports: list[Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their requests were answered. Signals do not end the process meanwhile: Ctrl-C gives it two."""
    worker, write = open_worker([]), DiskTier.write
    is_closing = Event()

    def write_at_the_end(*arguments: Any) -> None:
        assert is_closing.wait(TIMEOUT_S)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        write(*arguments)

    monkeypatch.setattr(DiskTier, "write", write_at_the_end)
    for key, pages in zip(KEYS, ([4, 2], [5], [6, 8]), strict=True):
        save(worker, key, pages)
    assert {wait_for(reports).block for _ in KEYS} == {*map(key_digest, KEYS)}
    assert not num_stored(worker.half._served)
    wait_for_blocks = ComputedBlocks.close
    monkeypatch.setattr(
        ComputedBlocks, "close", lambda self, limit: is_closing.set() or wait_for_blocks(self, limit)
    )
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        worker.half.close(TIMEOUT_S)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert num_stored(worker.half._served) == len(KEYS) and not received
    assert not caplog.records


@pytest.mark.parametrize("num_begun", [0, 1])
def test_the_end_says_how_many_blocks_the_folder_does_not_get(
    tmp_path: Path,
    reports: list[Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_begun: int,
) -> None:
    """A folder that hangs does not keep the process. Writes that have not begun are left out."""
    worker, write = Worker(make_served(tmp_path), []), DiskTier.write
    calls, is_stuck, may_write = count(), Event(), Event()

    def write_until_stuck(*arguments: Any) -> None:
        if next(calls) >= num_begun:
            is_stuck.set()
            assert may_write.wait(TIMEOUT_S)
        write(*arguments)

    monkeypatch.setattr(DiskTier, "write", write_until_stuck)
    for key, pages in zip(KEYS, ([4, 2], [5], [6, 8]), strict=True):
        save(worker, key, pages)
        wait_for(reports)
    assert is_stuck.wait(TIMEOUT_S)
    wait_until(lambda: num_stored(worker.half._served) == num_begun)
    worker.half.close(0.1)
    (record,) = caplog.records
    assert f"{len(KEYS) - num_begun} were not written within 0.1 s" in record.message
    may_write.set()
    for cache in worker.half._opened._caches:
        cache._writer.shutdown()
    assert num_stored(worker.half._served) == num_begun + 1, "the write that had begun"
    assert len(caplog.records) == 1


def test_blocks_that_cannot_be_stored_do_not_hold_up_the_end(
    open_worker: Callable[..., Worker],
    reports: list[Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A block that overflows, one that finds no memory, and one of a damaged device."""
    worker = open_worker([])
    write_pages(worker, KEYS[0], [4, 2])
    worker.layers[1].kv_cache[4].fill_(float("inf"))
    worker.half.save([Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)])
    assert "not finite" in wait_for(reports).failure
    for place, key in (("block_store.BlockStore.empty", KEYS[1]), ("device_work.DeviceWork.wait", KEYS[2])):
        with monkeypatch.context() as patch:
            patch.setattr(f"blockft.serving.{place}", Mock(side_effect=MemoryError("no memory")))
            save(worker, key, [5, 6])
            wait_until(lambda: not worker.half._computed._unwritten)
    caplog.clear()
    worker.half.close(TIMEOUT_S)
    assert not caplog.records


def test_the_blocks_of_a_step_are_read_at_once(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, calls = open_worker([]), Mock(side_effect=read_blocks)
    monkeypatch.setattr("blockft.serving.worker_half.read_blocks", calls)
    saves = [Save(key=key, pages=[4, 2], reply_to=ADDRESS) for key in KEYS]
    worker.half.save(saves)
    assert {wait_for(reports).block for _ in KEYS} == {*map(key_digest, KEYS)}
    calls.assert_called_once()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_overflows_is_never_used_and_spares_the_blocks_of_its_step(
    open_worker: Callable[..., Worker], reports: list[Report], number: float
) -> None:
    worker = open_worker([])
    write_pages(worker, KEYS[0], [4, 2])
    write_pages(worker, KEYS[1], [5])
    worker.layers[2].kv_cache[5, 1, 3, 1, 3] = number
    saves = [
        Save(key=key, pages=pages, reply_to=ADDRESS) for key, pages in ((KEYS[0], [4, 2]), (KEYS[1], [5]))
    ]
    worker.half.save(saves)
    failures = {report.block: report.failure for report in (wait_for(reports), wait_for(reports))}
    assert not failures[key_digest(KEYS[0])] and "not finite" in failures[key_digest(KEYS[1])]
    assert worker.load(make_load(keys=KEYS[:2]))[1] and reports.pop() == Report(missing=[1])
    assert worker.load(make_load(keys=KEYS[:1], request_id="b")) == ({"b"}, set())


def test_a_step_waits_while_too_many_blocks_wait_for_their_copy(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device would run out of memory otherwise."""
    monkeypatch.setattr("blockft.serving.computed_blocks.MAX_WAITING_BYTES", SHAPE.block_bytes(KEYS[0]))
    worker, may_copy, ended = open_worker([]), Event(), Event()
    copy = ComputedBlocks._copy
    monkeypatch.setattr(ComputedBlocks, "_copy", lambda *args: may_copy.wait(TIMEOUT_S) and copy(*args))

    def save_twice() -> None:
        for key in (KEYS[0], KEYS[1]):
            worker.half.save([Save(key=key, pages=[4, 2], reply_to=ADDRESS)])
        worker.half.save([Save(key=KEYS[2], pages=[4, 2], reply_to=ADDRESS)])
        ended.set()

    thread = Thread(target=save_twice)
    thread.start()
    assert {wait_for(reports).block, wait_for(reports).block} == {key_digest(KEYS[0]), key_digest(KEYS[1])}
    assert not ended.wait(0.2), "the third block waits for the first two"
    may_copy.set()
    thread.join(TIMEOUT_S)
    assert ended.is_set() and wait_for(reports).block == key_digest(KEYS[2])


def test_several_workers_use_a_block_when_the_folder_has_it(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other workers read it there."""
    worker, may_write = open_worker([]), Event()
    worker.half.close(TIMEOUT_S)
    shard, layers = HeadShard(num_workers=2), make_layers(OneHeadPages)
    worker.half.use_layers(layers, shard, lambda part: torch.cat((part, part), dim=3))
    write = DiskTier.write
    monkeypatch.setattr(DiskTier, "write", lambda *args: may_write.wait(TIMEOUT_S) and write(*args))
    worker.half.save([Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)])
    time.sleep(0.2)
    assert not reports
    may_write.set()
    assert wait_for(reports) == SAVED


def test_an_error_while_a_block_is_read_fails_its_requests_alone(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as too little memory for a long block. With several workers the others would wait for ever."""
    worker = open_worker([])
    save = Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)
    with monkeypatch.context() as patch:
        patch.setattr("blockft.serving.worker_half.read_blocks", Mock(side_effect=MemoryError("no memory")))
        worker.half.save([save])
        assert reports.pop() == replace(SAVED, failure="a block could not be stored: no memory")
        worker.half._gather = lambda part: part
        with pytest.raises(MemoryError):
            worker.half.save([save])
    worker.half._gather = None
    worker.half.save([save])
    assert wait_for(reports) == SAVED


def test_an_error_after_the_heads_of_all_workers_are_read_fails_its_requests_alone(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other worker waits by then."""
    worker, save = open_worker([]), Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)
    worker.half._gather = lambda part: part
    with monkeypatch.context() as patch:
        patch.setattr(ComputedBlocks, "add", Mock(side_effect=MemoryError("no memory")))
        worker.half.save([save])
    assert reports.pop() == replace(SAVED, failure="a block could not be stored: no memory")
    worker.half.save([save])
    assert wait_for(reports) == SAVED


def test_no_step_waits_for_blocks_that_cannot_be_copied(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockft.serving.computed_blocks.MAX_WAITING_BYTES", 0)
    worker, save = open_worker([]), Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)
    computed = worker.half._computed
    computed._wait_for_disk = True
    with monkeypatch.context() as patch:
        patch.setattr(computed._copier, "submit", Mock(side_effect=RuntimeError("no thread")))
        worker.half.save([save])
        assert wait_for(reports) == replace(SAVED, failure="a block could not be stored: no thread")
    assert computed.get(KEYS[0]) is None
    thread = Thread(target=worker.half.save, args=([save],), daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive() and wait_for(reports) == SAVED


@pytest.mark.parametrize("wait_for_disk", [False, True])
@pytest.mark.parametrize("place", ["blockft.serving.block_store.BlockStore.insert", f"{DISK_TIER}.write"])
def test_a_block_that_is_lost_before_the_folder_has_it_is_told_and_missing(
    open_worker: Callable[..., Worker],
    reports: list[Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    wait_for_disk: bool,
) -> None:
    """Other workers read it in the folder. Without them it may be used until it is lost."""
    worker = open_worker([], host_bytes=0)
    worker.half._computed._wait_for_disk = wait_for_disk
    with monkeypatch.context() as patch:
        patch.setattr(place, Mock(side_effect=MemoryError("no memory")))
        worker.half.save([Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)])
        failure = "a block could not be stored: no memory" if wait_for_disk else ""
        assert wait_for(reports) == replace(SAVED, failure=failure)
        worker.half._computed.close(TIMEOUT_S)
        worker.half._opened._caches[1]._writer.shutdown()
        worker.half._opened._caches[1]._writes.clear()  # or closing the worker raises the error again
    assert worker.half._computed.get(KEYS[0]) is None
    assert ["no memory" in str(record.exc_info) for record in caplog.records] == [True]


def test_the_start_says_what_writes_pages_and_why(
    open_worker: Callable[..., Worker], capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the first of several workers says it."""
    open_worker([])
    reason = "the Triton kernel cannot write pages on a CPU"
    assert capsys.readouterr().err == f"blockft: PyTorch writes cached blocks into pages: {reason}\n"
    worker = open_worker([], page_writer="torch")
    assert capsys.readouterr().err.endswith("into pages: --page-writer torch\n")
    worker.half.close(TIMEOUT_S)
    worker.half.use_layers(make_layers(OneHeadPages), HeadShard(worker=1, num_workers=2))
    assert not capsys.readouterr().err


def test_a_kernel_that_was_asked_for_and_cannot_be_used_ends_the_start(
    open_worker: Callable[..., Worker],
) -> None:
    with pytest.raises(UserError, match="cannot write pages on a CPU: use --page-writer torch"):
        open_worker([], page_writer="triton")


def test_a_kernel_that_fails_is_told_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as without a compiler for Triton. A kernel that was asked for ends the start."""
    layers = [SimpleNamespace(kv_cache=SimpleNamespace(device=torch.device("cuda")))]
    error = RuntimeError("Failed to find C compiler\nmore")
    monkeypatch.setattr("blockft.serving.page_writer.PageWriter", Mock(side_effect=error))
    writer, reason = open_page_writer("auto", layers, [], SHAPE, 16)
    assert writer is None and reason == "the Triton kernel fails (Failed to find C compiler)"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.exc_info and record.exc_info[1] is error
    with pytest.raises(UserError, match=r"^Failed to find C compiler: use --page-writer torch$"):
        open_page_writer("triton", layers, [], SHAPE, 16)


def test_an_entry_that_another_worker_has_written_anew_is_read(
    open_worker: Callable[..., Worker], reports: list[Report], tmp_path: Path
) -> None:
    worker = open_worker(KEYS, host_bytes=0)
    for file in Path(worker.half._served.folder).rglob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert worker.load(make_load())[1]
    for key in KEYS:
        make_served(tmp_path).open_disk_tiers()[1].write(key, kv_of(key))
    assert worker.load(make_load(request_id="b")) == ({"b"}, set())


def test_a_file_of_a_model_is_removed_while_they_are_listed(tmp_path: Path) -> None:
    for number in count():
        (tmp_path / "config.json").touch()
        with Interruption(number, (tmp_path / "config.json").unlink) as interruption:
            assert {name for name, *_ in list_files(str(tmp_path))} <= {"config.json"}
        if not interruption.has_happened:
            break
    assert number > 1


def test_a_model_that_was_exported_again_since_its_fingerprint_is_refused(
    open_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    file = tmp_path / "model" / "model.safetensors"
    file.parent.mkdir()
    for content in ("old", "new"):
        file.write_text(content)
        os.utime(file, ns=(1, 1 if content == "old" else 2))
        if content == "old":
            changes = {"path": str(file.parent), "files": list_files(str(file.parent))}
            open_worker([], **changes)
    with pytest.raises(UserError, match=r"model\.safetensors has changed while the server started"):
        open_worker([], **changes)


def test_a_block_that_overflows_is_not_stored(
    open_worker: Callable[..., Worker], reports: list[Report], tmp_path: Path
) -> None:
    worker = open_worker([])
    worker.layers[1].kv_cache[4, 0, 0, 0, 0] = float("inf")
    worker.half.save([Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)])
    assert "not finite" in wait_for(reports).failure
    assert not any(KEYS[0] in tier for tier in make_served(tmp_path).open_disk_tiers())


def test_blocks_stay_in_memory_if_the_folder_loses_them(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker = open_worker(KEYS)
    worker.load(make_load())
    for file in Path(worker.half._served.folder).rglob("*.safetensors"):
        file.unlink()
    assert worker.load(make_load(request_id="b")) == ({"b"}, set())
    without_memory = open_worker([], host_bytes=0)
    assert without_memory.load(make_load())[1]


def test_the_device_tier_gives_blocks_that_host_and_disk_have_lost(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    """It holds 11 tokens: the last blocks of 4 and 6 tokens stay, and the first one does not fit beside."""
    worker = open_worker(KEYS, device_bytes=11 * SHAPE.token_bytes, host_bytes=0)
    for keys in (KEYS[:1], KEYS[1:]):
        assert worker.load(make_load(keys=keys)) == ({"a"}, set())
    for file in Path(worker.half._served.folder).rglob("*.safetensors"):
        file.unlink()
    pages, reversed_keys = [8, 2, 5], [KEYS[2], KEYS[1]]
    assert worker.load(make_load(keys=reversed_keys, pages=pages, request_id="b")) == ({"b"}, set())
    assert reports[1:] == [Report(sources=["disk", "disk"]), Report(sources=["device", "device"])]
    found = read_blocks(worker.layers, SHAPE, PAGE_LEN, page_slots(pages, PAGE_LEN, 0, 10))
    assert_close(found[:, :, 1], torch.cat([kv_of(key)[:, :, 1] for key in reversed_keys], dim=1))
    assert_close(found[:, :6], kv_of(KEYS[2]), rtol=1e-6, atol=1e-6)
    assert worker.load(make_load(keys=KEYS[:1], request_id="c"))[1], "it was evicted"


def test_a_load_in_the_step_of_its_request_is_written_at_once(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    """vLLM waits for the end of other loads alone. An end that it does not expect would end the server."""
    worker = open_worker(KEYS, device_bytes=20 * SHAPE.token_bytes)
    worker.load(make_load())
    pages = [2, 4, 6, 8]
    worker.half.load([make_load(pages=pages, request_id="b", in_step=True)], is_idle=False)
    found = read_blocks(worker.layers, SHAPE, PAGE_LEN, page_slots(pages, PAGE_LEN, 0, 15))
    assert_close(found[:, :, 1], torch.cat([kv_of(key)[:, :, 1] for key in KEYS], dim=1))
    assert not reports[1:], "the forward pass does not wait for the report"
    for _ in range(2):
        worker.half.report([])
        assert reports[1:] == [Report(sources=["device"] * 3)]
    assert not worker.half.take_finished() and not worker.half.take_bad_pages()


def test_blocks_in_the_prefix_cache_are_reported_by_one_worker(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker, hit = open_worker([]), PrefixHit(num_blocks=2, reply_to=ADDRESS)
    worker.half.report([hit])
    assert reports == [Report(sources=["device"] * 2)]
    worker.half._shard = HeadShard(worker=1, num_workers=2)
    worker.half.report([hit])
    assert len(reports) == 1


@pytest.mark.parametrize("start", [0, 8])
def test_blocks_that_nearer_places_give_are_not_evicted_from_the_host(
    open_worker: Callable[..., Worker], reports: list[Report], start: int
) -> None:
    """The first block comes from the device tier, and with a later start from vLLM's prefix cache."""
    new = random_key(3, 6)
    host_bytes, device_bytes = 17 * SHAPE.token_bytes, 0 if start else 15 * SHAPE.token_bytes
    worker = open_worker([*KEYS, new], host_bytes=host_bytes, device_bytes=device_bytes)
    for keys in (KEYS[:1], KEYS[1:2]):
        worker.load(make_load(keys=keys))
    assert worker.load(make_load(keys=[KEYS[0], KEYS[2]], start=start)) == ({"a"}, set())
    assert reports.pop() == Report(sources=["device", "disk"])
    worker.load(make_load(keys=[new]))
    host = worker.half._opened._host
    assert [key in host for key in (*KEYS, new)] == [True, False, True, True]


@pytest.mark.parametrize("source", ["host", "disk"])
def test_a_load_in_a_step_waits_for_blocks_that_the_device_tier_has_evicted(
    open_worker: Callable[..., Worker],
    reports: list[Report],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    """The scheduler does not know it. The request would be computed over pages without its blocks."""
    host_bytes = 1 << 20 if source == "host" else 0
    worker = open_worker(KEYS, device_bytes=20 * SHAPE.token_bytes, host_bytes=host_bytes)
    worker.load(make_load())
    worker.half._device_tier.drop(KEYS[1])
    load_now = BlockStore._load
    monkeypatch.setattr(BlockStore, "_load", lambda self, keys: time.sleep(0.2) or load_now(self, keys))
    pages = [2, 4, 6, 8]
    worker.half.load([make_load(pages=pages, request_id="b", in_step=True)], is_idle=False)
    found = read_blocks(worker.layers, SHAPE, PAGE_LEN, page_slots(pages, PAGE_LEN, 0, 15))
    assert_close(found[:, :, 1], torch.cat([kv_of(key)[:, :, 1] for key in KEYS], dim=1))
    worker.half.report([])
    assert reports[1:] == [Report(sources=["device", source, "device"])]
    assert not worker.half.take_finished() and not worker.half.take_bad_pages()


def test_a_load_in_a_step_fails_its_request_alone_if_a_block_is_lost(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = open_worker(KEYS[:2], device_bytes=20 * SHAPE.token_bytes)
    load = make_load(start=8, request_id="b", in_step=True)
    worker.half.load([load], is_idle=False)
    assert worker.half.take_bad_pages() == {9, 1, 12} and not worker.half.take_finished()
    monkeypatch.setattr(BlockStore, "load", Mock(side_effect=MemoryError("no memory")))
    worker.half.load([load], is_idle=False)
    assert worker.half.take_bad_pages() == {9, 1, 12} and not worker.half.take_finished()
    failure = "its blocks could not be loaded: no memory"
    assert reports == [Report(missing=[2]), Report(failure=failure)]
    assert worker.half.take_evicted() == {*load.needed_keys}, "the scheduler believes the tier has them"


def test_a_step_waits_for_a_short_time_for_blocks_that_the_device_tier_has_evicted(
    open_worker: Callable[..., Worker],
    reports: list[Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A network folder that hangs would stop the requests of all others, for ever."""
    worker, is_released = open_worker(KEYS, device_bytes=20 * SHAPE.token_bytes, host_bytes=0), Event()
    load_now = BlockStore._load
    monkeypatch.setattr(
        BlockStore, "_load", lambda self, keys: is_released.wait(TIMEOUT_S) and load_now(self, keys)
    )
    monkeypatch.setattr("blockft.serving.worker_half.IN_STEP_WAIT_S", 0.1)
    loads = [make_load(request_id=id, in_step=True, keys=keys) for id, keys in (("b", KEYS), ("c", KEYS[:1]))]
    worker.half.load(loads, is_idle=False)
    assert reports == [Report(missing=[0, 1, 2]), Report(missing=[0])]
    assert worker.half.take_bad_pages() == {*loads[0].pages} and not worker.half.take_finished()
    assert ["than a step may wait" in record.message for record in caplog.records] == [True, True]
    is_released.set()
    assert worker.load(make_load(request_id="d")) == ({"d"}, set())


def test_a_worker_tells_which_blocks_its_device_tier_has_evicted(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker = open_worker(KEYS, device_bytes=11 * SHAPE.token_bytes)
    worker.load(make_load(keys=KEYS[:2]))
    assert not worker.half.take_evicted()
    worker.load(make_load(keys=KEYS[2:], request_id="b"))
    evicted = worker.half.take_evicted()
    assert evicted == {key for key in KEYS[:2] if key not in worker.half._device_tier} and evicted
    assert not worker.half.take_evicted()
    worker.load(make_load(keys=KEYS[:2], request_id="c"))
    worker.load(make_load(keys=KEYS[2:], request_id="d"))
    worker.load(make_load(keys=KEYS[:2], request_id="e"))
    assert worker.half.take_evicted() == {KEYS[2]}, "the others have come back"


def test_computed_blocks_are_written_in_the_step_that_asks_for_them(
    open_worker: Callable[..., Worker], reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come into the device tier with it."""
    worker, may_write = open_worker([], host_bytes=0, device_bytes=20 * SHAPE.token_bytes), Event()
    write = DiskTier.write
    monkeypatch.setattr(DiskTier, "write", lambda *args: may_write.wait(TIMEOUT_S) and write(*args))
    write_pages(worker, KEYS[0], [4, 2])
    worker.half.save([Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)])
    assert wait_for(reports) == SAVED
    load = make_load(keys=KEYS[:1], in_step=True)
    worker.half.load([load], is_idle=False)
    found = read_blocks(worker.layers, SHAPE, PAGE_LEN, page_slots([7, 3], PAGE_LEN, 0, 5))
    assert torch.equal(found, kv_of(KEYS[0])) and KEYS[0] in worker.half._device_tier
    may_write.set()


def test_only_blocks_that_the_device_tier_lacks_are_loaded(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker = open_worker(KEYS, device_bytes=20 * SHAPE.token_bytes, host_bytes=0)
    worker.load(make_load(keys=KEYS[:2]))
    for key in KEYS[:2]:
        for tier in worker.half._served.open_disk_tiers():
            tier._path(key).unlink(missing_ok=True)
    assert worker.load(make_load(request_id="b")) == ({"b"}, set())
    assert reports[1:] == [Report(sources=["device", "device", "disk"])]


def test_a_block_that_the_device_tier_evicts_during_a_load_is_loaded_too(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker = open_worker(KEYS, device_bytes=11 * SHAPE.token_bytes, host_bytes=0)
    worker.load(make_load(keys=KEYS[:1]))
    start = worker.half._opened.load
    with pytest.MonkeyPatch.context() as patch:

        def load_and_evict(keys: Sequence[BlockKey]) -> Any:
            if worker.half._is_in_device_tier(KEYS[0]):
                worker.half._device_tier.drop(KEYS[0])
            return start(keys)

        patch.setattr(worker.half._opened, "load", load_and_evict)
        assert worker.load(make_load(keys=KEYS[:2], request_id="b")) == ({"b"}, set())
    found = read_blocks(worker.layers, SHAPE, PAGE_LEN, page_slots([7, 3, 9], PAGE_LEN, 0, 9))
    assert_close(found[:, :, 1], torch.cat([kv_of(key)[:, :, 1] for key in KEYS[:2]], dim=1))


def test_prompts_longer_than_the_device_tier_are_loaded_without_it(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    worker = open_worker(KEYS, device_bytes=11 * SHAPE.token_bytes)
    for source in ("disk", "host"):
        assert worker.load(make_load()) == ({"a"}, set())
        assert reports.pop() == Report(sources=[source] * 3)
    found = read_blocks(worker.layers, SHAPE, PAGE_LEN, page_slots([7, 3, 9, 1], PAGE_LEN, 0, 15))
    assert_close(found[:, :, 1], torch.cat([kv_of(key)[:, :, 1] for key in KEYS], dim=1))


@pytest.mark.parametrize("device_bytes", [0, 20 * SHAPE.token_bytes])
def test_each_worker_loads_its_heads(
    open_worker: Callable[..., Worker], reports: list[Report], device_bytes: int
) -> None:
    slots = page_slots([7, 3, 9, 1], PAGE_LEN, 0, 15)
    whole = open_worker(KEYS)
    whole.load(make_load())
    expected = read_blocks(whole.layers, SHAPE, PAGE_LEN, slots)
    for number in range(2):
        worker = open_worker([], device_bytes=device_bytes)
        shard = HeadShard(worker=number, num_workers=2)
        worker.half.close(TIMEOUT_S)
        worker.layers = make_layers(OneHeadPages)
        worker.half.use_layers(worker.layers, shard)
        for _ in range(2):  # from the host, then from the device tier
            assert worker.load(make_load()) == ({"a"}, set())
            found = read_blocks(worker.layers, shard.local_shape(SHAPE), PAGE_LEN, slots)
            assert torch.equal(found, expected[..., number : number + 1, :])
    assert len(reports) == 3, "the first worker alone reports"


def test_a_block_is_stored_from_the_heads_of_all_workers(
    open_worker: Callable[..., Worker], reports: list[Report]
) -> None:
    kv, slots = kv_of(KEYS[0]), page_slots([4, 2], PAGE_LEN, 0, 5)
    for number in (1, 0):
        worker = open_worker([])
        worker.half.close(TIMEOUT_S)
        shard, layers = HeadShard(worker=number, num_workers=2), make_layers(OneHeadPages)
        for layer, part in zip(layers, shard.take(kv), strict=True):
            layer.impl.do_kv_cache_update(layer, *part.unbind(1), layer.kv_cache, slots)

        def gather(part: torch.Tensor, shard: HeadShard = shard) -> torch.Tensor:
            assert torch.equal(part, shard.take(kv))
            return kv

        worker.half.use_layers(layers, shard, gather)
        worker.half.save([Save(key=KEYS[0], pages=[4, 2], reply_to=ADDRESS)])
    assert wait_for(reports) == SAVED and not reports
    later = open_worker([])
    assert later.load(make_load(keys=[KEYS[0]])) == ({"a"}, set())
    assert torch.equal(read_blocks(later.layers, SHAPE, PAGE_LEN, page_slots([7, 3], PAGE_LEN, 0, 5)), kv)


@pytest.mark.gpu  # streams and pinned memory exist on a GPU alone
@pytest.mark.parametrize("device_bytes", [0, 20 * SHAPE.token_bytes])
@pytest.mark.parametrize("page_writer", ["torch", "triton"])
def test_a_gpu_loads_and_stores_beside_its_forward_passes(
    open_worker: Callable[..., Worker], reports: list[Report], device_bytes: int, page_writer: str
) -> None:
    """The pages of a load are still written by the pass before, which must not overwrite the blocks."""
    slots, key = page_slots([7, 3, 9, 1], PAGE_LEN, 0, 15), random_key(9, 6)
    on_cpu = open_worker(KEYS)
    worker = open_worker([], device_bytes=device_bytes)
    on_cpu.load(make_load())
    expected = read_blocks(on_cpu.layers, SHAPE, PAGE_LEN, slots)
    worker.half.close(TIMEOUT_S)
    worker.half._served = replace(worker.half._served, page_writer=page_writer)
    worker.layers = make_layers(device="cuda")
    worker.half.use_layers(worker.layers)
    for _ in range(3):
        torch.cuda._sleep(100_000_000)
        for layer in worker.layers:
            layer.kv_cache.fill_(-1)
        assert worker.load(make_load()) == ({"a"}, set())
        found = read_blocks(worker.layers, SHAPE, PAGE_LEN, slots)
        assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    for _ in range(3):  # a forward pass follows at once
        torch.cuda._sleep(100_000_000)
        for layer in worker.layers:
            layer.kv_cache.fill_(-1)
        if worker.half._device_tier is not None:  # its copy runs on the other stream
            worker.half._device_tier.drop(KEYS[1])
        worker.half.load([make_load(in_step=True)], is_idle=False)
        found = read_blocks(worker.layers, SHAPE, PAGE_LEN, slots)
        assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert not worker.half.take_finished() and not worker.half.take_bad_pages()
    for index, layer in enumerate(worker.layers):
        keys, values = kv_of(key)[index].cuda().unbind(1)
        layer.impl.do_kv_cache_update(
            layer, keys, values, layer.kv_cache, page_slots([4, 2], PAGE_LEN, 0, 6).cuda()
        )
    reports.clear()
    worker.half.save([Save(key=key, pages=[4, 2], reply_to=ADDRESS)])
    for layer in worker.layers:
        layer.kv_cache.fill_(-1)
    assert wait_for(reports) == Report(block=key_digest(key))
    assert on_cpu.load(make_load(keys=[key])) == ({"a"}, set())
    assert torch.equal(
        read_blocks(on_cpu.layers, SHAPE, PAGE_LEN, page_slots([7, 3], PAGE_LEN, 0, 6)), kv_of(key)
    )
