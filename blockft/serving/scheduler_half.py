"""The connector's half in the scheduler of vLLM: which blocks of which requests go into which pages.

An exception in a hook of the scheduler ends the whole server. Everything that may be wrong with a request is
therefore left to the worker, which fails this one request.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from blockft.inference.block_key import BlockKey, block_key, num_tokens
from blockft.serving.block_request import (
    BlockRequest,
    EncodeRequest,
    ReplyAddress,
    block_keys,
    parse_params,
)
from blockft.serving.block_sets import BlockSets
from blockft.serving.device_record import DeviceRecord
from blockft.serving.head_shard import HeadShard
from blockft.serving.served_model import ServedModel
from blockft.serving.unconfirmed_loads import PagePool, UnconfirmedLoads


@dataclass(frozen=True, kw_only=True)
class Load:
    """Blocks to write into the pages of a request.

    keys     the local blocks of the prompt, in order
    pages    the pages of the prompt, in order
    start    the first token of the context that its pages do not hold yet
    in_step  the request is computed in this step, after the load; otherwise it waits for its load
    refusal  why the request must fail, as a sentence; "" if it need not
    """

    request_id: str
    keys: list[BlockKey]
    pages: list[int]
    start: int
    reply_to: ReplyAddress
    in_step: bool = False
    refusal: str = ""

    @property
    def context_len(self) -> int:
        """The number of tokens of all local blocks."""
        return sum(map(num_tokens, self.keys))

    @property
    def needed_keys(self) -> Sequence[BlockKey]:
        """The blocks that its pages do not hold yet as a whole. They are the last ones."""
        return _needed(self.keys, self.start)


@dataclass(frozen=True, kw_only=True)
class Save:
    """A block to read from its pages after the forward pass.

    pages  of the first block that the block sees, and of the block after it
    """

    key: BlockKey
    pages: list[int]
    reply_to: ReplyAddress


@dataclass(frozen=True, kw_only=True)
class PrefixHit:
    """A prompt whose local blocks are in pages of vLLM's prefix cache, all of them."""

    num_blocks: int
    reply_to: ReplyAddress


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a worker does in one step. is_idle: no token is computed in it."""

    loads: list[Load] = field(default_factory=list)
    prefix_hits: list[PrefixHit] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    is_idle: bool = False


class SchedulerHalf:
    """Tells vLLM's scheduler how many tokens of a prompt are cached, and plans the work of the workers.

    page_len: the number of tokens in a page. num_workers: the number of workers that share the heads.
    """

    def __init__(self, served: ServedModel, page_len: int, num_workers: int = 1) -> None:
        self._secret, self._local_sees_first = served.secret, served.local_sees_first
        shape = HeadShard(num_workers=num_workers).local_shape(served.shape)
        self._on_device = DeviceRecord(served.device_bytes // num_workers // shape.token_bytes)
        # with several workers, all but one read computed blocks from the folder
        self._keeps_computed = num_workers == 1
        self._unconfirmed = UnconfirmedLoads(page_len)
        self._sets = BlockSets()
        self._requests: dict[str, BlockRequest | EncodeRequest] = {}
        self._encode_pages: dict[str, list[int]] = {}
        self._vllm_requests: dict[str, Any] = {}
        self._keys: dict[str, list[BlockKey]] = {}
        self._in_step: set[str] = set()
        self._lost: set[str] = set()
        self._has_loads: set[str] = set()
        self._loads: list[Load] = []
        self._prefix_hits: list[PrefixHit] = []
        self._running_loads: dict[str, Load] = {}

    def use_pool(self, pool: PagePool) -> None:
        """Take the pages of vLLM. Until then every request with blocks waits for its load."""
        self._unconfirmed.use_pool(pool)

    def add_request(self, request: Any) -> None:
        """Read the parameters of a new request. Parameters of others than the front end are removed."""
        parsed = parse_params(request.kv_transfer_params, self._secret)
        if parsed is None:
            request.kv_transfer_params = None
            return
        if isinstance(parsed, EncodeRequest):
            self._sets.add(parsed)
        self._requests[request.request_id] = parsed
        self._vllm_requests[request.request_id] = request
        # vLLM would compute the whole prompt anew, with full attention
        request.skip_reading_prefix_cache = False

    def num_cached_tokens(self, request: Any, num_computed: int) -> tuple[int | None, bool]:
        """Return how many tokens after the first `num_computed` are loaded, and whether the request waits.

        It does not wait if all blocks are on the device. A request that must fail is accepted and fails while
        it is loaded. None means that vLLM asks again in the next step: a block waits for others of its
        prompt, pages of the prefix cache may be those of a load that fails, or the request waits for ever,
        until its client leaves.
        """
        block_request = self._requests.get(request.request_id)
        self._in_step.discard(request.request_id)
        if isinstance(block_request, EncodeRequest) and self._sets.is_arriving(block_request):
            return None, False
        if not isinstance(block_request, BlockRequest):
            return 0, False
        if self._refusal(request, block_request):
            num_failing = request.num_prompt_tokens - 1 - num_computed
            return (num_failing, True) if num_failing > 0 else (None, False)
        if self._unconfirmed.may_share(request, num_computed):
            return None, False
        num_cached = max(block_request.context_len - num_computed, 0)
        if not num_cached:
            return 0, False
        keys = self._keys_of(request, block_request)
        # vLLM gives a token out that it has computed before a preemption, even if the load has failed
        may_be_in_step = self._unconfirmed.has_pool and not request.num_preemptions
        if may_be_in_step and self._on_device.has_all(_needed(keys, num_computed)):
            self._in_step.add(request.request_id)
            return num_cached, False
        return num_cached, True

    def allocate(self, request: Any, pages: list[int], num_external: int) -> None:
        """Plan the load of `num_external` tokens into the pages of a request."""
        block_request = self._requests.get(request.request_id)
        if not isinstance(block_request, BlockRequest):
            return
        if num_external:
            self._has_loads.add(request.request_id)
            load = self._plan_load(request, block_request, pages, num_external)
            self._loads.append(load)
            if load.in_step:
                self._on_device.use(load.needed_keys)
                self._unconfirmed.add(request, pages, load.start)
            elif not load.refusal:
                self._running_loads[load.request_id] = load
        elif request.request_id not in self._has_loads:
            hit = PrefixHit(num_blocks=len(block_request.lengths), reply_to=block_request.reply_to)
            self._prefix_hits.append(hit)

    def plan_step(self, scheduler_output: Any) -> StepPlan:
        """Return the work of the workers in this step."""
        self._follow_pages(scheduler_output)
        self._unconfirmed.end_step()
        saves = []
        for id, pages in list(self._encode_pages.items()):
            request, encode_request = self._vllm_requests[id], self._requests[id]
            assert isinstance(encode_request, EncodeRequest)
            num_tokens = scheduler_output.num_scheduled_tokens.get(id, 0)
            if num_tokens and request.num_computed_tokens + num_tokens >= request.num_prompt_tokens:
                key = _key_to_save(request.prompt_token_ids, encode_request)
                saves.append(Save(key=key, pages=pages, reply_to=encode_request.reply_to))
                if self._keeps_computed:
                    self._on_device.add_computed(key)
                del self._encode_pages[id]
        loads, self._loads = self._loads, []
        prefix_hits, self._prefix_hits = self._prefix_hits, []
        is_idle = not scheduler_output.total_num_scheduled_tokens
        return StepPlan(loads=loads, prefix_hits=prefix_hits, saves=saves, is_idle=is_idle)

    def end_loads(
        self, finished: Collection[str], bad_pages: Collection[int], evicted: Collection[BlockKey] = ()
    ) -> None:
        """Record the blocks of loads that have ended, unless a page of them is bad.

        evicted: blocks that the device tier of a worker has not any more.
        """
        self._lost |= self._unconfirmed.fail(bad_pages)
        for id in finished:
            load = self._running_loads.pop(id, None)
            if load is not None and not {*load.pages} & {*bad_pages}:
                self._on_device.use(load.needed_keys)
        self._on_device.drop(evicted)

    def finish(self, request: Any, pages: Sequence[int]) -> None:
        """Forget a request that has ended."""
        self._unconfirmed.finish(request, pages)
        if isinstance(parsed := self._requests.get(request.request_id), EncodeRequest):
            self._sets.finish(parsed)
        for known in (self._requests, self._vllm_requests, self._encode_pages, self._keys):
            known.pop(request.request_id, None)
        for ids in (self._has_loads, self._in_step, self._lost):
            ids.discard(request.request_id)

    def _keys_of(self, request: Any, block_request: BlockRequest) -> list[BlockKey]:
        """Return the keys of a request's local blocks. vLLM asks again in every step until it has pages."""
        id = request.request_id
        if id not in self._keys:
            self._keys[id] = block_keys(
                request.prompt_token_ids, block_request.lengths, local_sees_first=self._local_sees_first
            )
        return self._keys[id]

    def _refusal(self, request: Any, block_request: BlockRequest) -> str:
        """Return why a request must fail, or ""."""
        if request.request_id in self._lost:
            return "its blocks could not be loaded before it was preempted"
        return _refusal(request, block_request)

    def _plan_load(
        self, request: Any, block_request: BlockRequest, pages: list[int], num_external: int
    ) -> Load:
        id, refusal = request.request_id, self._refusal(request, block_request)
        loaded_len = request.num_prompt_tokens - 1 if refusal else block_request.context_len
        return Load(
            request_id=id,
            keys=[] if refusal else self._keys_of(request, block_request),
            pages=pages,
            start=loaded_len - num_external,
            reply_to=block_request.reply_to,
            in_step=id in self._in_step,
            refusal=refusal,
        )

    def _follow_pages(self, scheduler_output: Any) -> None:
        """Record the pages of prompts that are one block. A long prompt gets them in several steps."""
        for new in scheduler_output.scheduled_new_reqs:
            if isinstance(self._requests.get(new.req_id), EncodeRequest):
                self._encode_pages[new.req_id] = list(new.block_ids[0])
        cached = scheduler_output.scheduled_cached_reqs
        for id, new_pages in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if not isinstance(self._requests.get(id), EncodeRequest) or not new_pages:
                continue
            if id in cached.resumed_req_ids:  # after a preemption it has other pages
                self._encode_pages[id] = list(new_pages[0])
            elif id in self._encode_pages:
                self._encode_pages[id] += new_pages[0]


