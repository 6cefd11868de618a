"""The front end of a server: an ASGI middleware over vLLM's own application.

A request with documents, blocks or lists of block texts is worded and tokenized by blockft. Its missing
blocks are computed by vLLM and stored. Then it goes to vLLM as a completion of token ids, whose local blocks
the connector loads. All other requests go to vLLM unchanged and get full attention.
"""

import asyncio
import json
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from blockft.data.sample import RecordError
from blockft.errors import UserError
from blockft.inference.answer import NOT_CACHED
from blockft.inference.block_cache import Tier
from blockft.inference.block_key import BlockKey, context_keys, num_tokens
from blockft.inputs import shorten
from blockft.serving.answer_sender import ABORTED, AnswerSender, Usage
from blockft.serving.asgi import (
    Application,
    BodyTooLarge,
    ClientGone,
    Receive,
    Response,
    Scope,
    Send,
    call,
    error_body,
    read_body,
    replay,
    send_error,
    send_json,
    with_request,
)
from blockft.serving.block_request import BlockRequest, ReplyAddress, block_params, block_salt
from blockft.serving.metrics import Counters, PrometheusCounters
from blockft.serving.missing_blocks import BlockComputer, RequestRefused
from blockft.serving.prompt_encoder import PromptEncoder
from blockft.serving.prompt_request import PromptRequest, parse_prompt_request, prompt_field
from blockft.serving.report import ExpectedReports, Report, ReportReceiver
from blockft.serving.served_model import ServedModel

