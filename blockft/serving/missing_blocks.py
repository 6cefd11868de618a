"""Compute the blocks that no tier has, by requests of the front end to vLLM itself."""

import asyncio
import json
from collections.abc import Iterable

from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, first_ids, num_first, num_tokens, token_ids
from blockft.serving.asgi import Application, Response, Scope, call, with_request
from blockft.serving.block_request import EncodeRequest, block_params, encode_salt, hide_secrets
from blockft.serving.metrics import Counters
from blockft.serving.report import ReportReceiver
from blockft.serving.served_model import ServedModel

STORE_TIMEOUT_S = 60
"""How long a computed block may take to reach the folder."""


class RequestRefused(Exception):
    """vLLM refused a request; its response is the answer to the client."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class BlockComputer:
    """Has vLLM compute blocks. Requests that need the same block at the same time wait for one computation.

    Raises:
        UserError: the cache folder cannot be used.
    """

    def __init__(
        self, app: Application, path: str, served: ServedModel, receiver: ReportReceiver, counters: Counters
    ) -> None:
        self._app, self._path, self._secret, self._counters = app, path, served.secret, counters
        self.receiver = receiver
        self._disk_tiers = served.open_disk_tiers()
        self._running: dict[BlockKey, asyncio.Task[None]] = {}

    async def compute_missing(self, keys: Iterable[BlockKey], scope: Scope, model: str) -> set[BlockKey]:
        """Compute the blocks that the folder does not have, and return them.

        scope: of the client whose request needs the blocks. Its headers go to vLLM.

        Raises:
            UserError: a block cannot be computed or stored.
            RequestRefused: vLLM refuses the request.
        """
        distinct = list(dict.fromkeys(keys))
        missing = await asyncio.to_thread(self._find_missing, distinct)
        return await self.compute(
            [key for key in distinct if key in missing or key in self._running], scope, model
        )

    async def compute(self, keys: Iterable[BlockKey], scope: Scope, model: str) -> set[BlockKey]:
        """Compute blocks, and return them; see `compute_missing`."""
        tasks = {key: self._running.get(key) or self._start(key, scope, model) for key in dict.fromkeys(keys)}
        # a block goes on if the client of one request leaves: others may wait for it
        await asyncio.gather(*map(asyncio.shield, tasks.values()))
        return set(tasks)

    def _find_missing(self, keys: Iterable[BlockKey]) -> set[BlockKey]:
        return {key for key in keys if not any(key in tier for tier in self._disk_tiers)}

    def _start(self, key: BlockKey, scope: Scope, model: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._compute(key, scope, model))
        self._running[key] = task
        task.add_done_callback(lambda task: (self._running.pop(key), task.cancelled() or task.exception()))
        return task

    async def _compute(self, key: BlockKey, scope: Scope, model: str) -> None:
        address, reports = self.receiver.expect()
        params = block_params(self._secret, EncodeRequest(first_len=num_first(key), reply_to=address))
        body = {
            "model": model,
            "prompt": first_ids(key) + token_ids(key),
            "max_tokens": 1,
            "temperature": 0,
            "cache_salt": encode_salt(self._secret),
            "kv_transfer_params": params,
        }
        content = json.dumps(body).encode()
        try:
            own_scope = with_request(scope, "POST", self._path, content, only_authorization=True)
            response = await call(self._app, own_scope, content)
            if response.status != 200:
                raise RequestRefused(Response(response.status, hide_secrets(response.body)))
            stored = await asyncio.wait_for(reports.first, STORE_TIMEOUT_S)
        except TimeoutError:
            raise UserError("a block of the prompt was computed, but not stored: ask again") from None
        finally:
            self.receiver.forget(address)
        if stored.failure:
            raise UserError(stored.failure)
        self._counters.count_encoded(num_tokens(key))
