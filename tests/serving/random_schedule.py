"""Random work for vLLM's real scheduler with the connector's half. It needs no model: pages hold tokens.

The environment with vLLM runs `python -m tests.serving.random_schedule FOLDER`, which prints what happened as
JSON. A page holds, for each of its tokens, all tokens of the prompt until there, or None if the keys and
values would be wrong. A load that fails writes None. A token that is computed over None is wrong, too.
"""

import json
import random
import sys
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from blockft.serving.block_request import BlockRequest, ReplyAddress, block_params, block_salt
from blockft.serving.scheduler_half import Load
from blockft.serving.unconfirmed_loads import MAX_PLANNED
from tests.serving.stubs import SECRET, SHAPE, make_served

MODEL = str(Path(__file__).parents[2] / "data/demo/model")
PAGE_LEN = 4
NUM_PAGES = (14, 34, 54)
"""Of which the first are so few that requests are preempted."""

DOCUMENTS = [list(range(start, start + 8)) for start in (100, 200, 300)]
FINAL_BLOCKS = ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [9] * 9)
NUM_SEEDS, NUM_STEPS, MAX_REQUESTS = 200, 150, 8


class PlannedStep(NamedTuple):
    """A step whose result the scheduler does not have yet. right: whether each request's token is right."""

    plan: Any
    bad_pages: set[int]
    finished: set[str]
    right: dict[str, bool]