SERVED_MODEL_VARIABLE = "BLOCKFT_SERVED_MODEL"
"""The environment variable with the path of the file of the served model."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

OWN_DOCUMENTS = ("/rerank", "/score")
"""Ends of paths of vLLM whose requests have documents that are no blocks of a prompt."""

MAX_BODY_BYTES = 64 << 20

MAX_CLIENTS = 1000
"""Clients whose models are known: a server without keys takes any."""

MAX_ATTEMPTS = 3
"""How often a request is sent to vLLM if its blocks are evicted while it waits."""

REPORT_TIMEOUT_S = 5
"""How long an answer waits for the report on its blocks, which the connector sends before the first token."""

FAILURE_TIMEOUT_S = 1
"""How long a failure of vLLM waits for a report of its reason, if the first report told of no failure."""

ENGINE_END_S = 40
"""How long the process of vLLM's engine may take to end. Its workers write blocks to the folder meanwhile. By
default vLLM kills the process at once."""

END_TIMEOUT_S = 10
"""How long requests may take to end after vLLM's engine has ended. uvicorn waits for ever by default, and
requests that the engine has lost never end."""

_log = logging.getLogger("blockft.serving")


@dataclass(frozen=True, kw_only=True)
class EncodedRequest:
    """A request with the token ids of its blocks; in full mode a prompt is one block.

    model: the name of the model. max_len: the largest number of tokens of a prompt and its answer.
    context: the keys of the local blocks, which are loaded. There are none in full mode.
    """

    request: PromptRequest
    blocks: Sequence[NDArray[np.int32]]
    context: Sequence[BlockKey]
    model: str
    max_len: int


class BlockFrontEnd:
    """The middleware. vLLM calls `BlockFrontEnd(app)`; the environment names the file of the served model.

    Raises:
        UserError: the model's tokenizer or the cache folder cannot be used.
    """

    def __init__(
        self,
        app: Application,
        served: ServedModel | None = None,
        counters: Counters | None = None,
    ) -> None:
        self._app = app
        self._served = served or ServedModel.load(Path(os.environ[SERVED_MODEL_VARIABLE]))
        self._counters = counters or PrometheusCounters()
        self._encoder = PromptEncoder(self._served)
        self._computer: BlockComputer | None = None
        self._models: dict[tuple[bytes, ...], dict[str, int]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _set_time_to_end(scope)
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if not _may_have_prompt(scope) or path.endswith(OWN_DOCUMENTS):
            await self._app(scope, receive, send)
            return
        try:
            content = await read_body(receive, MAX_BODY_BYTES)
        except ClientGone:
            return
        except BodyTooLarge:
            await send_error(send, 413, f"the request is larger than {MAX_BODY_BYTES >> 20} MiB")
            return
        body = _parse_object(content)
        if body is None or prompt_field(body) is None:
            await self._app(scope, replay(content, receive), send)
            return
        try:
            await self._answer(body, path, scope, receive, send)
        except (UserError, RecordError) as error:
            self._counters.count_failure("refused")
            await send_error(send, 400, " ".join(str(error).split()))
        except RequestRefused as refused:
            self._counters.count_failure("refused")
            await send_json(send, refused.response.status, refused.response.json())

    async def _answer(
        self, body: dict[str, Any], path: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request, or raise its error before anything is sent."""
        models = await self._list_models(scope)  # vLLM refuses clients that may not ask
        if path not in (COMPLETIONS, CHAT):
            raise UserError(
                f"{shorten(repr(path))} gives full attention and would ignore {prompt_field(body)}: send the "
                f"request to {CHAT} or {COMPLETIONS}"
            )
        request = parse_prompt_request(body, self._encoder.prompt, is_chat=path == CHAT)
        blocks = await self._encoder.encode(request.sample)
        encoded = _check_request(request, blocks, models, self._served.local_sees_first)
        computer = self._computer = self._computer or self._open_computer()
        computed = await computer.compute_missing(encoded.context, scope, encoded.model)
        failure = ""
        for _ in range(MAX_ATTEMPTS):
            failed = await self._ask_vllm(encoded, computed, computer.receiver, scope, receive, send)
            if failed is None:
                return
            failure = failed.failure
            if not failed.missing:
                break
            self._counters.count_failure("missing")
            failure = f"{len(failed.missing)} of its blocks were evicted while it waited"
            missing = [encoded.context[index] for index in failed.missing]
            computed |= await computer.compute(missing, scope, encoded.model)
        self._counters.count_failure("failed")
        await send_error(send, 500, f"the request failed: {failure}", "InternalServerError")

    async def _ask_vllm(
        self,
        encoded: EncodedRequest,
        computed: set[BlockKey],
        receiver: ReportReceiver,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> Report | None:
        """Send vLLM's response to a request on. Return why it has failed, if nothing was sent."""
        address, reports = receiver.expect()
        usage = self._usage(encoded, computed, reports.first)
        confirm = partial(_confirm, encoded, reports.first)
        explain = partial(_explain, encoded, reports)
        sender = AnswerSender(send, usage, confirm, explain, is_chat=encoded.request.is_chat)
        try:
            content = to_json(self._completion(encoded, address))
            inner_scope = with_request(scope, "POST", COMPLETIONS, content)
            await self._app(inner_scope, replay(content, receive), sender)
            if sender.failure is not None:
                failed = Report() if sender.failure == ABORTED else await _wait_for_failure(encoded, reports)
                return replace(failed, failure=failed.failure or sender.failure)
            if sender.has_failed:
                self._counters.count_failure("failed")
            elif sender.is_complete:
                await usage()  # a stream may report no usage, and its answer counts too
            return None
        finally:
            receiver.forget(address)

    def _open_computer(self) -> BlockComputer:
        receiver = ReportReceiver(Path(self._served.socket_folder))
        return BlockComputer(self._app, COMPLETIONS, self._served, receiver, self._counters)

    async def _list_models(self, scope: Scope) -> dict[str, int]:
        """Return the names of the models of the server, and their largest number of tokens.

        vLLM is asked once for each client, because a server keeps its models and its keys.

        Raises:
            RequestRefused: vLLM does not answer this client.
        """
        own_scope = with_request(scope, "GET", "/v1/models", only_authorization=True)
        client = tuple(value for name, value in own_scope["headers"] if name.lower() == b"authorization")
        if client not in self._models:
            response = await call(self._app, own_scope)
            if response.status != 200:
                raise RequestRefused(response)
            if len(self._models) >= MAX_CLIENTS:
                self._models.clear()
            models = response.json()["data"]
            self._models[client] = {model["id"]: model["max_model_len"] for model in models}
        return self._models[client]

    def _completion(self, encoded: EncodedRequest, address: ReplyAddress) -> dict[str, Any]:
        """Return the body of the completion request to vLLM."""
        body = dict(encoded.request.sampling) | {"model": encoded.model}
        body["prompt"] = np.concatenate(encoded.blocks).tolist()
        if not body.get("ignore_eos"):
            body["stop_token_ids"] = [*body.get("stop_token_ids", ()), *self._encoder.end_token_ids]
        if encoded.request.is_chat and body.get("max_tokens") is None:
            body["max_tokens"] = encoded.max_len - len(body["prompt"])
        if encoded.context:
            lengths = tuple(map(num_tokens, encoded.context))
            salt = block_salt(self._served.secret, lengths, body.get("cache_salt", ""))
            block_request = BlockRequest(lengths=lengths, salt=salt, reply_to=address)
            body["cache_salt"] = salt
            body["kv_transfer_params"] = block_params(self._served.secret, block_request)
        return {name: value for name, value in body.items() if value is not None}

    def _usage(
        self, encoded: EncodedRequest, computed: set[BlockKey], report: asyncio.Future[Report]
    ) -> Callable[[], Awaitable[Usage]]:
        """Return a function that returns the usage of an answer's blocks, and counts the answer once."""
        counted: list[Usage] = []

        async def usage() -> Usage:
            if not counted:
                sources = (await _wait_for(report)).sources if encoded.context else ()
                counted.append(self._count(encoded, computed, sources))
            return counted[0]

        return usage

    def _count(self, encoded: EncodedRequest, computed: set[BlockKey], sources: Sequence[str]) -> Usage:
        blocks, tokens = Counter[str](), Counter[str]()
        for key, tier in zip(encoded.context, sources, strict=False):
            source = NOT_CACHED if key in computed else tier
            blocks[source] += 1
            tokens[source] += num_tokens(key)
        self._counters.count_answer(encoded.request.mode, blocks, tokens)
        return {
            "mode": encoded.request.mode,
            "num_blocks": len(encoded.blocks),
            "blocks_reused": sum(blocks[tier] for tier in Tier),
            "tokens_reused": sum(tokens[tier] for tier in Tier),
            "sources": dict(blocks),
        }


def _set_time_to_end(scope: Scope) -> None:
    """Let vLLM wait for its engine, and uvicorn cancel the requests that have not ended some time later.

    The engine has its own copy of vLLM's settings. It still ends its requests at once, unless the server was
    started with --shutdown-timeout.
    """
    state: Any = getattr(scope.get("app"), "state", None)
    if server := getattr(state, "server", None):
        if server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = END_TIMEOUT_S
        vllm_config = state.engine_client.vllm_config
        if not vllm_config.shutdown_timeout:
            vllm_config.shutdown_timeout = ENGINE_END_S


def _may_have_prompt(scope: Scope) -> bool:
    """Return whether the body of a request may be a JSON object with a prompt of blocks. A form has none."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    content_type = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
    return not content_type.lower().startswith(b"multipart/")


def _check_request(
    request: PromptRequest,
    blocks: Sequence[NDArray[np.int32]],
    models: dict[str, int],
    local_sees_first: bool,
) -> EncodedRequest:
    """Return a request with its blocks.

    Raises:
        UserError: there is no such model, or the prompt and its answer are too long for it.
        RequestRefused: the server has no such model.
    """
    model = request.sampling.get("model") or next(iter(models))
    if model not in models:
        error = error_body(404, f"The model `{model}` does not exist.", "NotFoundError", "model")
        raise RequestRefused(Response(404, json.dumps(error).encode()))
    num_prompt, num_new = sum(map(len, blocks)), request.sampling.get("max_tokens") or 1
    if num_prompt + num_new > models[model]:
        raise UserError(
            f"the prompt has {num_prompt} tokens and its answer up to {num_new}, the server takes "
            f"{models[model]} together: use fewer documents or fewer new tokens"
        )
    local = blocks[:-1] if request.mode == "block" else []
    context = context_keys(local, local_sees_first=local_sees_first)
    return EncodedRequest(request=request, blocks=blocks, context=context, model=model, max_len=models[model])


async def _confirm(encoded: EncodedRequest, report: asyncio.Future[Report]) -> str:
    """Return why an answer cannot be sent, or "". Without a report it could be one of full attention."""
    if not encoded.context or len((await _wait_for(report)).sources) == len(encoded.context):
        return ""
    return "the connector has not reported that its blocks were loaded"


async def _wait_for(report: asyncio.Future[Report]) -> Report:
    """Return a report, or an empty one if it was lost."""
    if report.done():
        return report.result()
    try:
        return await asyncio.wait_for(asyncio.shield(report), REPORT_TIMEOUT_S)
    except TimeoutError:
        _log.warning("the connector has not reported on a request")
        return Report()


async def _wait_for_failure(encoded: EncodedRequest, reports: ExpectedReports) -> Report:
    """Return the report on why vLLM failed a request, or an empty one if the connector did not fail it."""
    if not encoded.context:
        return Report()
    first = await _wait_for(reports.first)
    if first.is_failure:
        return first
    try:
        return await asyncio.wait_for(asyncio.shield(reports.failed), FAILURE_TIMEOUT_S)
    except TimeoutError:
        return Report()


async def _explain(encoded: EncodedRequest, reports: ExpectedReports) -> str:
    """Return why vLLM failed a request whose answer has begun, or "" if the connector did not fail it."""
    failed = await _wait_for_failure(encoded, reports)
    if failed.missing:
        return f"{len(failed.missing)} of its blocks were evicted while it was answered: ask again"
    return failed.failure


def _parse_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a body, or None: vLLM explains what is wrong with any other body."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None
