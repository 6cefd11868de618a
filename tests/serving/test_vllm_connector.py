"""The connector over vLLM's recorded interface: every call reaches its half, and nothing else is needed."""

import importlib
import sys
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, block_key
from blockft.serving import device_record
from blockft.serving.block_request import EncodeRequest, block_params, page_slots
from blockft.serving.block_store import BlockStore
from blockft.serving.front_end import ENGINE_END_S
from blockft.serving.pages import read_blocks
from blockft.serving.report import Report, Reporter
from blockft.serving.worker_half import WorkerHalf
from tests.commands import TIMEOUT_S, wait_until
from tests.serving.stubs import (
    NOWHERE,
    PAGE_LEN,
    SECRET,
    SHAPE,
    FakePool,
    block_request,
    kv_of,
    make_layers,
    make_request,
    make_served,
    step,
)
from tests.serving.test_supported_engine import make_config

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"

PARALLEL_STATE = "vllm.distributed.parallel_state"


class RecordedBase:
    """The parts of vLLM 0.32.0's `KVConnectorBase_V1` that the connector relies on."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._connector_metadata: Any = None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._connector_metadata = metadata

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata


class Role(Enum):
    SCHEDULER = 0
    WORKER = 1


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the connector, imported over the recorded interface."""
    parts = BASE.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    parallel: Any = ModuleType(PARALLEL_STATE)
    parallel.get_tp_group = lambda: SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setitem(sys.modules, PARALLEL_STATE, parallel)
    base: Any = sys.modules[BASE]
    base.KVConnectorBase_V1, base.KVConnectorRole = RecordedBase, Role
    base.KVConnectorMetadata = base.KVConnectorWorkerMetadata = object
    yield importlib.import_module("blockft.serving.vllm_connector")
    del sys.modules["blockft.serving.vllm_connector"]


class Engine:
    """Both halves of the connector, with the layers of a worker."""

    backend = "uni"

    def __init__(self, module: ModuleType, folder: Path, cudagraph_mode: str = "NONE") -> None:
        served = make_served(folder, device_bytes=16 * SHAPE.token_bytes)
        served.save(folder / "served.json")
        self.layers = make_layers()
        names = [f"model.layers.{index}.self_attn.attn" for index in range(SHAPE.num_layers)]
        config = make_config(served)
        config.cache_config.block_size = PAGE_LEN
        config.parallel_config.distributed_executor_backend = self.backend
        config.kv_transfer_config.kv_connector_extra_config = {"served_model": str(folder / "served.json")}
        context = dict(zip(names, self.layers, strict=True)) | {"another.0": object()}
        mode = SimpleNamespace(name=cudagraph_mode)
        config.compilation_config = SimpleNamespace(static_forward_context=context, cudagraph_mode=mode)
        pages = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec())])
        self.scheduler = module.BlockConnector(config, Role.SCHEDULER, pages)
        self.pool = FakePool()
        self.scheduler.bind_gpu_block_pool(self.pool)
        self.worker = module.BlockConnector(config, Role.WORKER, pages)
        self.worker.register_kv_caches({name: object() for name in reversed(names)})

    def run(self, scheduler_output: Any) -> tuple[Any, set[int]]:
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(scheduler_output))
        self.worker.start_load_kv(None, request_ids=[])
        self.worker.wait_for_layer_load("model.layers.0.self_attn.attn")
        self.worker.save_kv_layer("model.layers.0.self_attn.attn", None, None)
        self.worker.wait_for_save()
        _, finished = self.worker.get_finished(set())
        bad_pages = self.worker.get_block_ids_with_load_errors()
        output = SimpleNamespace(
            finished_recving=finished,
            invalid_block_ids=bad_pages,
            kv_connector_worker_meta=self.worker.build_connector_worker_meta(),
        )
        self.scheduler.update_connector_output(output)
        return finished, bad_pages

    def close(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()


class FullAttentionSpec:
    """How vLLM describes the pages of layers that keep all tokens."""


def pages_of(*pages: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(pages),))


