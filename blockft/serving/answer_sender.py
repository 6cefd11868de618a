"""Passes the answer of vLLM to a client, with what was reused; holds back a failure before the first byte."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from blockft.serving.asgi import Message, Send, error_body, send_json
from blockft.serving.block_request import hide_secrets
from blockft.serving.completion_format import ChatFormat

Usage = dict[str, Any]

ABORTED = "vLLM has aborted it, because the server ends or was paused: ask again"
"""Why an answer that vLLM ends early is not sent. vLLM would give its first tokens with status 200."""


class AnswerSender:
    """Receives the messages of vLLM's response to a completion request, and sends them on.

    A request whose blocks cannot be loaded fails before its first token. vLLM then responds with status 500,
    or with a stream whose first event is an error. Nothing is sent in this case, `failure` is set, and the
    request may be repeated.

    is_complete: the whole answer was sent. has_failed: it failed after its first part was sent.

    usage: returns what the answer's usage says about blocks.
    confirm: returns why the answer must not be sent, or "". It is called before the first byte.
    explain: returns why vLLM failed an answer whose first part was sent, or "" if only vLLM knows.
    """

    def __init__(
        self,
        send: Send,
        usage: Callable[[], Awaitable[Usage]],
        confirm: Callable[[], Awaitable[str]],
        explain: Callable[[], Awaitable[str]],
        *,
        is_chat: bool,
    ) -> None:
        self._send, self._usage, self._confirm, self._explain = send, usage, confirm, explain
        self._chat = ChatFormat() if is_chat else None
        self._start: Message = {}
        self._body = b""
        self._is_stream = False
        self._has_sent = self.has_failed = False
        self.failure: str | None = None
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            content_type = dict(message.get("headers", ())).get(b"content-type", b"")
            self._is_stream = message["status"] == 200 and content_type.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body" and self.failure is None:
            self._body += message.get("body", b"")
            is_last = not message.get("more_body", False)
            if self._is_stream:
                await self._send_events(is_last)
            elif is_last:
                await self._send_answer()

    async def _send_answer(self) -> None:
        status = self._start["status"]
        if status >= 500:
            self.failure = _error_message(self._body)
            return
        if status != 200:
            await self._send(self._start)
            body = hide_secrets(self._body)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
            return
        answer = json.loads(self._body)
        if answer is None:
            return  # the client has left, and vLLM has stopped its request
        if failure := ABORTED if _is_aborted(answer) else await self._confirm():
            self.failure = failure
            return
        await self._add_usage(answer)
        answer = self._chat.answer(answer) if self._chat else answer
        self.is_complete = True
        await send_json(self._send, status, answer, self._start["headers"])

    async def _send_events(self, is_last: bool) -> None:
        *events, self._body = self._body.split(b"\n\n")
        lines = []
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if not self._has_sent and (failure := await self._early_failure(data)):
                self.failure = failure
                return
            lines += await self._convert(data)
            if not self._has_sent:
                self._has_sent = True
                await self._send(self._start)
        body = b"".join(b"data: %s\n\n" % line for line in lines)
        if body or is_last:
            self.is_complete = is_last and not self.has_failed
            await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def _early_failure(self, data: bytes) -> str:
        """Return why a stream must not begin with an event, or ""."""
        if data.startswith(b'{"error"'):
            return _error_message(data)
        if data.startswith(b"{") and _is_aborted(json.loads(data)):
            return ABORTED
        return await self._confirm()

    async def _convert(self, data: bytes) -> list[bytes]:
        """Return the data of the events for the client."""
        if not data.startswith(b"{"):
            return [data]  # [DONE]
        if self.has_failed:
            return []
        chunk = json.loads(data)
        if "choices" not in chunk or _is_aborted(chunk):
            return [await self._error_event(data, is_error="choices" not in chunk)]
        if chunk.get("usage"):
            await self._add_usage(chunk)
        elif not self._chat:
            return [data]
        chunks = self._chat.chunks(chunk) if self._chat else [chunk]
        return [json.dumps(chunk).encode() for chunk in chunks]

    async def _error_event(self, data: bytes, *, is_error: bool) -> bytes:
        """Return the event that ends a stream with an error. is_error: vLLM's event is an error."""
        self.has_failed = True
        if reason := await self._explain() if is_error else ABORTED:
            return json.dumps(error_body(500, reason, "InternalServerError")).encode()
        return hide_secrets(data)

    async def _add_usage(self, answer: dict[str, Any]) -> None:
        usage = await self._usage()
        answer["usage"] |= {
            "prompt_tokens_details": {"cached_tokens": usage["tokens_reused"]},
            "block_attention": usage,
        }


def _is_aborted(answer: dict[str, Any]) -> bool:
    """Return whether vLLM has ended an answer early."""
    return any(choice.get("finish_reason") == "abort" for choice in answer.get("choices", ()))


def _error_message(content: bytes) -> str:
    """Return the message of an error of vLLM."""
    try:
        return str(json.loads(hide_secrets(content))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "vLLM gave no reason"
