"""A server that answers chat completions as scripted, with every fault that an endpoint may have."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Respond = Callable[[str, int], "Reply"]
"""Takes the question's text and the number of times that it was asked before, and returns the reply."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server sends.

    body: JSON, or bytes that are sent as they are.
    declared: the length in the header; None is that of the body.
    delay_s: time before anything is sent.
    byte_delay_s: time after each byte.
    when_slow: called before the delay, or after the first byte.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    declared: int | None = None
    delay_s: float = 0
    byte_delay_s: float = 0
    when_slow: Callable[[], object] = lambda: None


def completion(answer: Any, finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    """Return the body of a chat completion."""
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": answer, **message},
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def error(message: str, **fields: str) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"message": message, **fields}}


@dataclass
class Server:
    """A running server: its address, and what it was asked.

    asked: how often each question was asked.
    requests: headers (lower case) and body of every request, in order.
    most_at_once: the largest number of requests whose replies were made at the same time.
    """

    base_url: str
    respond: Callable[[Any, int], Reply]
    asked: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    most_at_once: int = 0
    num_open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def endpoint(respond: Callable[[Any, int], Reply], *, takes_body: bool = False) -> Iterator[Server]:
    """Run a server in threads of this process.

    takes_body: `respond` takes the whole body of a request instead of the question's text.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            with server.lock:
                before = server.asked[text]
                server.asked[text] += 1
                server.requests.append(
                    ({k.lower(): v for k, v in self.headers.items()}, body | {"path": self.path})
                )
                server.num_open += 1
                server.most_at_once = max(server.most_at_once, server.num_open)
            try:
                try:
                    reply = server.respond(body if takes_body else text, before)
                finally:
                    with server.lock:  # a client that has its answer may ask again at once
                        server.num_open -= 1
                self._send(reply)
            except OSError:
                pass  # the client has gone

        def _send(self, reply: Reply) -> None:
            if reply.delay_s:
                reply.when_slow()
            time.sleep(reply.delay_s)
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(reply.declared or len(content)),
            }
            for name, value in (headers | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if not reply.byte_delay_s:
                self.wfile.write(content)
                return
            for index, byte in enumerate(content):
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if index == 0:
                    reply.when_slow()
                time.sleep(reply.byte_delay_s)

        def log_message(self, *arguments: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # connections beyond it would wait for a second

    http = Listener(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1", respond)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