def make_scheduler(folder: Path, num_pages: int, max_tokens: int) -> AsyncScheduler:
    served = make_served(folder, device_bytes=1000 * SHAPE.token_bytes, path=MODEL)
    served.save(folder / "served.json")
    config = VllmConfig(
        model_config=ModelConfig(model=MODEL, dtype="float32", max_model_len=128),
        scheduler_config=SchedulerConfig(
            max_num_seqs=6,
            max_num_batched_tokens=max_tokens,
            max_model_len=128,
            enable_chunked_prefill=True,
            async_scheduling=True,
            is_encoder_decoder=False,
            watermark=0.0,
        ),
        cache_config=CacheConfig(block_size=PAGE_LEN, enable_prefix_caching=True),
        kv_transfer_config=KVTransferConfig(
            kv_connector="BlockConnector",
            kv_connector_module_path="blockft.serving.vllm_connector",
            kv_role="kv_both",
            kv_load_failure_policy="fail",
            kv_connector_extra_config={"served_model": str(folder / "served.json")},
        ),
        device_config=DeviceConfig("cpu"),
    )
    config.cache_config.num_gpu_blocks = num_pages
    spec = FullAttentionSpec(block_size=PAGE_LEN, num_kv_heads=1, head_size=1, dtype=torch.float32)
    pages = KVCacheConfig(
        num_blocks=num_pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    manager = StructuredOutputManager(config)
    return AsyncScheduler(config, pages, manager, block_size=PAGE_LEN, log_stats=False)


class RandomWork:
    """A server without a model. counts: what happened."""

    def __init__(self, folder: Path, seed: int, counts: Counter[str]) -> None:
        self._rng, self._counts = random.Random(seed), counts
        max_tokens = self._rng.choice((6, 16, 64))
        self._scheduler = make_scheduler(folder, NUM_PAGES[seed % len(NUM_PAGES)], max_tokens)
        self._half = self._scheduler.connector._scheduler
        self._hasher = get_request_block_hasher(PAGE_LEN, sha256)
        self._requests: dict[str, Request] = {}
        self._pages: dict[str, list[int]] = {}
        self._contents: dict[tuple[int, int], tuple[int, ...] | None] = {}
        self._loading: list[Load] = []
        self._steps: deque[PlannedStep] = deque()
        self._first_reports: dict[str, str] = {}

    def run(self) -> None:
        for _ in range(NUM_STEPS):
            if self._rng.random() < 0.5 and len(self._scheduler.requests) < MAX_REQUESTS:
                self._add_request()
            self._change_device()
            if not self._scheduler.has_requests() and not self._steps:
                continue
            self._steps.append(self._run_step(self._scheduler.schedule()))
            if self._rng.random() < 0.15 and self._scheduler.requests:
                id = self._rng.choice([*self._scheduler.requests])
                self._scheduler.finish_requests(id, RequestStatus.FINISHED_ABORTED)
                self._counts["aborted"] += 1
            if len(self._steps) == MAX_PLANNED or self._rng.random() < 0.3:
                self._end_step(self._steps.popleft())
        self._counts["preempted"] += sum(request.num_preemptions for request in self._requests.values())

    def _report(self, id: str, report: str) -> None:
        """Record a report. The front end refuses an answer whose first report says that it fails."""
        self._first_reports.setdefault(id, report)

    def _add_request(self) -> None:
        id, documents = str(len(self._requests)), self._rng.sample(DOCUMENTS, 2)
        lengths = tuple(map(len, documents))
        salt = block_salt(SECRET, lengths)
        asked = BlockRequest(lengths=lengths, salt=salt, reply_to=ReplyAddress(socket="/nowhere", id=id))
        request = Request(
            request_id=id,
            prompt_token_ids=[*documents[0], *documents[1], *self._rng.choice(FINAL_BLOCKS)],
            sampling_params=SamplingParams(
                max_tokens=self._rng.choice((1, 4, 12)),
                ignore_eos=True,
                extra_args={"kv_transfer_params": block_params(SECRET, asked)},
            ),
            pooling_params=None,
            cache_salt=salt,
            block_hasher=self._hasher,
        )
        self._requests[id] = request
        self._scheduler.add_request(request)

    def _change_device(self) -> None:
        """Record that the device has most blocks, or none."""
        record = self._half._on_device
        if self._rng.random() < 0.3:
            record.drop([*record._in_tier])
            return
        for id, asked in self._half._requests.items():
            if self._rng.random() < 0.8:
                record.use(self._half._keys_of(self._requests[id], asked))

    def _run_step(self, plan: Any) -> PlannedStep:
        """Do the work of the workers."""
        step = PlannedStep(plan, set(), set(), {})
        new, cached = plan.scheduled_new_reqs, plan.scheduled_cached_reqs
        self._pages |= {request.req_id: list(request.block_ids[0]) for request in new}
        starts = {request.req_id: request.num_computed_tokens for request in new}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for id, pages in zip(cached.req_ids, cached.new_block_ids, strict=True):
            before = [] if id in cached.resumed_req_ids else self._pages[id]
            self._pages[id] = [*before, *(pages[0] if pages else ())]
        step_plan = plan.kv_connector_metadata.plan
        planned = step_plan.loads
        ended = [load for load in self._loading if self._rng.random() < 0.5]
        for load in [*ended, *(load for load in planned if load.in_step)]:
            self._load(load, step)
        for hit in step_plan.prefix_hits:
            self._report(hit.reply_to.id, "loaded")
        waiting = [load for load in self._loading if load not in ended]
        self._loading = waiting + [load for load in planned if not load.in_step]
        for id, num_tokens in plan.num_scheduled_tokens.items():
            step.right[id] = self._compute(id, starts[id], starts[id] + num_tokens)
        return step

    def _load(self, load: Load, step: PlannedStep) -> None:
        tokens = self._requests[load.request_id].prompt_token_ids
        fails = bool(load.refusal) or self._rng.random() < 0.25
        for place in range(load.start, len(tokens) - 1 if load.refusal else load.context_len):
            self._contents[self._slot(load.pages, place)] = None if fails else tuple(tokens[: place + 1])
        if fails:
            step.bad_pages.update(load.pages[load.start // PAGE_LEN :])
        if not load.in_step:
            step.finished.add(load.request_id)
        self._report(load.request_id, "failed" if fails else "loaded")
        self._counts[f"{'failed' if fails else 'loaded'} {'in a step' if load.in_step else 'waiting'}"] += 1

    def _compute(self, id: str, start: int, stop: int) -> bool:
        """Write what is computed for tokens of a prompt, and return whether the next token is right."""
        tokens = self._requests[id].prompt_token_ids
        is_right = all(
            self._contents.get(self._slot(self._pages[id], place)) == tuple(tokens[: place + 1])
            for place in range(min(start, len(tokens)))
        )
        for place in range(start, min(stop, len(tokens))):
            content = tuple(tokens[: place + 1]) if is_right else None
            self._contents[self._slot(self._pages[id], place)] = content
        return is_right

    def _end_step(self, step: PlannedStep) -> None:
        """Give the scheduler the result of a step, and count the tokens that it gives out."""
        ids = [*step.plan.num_scheduled_tokens]
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={id: index for index, id in enumerate(ids)},
            sampled_token_ids=[[7] if self._has_token(id) else [] for id in ids],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=KVConnectorOutput(
                finished_sending=None,
                finished_recving=step.finished or None,
                invalid_block_ids=step.bad_pages,
            ),
        )
        for outputs in self._scheduler.update_from_output(step.plan, output).values():
            for part in outputs.outputs:
                if part.new_token_ids and self._first_reports[part.request_id] == "loaded":
                    self._counts["right" if step.right[part.request_id] else "wrong"] += 1

    def _has_token(self, id: str) -> bool:
        request = self._scheduler.requests.get(id)
        return request is not None and (not request.is_prefill_chunk or request.num_stale_output_tokens > 0)

    @staticmethod
    def _slot(pages: list[int], place: int) -> tuple[int, int]:
        return pages[place // PAGE_LEN], place % PAGE_LEN


def main(folder: Path) -> None:
    init_none_hash(sha256)
    counts = Counter[str]()
    for seed in range(NUM_SEEDS):
        (folder / str(seed)).mkdir()
        RandomWork(folder / str(seed), seed, counts).run()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