def _key_to_save(prompt: Sequence[int], encode_request: EncodeRequest) -> BlockKey:
    first_len = encode_request.first_len
    return block_key(prompt[first_len:], prompt[:first_len])


def _needed(keys: Sequence[BlockKey], start: int) -> Sequence[BlockKey]:
    """Return the last blocks of a context: those that have tokens after its first `start` tokens."""
    ends = accumulate(map(num_tokens, keys))
    return keys[next(index for index, end in enumerate(ends) if end > start) :]


def _refusal(request: Any, block_request: BlockRequest) -> str:
    """Return why a request cannot be answered in block mode, or ""."""
    if not all(length > 0 for length in block_request.lengths):
        return "a block has no token"
    if request.prompt_token_ids is None:
        return "a prompt of embeddings has no blocks: give token ids"
    if block_request.context_len >= request.num_prompt_tokens:
        return f"the blocks leave no final block in a prompt of {request.num_prompt_tokens} tokens"
    if request.cache_salt != block_request.salt:
        return "the request has another cache salt than its blocks"
    if request.lora_request is not None:
        return "blocks of an adapter are not cached: merge the adapter into the model"
    sampling = request.sampling_params
    if sampling is None or sampling.prompt_logprobs is not None:
        return "log probabilities of a prompt need full attention over it: leave prompt_logprobs out"
    return ""
