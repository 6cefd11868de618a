"""An ASGI application that behaves as vLLM's server: it answers with the tokens of its prompt."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blockft.inference.block_key import BlockKey, block_key, key_digest
from blockft.serving.asgi import Message, Receive, Scope, Send, read_body, send_json
from blockft.serving.block_request import BlockRequest, EncodeRequest, block_keys, parse_params
from blockft.serving.report import Report, Reporter
from tests.serving.stubs import SECRET

MODEL, MAX_LEN = "toy", 400
MODEL_ENTRY = {"id": MODEL, "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": MAX_LEN}

LEAVE = "!"
"""The last block of a prompt whose client leaves. Its token id is 0 in the tokenizer of the tests."""


@dataclass
class FakeVllm:
    """Stores blocks, and fails a request whose blocks it lacks, as vLLM with the connector does.

    blocks: the stored blocks. completions: the bodies of all completion requests.
    fails_to_store: which blocks have the store_failure.
    evict: called before the blocks of a request are looked up. is_full_attention: it ignores all blocks.
    late_reports: sent after the report that all blocks of a request were loaded. The request then fails, a
        stream after its first part.
    local_sees_first: as in the served model.
    is_ending: it aborts all requests, and answers with what it has.
    """

    api_key: str = ""
    local_sees_first: bool = False
    blocks: set[BlockKey] = field(default_factory=set)
    completions: list[dict[str, Any]] = field(default_factory=list)
    others: list[tuple[Scope, bytes]] = field(default_factory=list)
    evict: Callable[["FakeVllm"], None] = lambda self: None
    store_failure: str = ""
    fails_to_store: Callable[[BlockKey], bool] = lambda key: True
    on_store: Callable[[BlockKey], None] = lambda key: None
    load_failure: str = ""
    late_reports: list[Report] = field(default_factory=list)
    full_mode_failure: str = ""
    is_ending: bool = False
    is_full_attention: bool = False
    saw_disconnect: bool = False
    num_listed: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        authorization = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.api_key and authorization != f"Bearer {self.api_key}":
            await send_json(send, 401, {"error": "Unauthorized"})
        elif scope["path"] == "/v1/models":
            self.num_listed += 1
            await send_json(send, 200, {"object": "list", "data": [MODEL_ENTRY]})
        else:
            body = await read_body(receive, 1 << 30)
            is_completion = scope["path"] == "/v1/completions" and body.startswith(b"{")
            fields = json.loads(body) if is_completion else {}
            if isinstance(fields.get("prompt"), list):
                self.completions.append(fields)
                await self._complete(fields, receive, send)
            else:
                self.others.append((scope, body))
                await send_json(send, 200, {"is_from_vllm": True})

    async def _complete(self, fields: dict[str, Any], receive: Receive, send: Send) -> None:
        request = parse_params(fields.get("kv_transfer_params"), SECRET)
        if fields.get("temperature") == "hot":
            message = f"temperature is no number in {fields}"  # vLLM quotes requests
            await send_json(send, 400, {"error": {"message": message, "code": 400}})
            return
        if fields["prompt"][-1] == 0:  # never for a list of prompts
            self.saw_disconnect = (await receive())["type"] == "http.disconnect"
            await send_json(send, 200, None)  # as vLLM does
            return
        reporter = Reporter()
        failure, is_late = "", False
        if isinstance(request, EncodeRequest):
            await asyncio.sleep(0.01)
            for ids in fields["prompt"]:
                key = block_key(ids[request.first_len :], ids[: request.first_len])
                failure = self.store_failure if self.fails_to_store(key) else ""
                if not failure:
                    self.blocks.add(key)
                    self.on_store(key)
                reporter.send(request.reply_to, Report(block=key_digest(key), failure=failure))
            failure = ""
        elif isinstance(request, BlockRequest) and not self.is_full_attention:
            failure = self._load(fields, request, reporter)
            if not failure and self.late_reports:
                is_late, failure = True, "Internal server error"
                while self.late_reports:
                    reporter.send(request.reply_to, self.late_reports.pop(0))
        elif request is None:
            failure = self.full_mode_failure
        reporter.close()
        if fields.get("stream"):
            await self._stream(fields, failure, send, is_late=is_late)
        elif failure:
            await send_json(send, 500, {"error": {"message": failure, "code": 500}})
        else:
            answer = _completion(fields)
            if self.is_ending:
                answer["choices"][0] |= {"text": "be", "finish_reason": "abort"}
            await send_json(send, 200, answer)

    def _load(self, fields: dict[str, Any], request: BlockRequest, reporter: Reporter) -> str:
        self.evict(self)
        keys = block_keys(fields["prompt"], request.lengths, local_sees_first=self.local_sees_first)
        missing = [index for index, key in enumerate(keys) if key not in self.blocks]
        report = Report(sources=["host"] * len(keys))
        if missing or self.load_failure:
            report = Report(missing=missing, failure=self.load_failure)
        reporter.send(request.reply_to, report)
        return "Internal server error" if missing or self.load_failure else ""

    async def _stream(self, fields: dict[str, Any], failure: str, send: Send, *, is_late: bool) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        events: list[Any] = [{"error": {"message": failure, "code": 500}}]
        if is_late:
            events.insert(0, _chunk([{"index": 0, "text": "be", "finish_reason": None}]))
        if not failure:
            texts = [("be", None), ("low\n\n", None), ("", "stop")]
            if self.is_ending:
                num_tokens = fields.get("min_tokens", 0)  # of those that are computed already
                texts = [("be", None)] * num_tokens + [("", "abort")]
            events = [_chunk([{"index": 0, "text": text, "finish_reason": end}]) for text, end in texts]
            if (fields.get("stream_options") or {}).get("include_usage"):
                events.append(_chunk([]) | {"usage": _usage(fields)})
        content = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
        content += b"data: [DONE]\n\n"
        for start in range(0, len(content), 50):  # events do not end where messages do
            part = content[start : start + 50]
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _completion(fields: dict[str, Any]) -> dict[str, Any]:
    logprobs = {"tokens": ["be"], "token_logprobs": [-0.5], "top_logprobs": [{"be": -0.5, "a": -1.0}]}
    choice = {"index": 0, "text": "below", "finish_reason": "stop", "logprobs": None}
    if "logprobs" in fields:
        choice["logprobs"] = logprobs
    base = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL}
    return base | {"choices": [choice], "usage": _usage(fields)}


def _usage(fields: dict[str, Any]) -> dict[str, int]:
    num_prompt, num_new = len(fields["prompt"]), fields.get("min_tokens") or 3
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
    }


def _chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
    base = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL}
    return base | {"choices": choices}


@dataclass
class Client:
    """A client of an ASGI application. is_gone: it leaves after its request."""

    app: Any
    headers: dict[str, str] = field(default_factory=dict)
    is_gone: bool = False

    async def post(self, path: str, body: Any) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body of a response."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
        sent: list[Message] = []
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        headers.append((b"content-length", str(len(content)).encode()))

        async def receive() -> Message:
            if messages:
                return messages.pop()
            if self.is_gone:
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "root_path": ""}
        await self.app(scope, receive, send)
        if not sent:
            return 0, {}, b""
        start, *parts = sent
        names = {name.decode().lower(): value.decode() for name, value in start.get("headers", ())}
        assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]
        return start["status"], names, b"".join(part["body"] for part in parts)
