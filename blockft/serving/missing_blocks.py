"""Compute the blocks that no tier has, by requests of the front end to vLLM itself."""

import asyncio
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from pydantic_core import to_json

from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, first_ids, key_digest, num_first, num_tokens, token_ids
from blockft.serving.asgi import Application, Response, Scope, call, with_request
from blockft.serving.block_request import EncodeRequest, block_params, encode_salt, hide_secrets
from blockft.serving.metrics import Counters
from blockft.serving.report import Report, ReportReceiver
from blockft.serving.served_model import ServedModel

REPORT_TIMEOUT_S = 60
"""How long the report on a computed block may take after vLLM's answer."""

KNOWN_S = 10
"""How long a block that was computed or found in the folder counts as there. The folder gets a computed block
later than memory, and a look at each block of a prompt takes milliseconds on slow file systems. If a block is
evicted meanwhile, the request that needs it computes it again."""

MAX_PROMPTS = 64
"""How many blocks are computed by one request."""


class RequestRefused(Exception):
    """vLLM refused a request; its response is the answer to the client."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class BlockComputer:
    """Has vLLM compute blocks, those of a request together.

    Requests that need the same block at the same time wait for one computation.

    Raises:
        UserError: the cache folder cannot be used.
    """

    def __init__(
        self, app: Application, path: str, served: ServedModel, receiver: ReportReceiver, counters: Counters
    ) -> None:
        self._app, self._path, self._secret, self._counters = app, path, served.secret, counters
        self.receiver = receiver
        self._disk_tiers = served.open_disk_tiers()
        self._running: dict[BlockKey, asyncio.Future[None]] = {}
        self._known: OrderedDict[BlockKey, float] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def compute_missing(self, keys: Iterable[BlockKey], scope: Scope, model: str) -> set[BlockKey]:
        """Compute the blocks that neither memory nor the folder has, and return them.

        scope: of the client whose request needs the blocks. Its headers go to vLLM.

        Raises:
            UserError: a block cannot be computed or stored.
            RequestRefused: vLLM refuses the request.
        """
        distinct = list(dict.fromkeys(keys))
        self._forget_old()
        missing = set[BlockKey]()
        if unknown := [key for key in distinct if key not in self._running and key not in self._known]:
            missing = await asyncio.to_thread(self._find_missing, unknown)
            missing -= self._known.keys()  # other requests have computed these meanwhile
            self._keep_known(key for key in unknown if key not in missing)
        needed = [key for key in distinct if key in missing or key in self._running]
        return await self.compute(needed, scope, model) if needed else set()

    async def compute(self, keys: Iterable[BlockKey], scope: Scope, model: str) -> set[BlockKey]:
        """Compute blocks, and return them; see `compute_missing`."""
        distinct = list(dict.fromkeys(keys))
        by_first_len = defaultdict[int, list[BlockKey]](list)
        for key in distinct:
            if key not in self._running:
                by_first_len[num_first(key)].append(key)
        max_prompts = _max_prompts()
        for first_len, new in by_first_len.items():
            for start in range(0, len(new), max_prompts):
                self._start(new[start : start + max_prompts], first_len, scope, model)
        # a block goes on if the client of one request leaves: others may wait for it
        await asyncio.gather(*(asyncio.shield(self._running[key]) for key in distinct))
        return set(distinct)

    def _start(self, keys: Sequence[BlockKey], first_len: int, scope: Scope, model: str) -> None:
        for key in keys:
            self._known.pop(key, None)
            self._running[key] = future = asyncio.get_running_loop().create_future()
            future.add_done_callback(partial(self._end, key))
        self._keep(asyncio.create_task(self._compute(keys, first_len, scope, model)))

    def _find_missing(self, keys: Iterable[BlockKey]) -> set[BlockKey]:
        """Return the blocks that the folder has not. The others count as used there.

        Workers may take them from nearer places, such as vLLM's prefix cache, and then do not open them.
        """
        return {key for key in keys if not any(tier.use(key) for tier in self._disk_tiers)}

    def _forget_old(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._known and next(iter(self._known.values())) < now:
            self._known.popitem(last=False)

    def _keep_known(self, keys: Iterable[BlockKey]) -> None:
        until = asyncio.get_running_loop().time() + KNOWN_S
        for key in keys:
            self._known[key] = until
            self._known.move_to_end(key)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """Keep a task until it ends. Its result and its error are of no use."""
        self._tasks.add(task)
        task.add_done_callback(self._drop)

    def _drop(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio would log it otherwise

    def _end(self, key: BlockKey, future: asyncio.Future[None]) -> None:
        del self._running[key]
        if not future.cancelled() and future.exception() is None:
            self._keep_known([key])
            self._counters.count_encoded(num_tokens(key))

    async def _compute(self, keys: Sequence[BlockKey], first_len: int, scope: Scope, model: str) -> None:
        """Compute blocks, and end those that run."""
        running = [self._running[key] for key in keys]
        try:
            reports = await self._ask_vllm(keys, first_len, scope, model)
        except asyncio.CancelledError:
            for future in running:
                future.cancel()
            raise
        except Exception as error:
            for future in running:
                future.set_exception(error)
            return
        for future, report in zip(running, reports, strict=True):
            if report.failure:
                future.set_exception(UserError(report.failure))
            else:
                future.set_result(None)

    async def _ask_vllm(
        self, keys: Sequence[BlockKey], first_len: int, scope: Scope, model: str
    ) -> list[Report]:
        """Return the reports on blocks, as soon as they may be used."""
        digests = [*map(key_digest, keys)]
        address, expected = self.receiver.expect_blocks(digests)
        asked = EncodeRequest(first_len=first_len, num_blocks=len(keys), reply_to=address)
        body = {
            "model": model,
            "prompt": [first_ids(key) + token_ids(key) for key in keys],
            "max_tokens": 1,
            "temperature": 0,
            "cache_salt": encode_salt(self._secret),
            "kv_transfer_params": block_params(self._secret, asked),
        }
        content = to_json(body)
        own_scope = with_request(scope, "POST", self._path, content, only_authorization=True)
        reports = asyncio.gather(*expected.blocks.values())
        answer = asyncio.create_task(call(self._app, own_scope, content))
        self._keep(answer)
        try:
            waiting: set[asyncio.Future[Any]] = {answer, reports}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not reports.done() and (response := await answer).status != 200:
                raise RequestRefused(Response(response.status, hide_secrets(response.body)))
            return await asyncio.wait_for(reports, REPORT_TIMEOUT_S)
        except TimeoutError:
            raise UserError("a block of the prompt was computed, but not stored: ask again") from None
        finally:
            reports.cancel()
            self.receiver.forget(address)


def _max_prompts() -> int:
    """Return how many prompts a request may have. Newer versions of vLLM have a limit, which may be set."""
    return max(1, min(MAX_PROMPTS, int(os.environ.get("VLLM_MAX_COMPLETION_PROMPTS", MAX_PROMPTS))))