def test_a_block_is_stored_and_then_loaded(
    connector: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(device_record, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    sent: list[Report] = []
    touched: list[list[BlockKey]] = []
    monkeypatch.setattr(Reporter, "send", lambda self, address, report: sent.append(report))
    monkeypatch.setattr(BlockStore, "touch", lambda self, keys: touched.append([*keys]))
    engine, key = Engine(connector, tmp_path), block_key(range(10, 16))
    params = block_params(SECRET, EncodeRequest(reply_to=NOWHERE))
    encode = make_request("e", range(10, 16), params)
    engine.scheduler.on_new_request(encode)
    assert engine.scheduler.get_num_new_matched_tokens(encode, 0) == (0, False)
    engine.scheduler.update_state_after_alloc(encode, pages_of(5, 2), 0)
    for index, layer in enumerate(engine.layers):
        slots = page_slots([5, 2], PAGE_LEN, 0, 6)
        layer.impl.do_kv_cache_update(layer, *kv_of(key)[index].unbind(1), layer.kv_cache, slots)
    engine.run(step({"e": 6}, new={"e": [5, 2]}))
    assert engine.scheduler.request_finished(encode, [5, 2]) == (False, None)
    wait_until(lambda: key in make_served(tmp_path).open_disk_tiers()[1])

    request = block_request("a", [*range(10, 16), 7, 8], [6])
    engine.scheduler.on_new_request(request)
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (6, False), "it was computed just now"
    clock[0] += device_record.COMPUTED_S + 1
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (6, True)
    engine.scheduler.update_state_after_alloc(request, pages_of(9, 0), 6)
    finished, bad_pages = engine.run(step())
    deadline = time.monotonic() + TIMEOUT_S
    while not finished and time.monotonic() < deadline:
        finished, bad_pages = engine.run(step())
    assert (finished, bad_pages) == ({"a"}, set())
    assert torch.equal(
        read_blocks(engine.layers, SHAPE, PAGE_LEN, page_slots([9, 0], PAGE_LEN, 0, 6)), kv_of(key)
    )

    other = block_request("b", [*range(10, 16), 5, 8], [6])
    engine.scheduler.on_new_request(other)
    assert engine.scheduler.get_num_new_matched_tokens(other, 0) == (6, False), "the device tier has it"
    engine.scheduler.update_state_after_alloc(other, pages_of(3, 1), 6)
    sent.clear()
    touched.clear()
    assert engine.run(step({"b": 2}, new={"b": [3, 1]})) == (set(), set()), "vLLM waits for no load"
    assert (sent, touched) == ([Report(sources=["device"])], [[key]])
    assert torch.equal(
        read_blocks(engine.layers, SHAPE, PAGE_LEN, page_slots([3, 1], PAGE_LEN, 0, 6)), kv_of(key)
    )
    assert engine.scheduler.request_finished(other, [3, 1]) == (False, None)
    assert engine.pool.evicted == {3, 1}, "it has no token yet"

    engine.run(step())
    engine.run(step())
    known = block_request("c", [*range(10, 16), 4, 8], [6])
    engine.scheduler.on_new_request(known)
    assert engine.scheduler.get_num_new_matched_tokens(known, 6) == (0, False), "vLLM's prefix cache has it"
    engine.scheduler.update_state_after_alloc(known, pages_of(9, 4), 0)
    for expected in ([Report(sources=["device"])], []):
        sent.clear()
        engine.run(step({"c": 2}, new={"c": [9, 4]}))
        assert sent == expected
    engine.close()


def test_the_scheduler_learns_what_a_worker_has_evicted(connector: ModuleType, tmp_path: Path) -> None:
    engine, keys = Engine(connector, tmp_path), [block_key(range(start, start + 9)) for start in (10, 30)]
    for key in keys:
        make_served(tmp_path).open_disk_tiers()[1].write(key, kv_of(key))
    requests = [block_request(f"{start}", [*range(start, start + 9), 7], [9]) for start in (10, 30)]
    for request in requests:
        engine.scheduler.on_new_request(request)
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (9, True)
        engine.scheduler.update_state_after_alloc(request, pages_of(9, 0, 4), 9)
        while not engine.run(step())[0]:
            pass
    assert engine.scheduler.get_num_new_matched_tokens(requests[1], 0) == (9, False)
    engine.worker._worker._evicted.add(keys[1])
    engine.run(step())
    assert engine.scheduler.get_num_new_matched_tokens(requests[1], 0) == (9, False), "it is in the tier"
    engine.worker._worker._device_tier.drop(keys[1])
    engine.worker._worker._evicted.add(keys[1])
    engine.run(step())
    assert engine.scheduler.get_num_new_matched_tokens(requests[1], 0) == (9, True)
    two = connector.EvictedBlocks({keys[0]}).aggregate(connector.EvictedBlocks({keys[1]}))
    assert two.keys == {*keys}
    engine.close()


def test_an_unsupported_setting_ends_the_start(connector: ModuleType, tmp_path: Path) -> None:
    served = make_served(tmp_path)
    served.save(tmp_path / "served.json")
    config = make_config(served)
    config.kv_transfer_config.kv_connector_extra_config = {"served_model": str(tmp_path / "served.json")}
    config.lora_config = object()
    with pytest.raises(UserError, match="enable_lora"):
        connector.BlockConnector(config, Role.SCHEDULER, None)


def test_no_other_module_imports_vllm() -> None:
    folder = Path(__file__).parents[2] / "blockft"
    importing = [
        file.name
        for file in folder.rglob("*.py")
        if "from vllm" in (text := file.read_text()) or "import vllm" in text
    ]
    assert importing == ["vllm_connector.py"]


def test_graphs_in_which_answers_may_be_wrong_end_the_start(connector: ModuleType, tmp_path: Path) -> None:
    for folder in (safe := tmp_path / "safe", unsafe := tmp_path / "unsafe"):
        folder.mkdir()
    Engine(connector, safe, "FULL_AND_PIECEWISE").close()
    with pytest.raises(UserError, match="cudagraph_mode FULL"):
        Engine(connector, unsafe, "FULL")


@pytest.mark.parametrize(
    ("backend", "limit"), [("uni", "END_S"), ("mp", "WORKER_END_S"), ("ray", "WORKER_END_S")]
)
def test_the_end_of_a_worker_is_limited_before_vllm_kills_its_process(
    connector: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, limit: str
) -> None:
    monkeypatch.setattr(Engine, "backend", backend)
    engine, limits = Engine(connector, tmp_path), list[float]()
    close = WorkerHalf.close
    monkeypatch.setattr(
        WorkerHalf, "close", lambda self, limit_s: limits.append(limit_s) or close(self, limit_s)
    )
    engine.close()
    assert limits == [getattr(connector, limit)]
    assert connector.WORKER_END_S < connector.END_S < ENGINE_END_S
