"""Small parts of ASGI: read a body, call an application with another body, send JSON."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClientGone(Exception):
    """The client left before its request was complete."""


class BodyTooLarge(Exception):
    """The body of a request is larger than allowed."""


@dataclass(frozen=True)
class Response:
    """The complete response of an application."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the body, or None if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        ClientGone, BodyTooLarge
    """
    parts, num_bytes, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise BodyTooLarge
        more = message.get("more_body", False)
    return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives a body first, and then the messages of `receive`."""
    is_read = False

    async def receive_replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_replayed


async def never() -> Message:
    """Receive nothing: the client of a request of our own never leaves."""
    await asyncio.Event().wait()
    raise AssertionError


def with_request(
    scope: Scope, method: str, path: str, body: bytes = b"", *, only_authorization: bool = False
) -> Scope:
    """Return the scope of another request by the same client, with the client's headers.

    only_authorization: keep no other header, because some name the client's request, such as x-request-id.
    """
    replaced = (b"content-length", b"content-type", b"transfer-encoding", b"accept-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
    if only_authorization:
        headers = [(name, value) for name, value in headers if name.lower() == b"authorization"]
    headers += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    root = scope.get("root_path", "")
    full_path = root + path
    # what routers and middleware store in the scope belongs to the client's own request
    own = {name: value for name, value in scope.items() if name in _CONNECTION_KEYS}
    return own | {
        "method": method,
        "path": full_path,
        "raw_path": full_path.encode(),
        "query_string": b"",
        "headers": headers,
        "state": dict(scope.get("state", {})),
    }


_CONNECTION_KEYS = (
    *("type", "asgi", "http_version", "scheme", "client", "server", "root_path", "extensions", "app"),
)


async def call(app: Application, scope: Scope, body: bytes = b"") -> Response:
    """Return the complete response of an application."""
    status, parts = 500, []

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, replay(body, never), send)
    return Response(status, b"".join(parts))


async def send_json(send: Send, status: int, value: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Send a complete response of JSON. The length and the type of its body replace those in `headers`."""
    body = json.dumps(value).encode()
    replaced = {b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
    headers = [*(pair for pair in headers if pair[0].lower() not in replaced), *replaced.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(send: Send, status: int, message: str, kind: str = "BadRequestError") -> None:
    """Send an error as vLLM does."""
    await send_json(send, status, error_body(status, message, kind))


def error_body(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return an error as vLLM words it. param: the field that is wrong."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
