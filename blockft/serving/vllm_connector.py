"""The KV connector that vLLM loads: passes vLLM's calls to the two halves of the connector.

vLLM creates one object in its scheduler and one in its worker. This is the only module that imports vLLM.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_tp_group

from blockft.inference.block_key import BlockKey
from blockft.serving.head_shard import HeadShard
from blockft.serving.scheduler_half import SchedulerHalf, StepPlan
from blockft.serving.served_model import ServedModel
from blockft.serving.supported_engine import check_engine, check_graphs, check_pages, graph_hint
from blockft.serving.worker_half import WorkerHalf

SERVED_MODEL = "served_model"
"""The key of the connector's configuration that holds the path of the file of the served model."""

HEAD_DIM = 3
"""The dimension of the heads of a block, (L, n, 2, K, D)."""

END_S, WORKER_END_S = 30, 5
"""How long the end of a server waits until the folder has all blocks: in the engine's process, and in a
process of a worker, which vLLM kills after 8 s. Few blocks of several workers wait."""

_log = logging.getLogger("blockft.serving")


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler's half tells the worker's half in one step."""

    plan: StepPlan


@dataclass
class EvictedBlocks(KVConnectorWorkerMetadata):
    """What the worker's half tells the scheduler's half after a step: blocks that its device tier lacks."""

    keys: set[BlockKey]

    def aggregate(self, other: "EvictedBlocks") -> "EvictedBlocks":
        """Return the evictions of both workers."""
        return EvictedBlocks(self.keys | other.keys)


class BlockConnector(KVConnectorBase_V1):
    """Serves cached blocks to vLLM.

    Raises:
        UserError: a setting of vLLM is not supported, or the cache folder cannot be used.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        served = ServedModel.load(Path(extra[SERVED_MODEL]))
        check_engine(vllm_config, served)
        if kv_cache_config is not None:
            check_pages(kv_cache_config)
        self._compilation, self._parallel = vllm_config.compilation_config, vllm_config.parallel_config
        page_len = vllm_config.cache_config.block_size
        self._scheduler = self._worker = None
        if role is KVConnectorRole.SCHEDULER:
            num_workers = vllm_config.parallel_config.tensor_parallel_size
            self._scheduler = SchedulerHalf(served, page_len, num_workers)
        else:
            self._worker = WorkerHalf(served, page_len)

    def shutdown(self) -> None:
        if self._worker is not None:
            in_engine = self._parallel.distributed_executor_backend == "uni"
            self._worker.close(END_S if in_engine else WORKER_END_S)

    # in the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._in_scheduler.use_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        self._in_scheduler.add_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._in_scheduler.num_cached_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._in_scheduler.allocate(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return StepMetadata(self._in_scheduler.plan_step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        finished, bad_pages = connector_output.finished_recving, connector_output.invalid_block_ids
        told = connector_output.kv_connector_worker_meta
        evicted = told.keys if isinstance(told, EvictedBlocks) else ()
        self._in_scheduler.end_loads(finished or (), bad_pages or (), evicted)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._in_scheduler.finish(request, block_ids)
        return False, None

    # in the worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        names = sorted(kv_caches, key=_layer_index)
        layers_by_name = self._compilation.static_forward_context
        layers, group = [layers_by_name[name] for name in names], get_tp_group()
        mode = self._compilation.cudagraph_mode.name
        check_graphs(mode, layers)
        hint = graph_hint(mode) if layers[0].kv_cache.is_cuda else ""
        if hint and group.rank_in_group == 0:
            _log.warning(hint)
        shard = HeadShard(worker=group.rank_in_group, num_workers=group.world_size)
        gather = partial(group.all_gather, dim=HEAD_DIM) if group.world_size > 1 else None
        self._in_worker.use_layers(layers, shard, gather)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        plan = self._plan
        self._in_worker.load(plan.loads, is_idle=plan.is_idle)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once, because the load of a request is enqueued before its forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Return at once, because a block is read after the last layer."""

    def wait_for_save(self) -> None:
        self._in_worker.report(self._plan.prefix_hits)
        self._in_worker.save(self._plan.saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._in_worker.take_finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._in_worker.take_bad_pages()

    def build_connector_worker_meta(self) -> EvictedBlocks | None:
        evicted = self._in_worker.take_evicted()
        return EvictedBlocks(evicted) if evicted else None

    @property
    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.plan

    @property
    def _in_scheduler(self) -> SchedulerHalf:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _in_worker(self) -> WorkerHalf:
        assert self._worker is not None
        return self._worker


def _layer_index(name: str) -> int:
    """Return the number of a layer from its name, such as model.layers.3.self_attn.attn."""
    return next(int(part) for part in name.split(".") if part.isdigit())
