"""Faults over HTTP: the server lives, one request fails with its sentence, nothing wrong is ever answered.

Slow: one server with vLLM for all tests of the file. After each fault its answers are compared again.
"""

import json
import math
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from blockft.inference.block_key import context_keys, key_digest
from blockft.inference.cache_entry import SUFFIX
from blockft.inference.cache_folder import CacheFolder
from blockft.serving.launch import STOP_TIMEOUT_S
from tests.commands import wait_until
from tests.serving.real_server import (
    MODEL,
    TOLERANCE,
    Chat,
    Server,
    check,
    demo_chats,
    forget_memory,
    in_mode,
    needs_vllm,
    reference,
    reference_models,
    shuffled,
    start_server,
)

pytestmark = needs_vllm

MAX_LEN = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def chats(folder: Path) -> list[Chat]:
    chats = demo_chats(folder)
    return chats[:12] + shuffled(chats[12:24])


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server with some memory for blocks, but not for all."""
    server = start_server(
        folder, folder / "cache", *("--max-model-len", str(MAX_LEN), "--host-bytes", "500kB")
    )
    yield server
    if server.process.poll() is None:
        server.stop()


def post(server: Server, body: bytes, path: str = "completions") -> tuple[int, Any]:
    """Send bytes, and return the status and the JSON of the response."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/{path}", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def assert_lives(server: Server, chats: list[Chat]) -> None:
    """Check answers in both modes, and that no request and no page is left."""
    check(server, [*in_mode("block", chats[:10]), *in_mode("full", chats[:3])])
    deadline = time.monotonic() + 30
    while any(
        server.metric(f"vllm:{name}{{")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    ):
        assert time.monotonic() < deadline, "a request was left behind"
        time.sleep(0.2)


def test_damaged_entries_are_computed_again(server: Server, folder: Path, chats: list[Chat]) -> None:
    """Every kind of damage: a flipped bit in each part, a truncated, an empty and a foreign file."""
    check(server, in_mode("block", chats))
    forget_memory()
    files = sorted((folder / "cache").rglob("*.safetensors"))
    assert len(files) > 20
    content = {file: file.read_bytes() for file in files}
    for index, file in enumerate(files):
        data, kind = bytearray(content[file]), index % 6
        if kind < 3:
            data[(7, len(data) // 2, len(data) - 1)[kind]] ^= 0x10
        elif kind == 3:
            del data[len(data) // 2 :]
        elif kind == 4:
            data.clear()
        else:
            data[:] = content[files[index - 1]]
        file.write_bytes(data)
    assert check(server, in_mode("block", chats))["computed"] > 10
    assert_lives(server, chats)


def test_a_folder_that_is_removed_is_made_again(server: Server, folder: Path, chats: list[Chat]) -> None:
    shutil.rmtree(folder / "cache")
    forget_memory()
    assert check(server, in_mode("block", chats))["computed"] > 10
    assert not check(server, in_mode("block", chats))["computed"]
    forget_memory()
    assert list((folder / "cache").rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_fails_requests_and_answers_nothing_wrong(
    server: Server, folder: Path, chats: list[Chat]
) -> None:
    """A file stands where the folder was: also root cannot write there. Answers come from memory or fail."""
    shutil.rmtree(folder / "cache")
    (folder / "cache").touch()
    failures: list[str] = []
    try:
        for chat in chats[:8]:
            try:
                answer = server.ask(chat)
            except openai.APIStatusError as error:
                failures.append(error.message)
            else:
                ids, logprobs = reference(chat)
                assert answer.choices[0].token_ids == ids
                assert answer.choices[0].logprobs.token_logprobs == pytest.approx(logprobs, abs=TOLERANCE)
        assert all("evicted" in failure or "stored" in failure for failure in failures), failures
        check(server, in_mode("full", chats[:4]))
    finally:
        (folder / "cache").unlink()
    assert_lives(server, chats)


def test_a_prompt_that_is_too_long_and_an_unknown_model_are_named(server: Server, chats: list[Chat]) -> None:
    long = [{"role": "user", "content": ["many words " * 300, "b"]}]
    with pytest.raises(openai.BadRequestError, match=f"the server takes {MAX_LEN} together: use fewer"):
        server.ask(long)
    with pytest.raises(openai.BadRequestError, match="the server takes"):
        server.ask(chats[0], num_new=MAX_LEN)
    for prompt, extra in (("", {"messages": chats[0]}), ("The", {})):
        with pytest.raises(openai.NotFoundError, match=r"other.* does not exist"):
            server.client.completions.create(model="other", prompt=prompt, max_tokens=1, extra_body=extra)
    assert_lives(server, chats)


PROMPT = {"blocks": ["The mayor of Oslo is Ann.\n", "Who is the mayor?"], "max_tokens": 2}
WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e308,
    math.nan,
    math.inf,
    "text",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    10**40,
)
FIELDS = (
    *("blocks", "messages", "documents", "question", "mode", "model", "max_tokens", "temperature", "top_p"),
    *("top_k", "seed", "n", "stop", "stop_token_ids", "logprobs", "logit_bias", "min_tokens", "cache_salt"),
    *("response_format", "stream", "stream_options", "priority", "bad_words", "allowed_token_ids", "prompt"),
    *("kv_transfer_params", "echo", "best_of", "use_beam_search", "prompt_logprobs", "suffix", "user"),
)
"""Fields of a request, each of which gets wrong values."""

BROKEN: list[bytes] = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b'{"blocks": ["a", "b"]',
    b'{"blocks": ["\xff", "b"]}',
    b'{"blocks":' + b"[" * 100_000,
    b'{"blocks": ["a", "b"], "blocks": 3}',
    json.dumps(PROMPT).encode("utf-16"),
]
"""Bodies that are no request."""


def test_hundreds_of_bad_requests_fail_alone(server: Server, chats: list[Chat]) -> None:
    """A request with a wrong value is refused with a sentence, or answered: null, for example, is no value.

    Other clients ask at the same time, and their answers stay right.
    """
    bodies = [json.dumps({**PROMPT, field: value}).encode() for field in FIELDS for value in WRONG]
    assert len(bodies) > 400
    statuses: dict[int, list[bytes]] = {}

    def send(body: bytes) -> None:
        for path in ("completions", "chat/completions"):
            status, answer = post_any(server, body, path)
            statuses.setdefault(status, []).append(body)
            if status >= 400:
                # vLLM's framework itself refuses bytes that are no text
                message = answer["error"]["message"] if "error" in answer else answer["detail"]
                assert message and "Traceback" not in message, body

    with ThreadPoolExecutor(8) as clients:
        good = clients.submit(check, server, in_mode("block", chats[:8]), num_clients=2)
        list(clients.map(send, [*bodies, *BROKEN]))
        good.result()
    assert statuses.keys() <= {200, 400, 404, 422}, {s: b[:5] for s, b in statuses.items() if s >= 500}
    assert len(statuses[400]) > 400
    assert_lives(server, chats)


def post_any(server: Server, body: bytes, path: str) -> tuple[int, Any]:
    """Send bytes that may ask for a stream. An error in a stream has its own status."""
    try:
        return post(server, body, path)
    except json.JSONDecodeError as error:
        events = [line.removeprefix("data: ") for line in error.doc.splitlines() if line]
        assert events[-1] == "[DONE]"
        answers = [json.loads(event) for event in events[:-1]]
        failed = [answer for answer in answers if "error" in answer]
        return (failed[0]["error"]["code"], failed[0]) if failed else (200, answers[-1])


def test_clients_that_leave_stop_their_requests(server: Server, chats: list[Chat]) -> None:
    """Before the first token, and in the middle of a stream."""
    options: dict[str, Any] = {"model": "", "prompt": "", "max_tokens": 300}
    extra = {"min_tokens": 300}
    for number, chat in enumerate(chats):
        client = server.client.with_options(timeout=0.002 * (number + 1))
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(**options, extra_body={"messages": chat, **extra})
    aborted = server.metric("vllm:request_success_total{")
    for chat in chats:
        stream = server.client.completions.create(
            **options, stream=True, extra_body={"messages": chat, **extra}
        )
        next(iter(stream))
        stream.close()
    assert_lives(server, chats)
    assert server.metric("vllm:request_success_total{") >= aborted


def stored_blocks(folder: Path, chat: Chat) -> list[Path]:
    """Return the entries of the user's blocks that are in the cache folder."""
    engine, _ = reference_models(MODEL)
    blocks = engine.encode(engine.parse_request({"messages": chat}), 1)[:-1]
    names = [f"{key_digest(key)}{SUFFIX}" for key in context_keys(blocks)[-len(chat[0]["content"]) + 1 :]]
    return [path for name in names for path in (folder / "cache").rglob(name)]


def test_a_server_that_is_ended_answers_right_or_fails_and_leaves_no_process(
    server: Server, chats: list[Chat], folder: Path
) -> None:
    """The last test of the file: SIGTERM while requests run, and while a block waits for its write."""
    wrong: list[Any] = []
    ended: list[str] = []
    begun = threading.Barrier(9)

    def ask(index: int) -> None:
        begun.wait()
        for chat in chats[index::8] * 40:
            try:
                answer = server.ask(chat)
            except openai.OpenAIError as error:
                ended.append(type(error).__name__)
                return
            choice, expected = answer.choices[0], reference(chat)[0]
            if choice.token_ids != expected:
                wrong.append((choice.token_ids, choice.finish_reason, expected))

    for chat in chats:
        reference(chat)
    new: Chat = [{"role": "user", "content": ["New facts.\n", "Ada has a red box.\n", "Who has a box?"]}]
    processes = psutil.Process(server.process.pid).children(recursive=True)
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    with CacheFolder(folder / "cache").locked():  # the server cannot write
        check(server, in_mode("block", [new]))
        time.sleep(0.5)
        assert not stored_blocks(folder, new)
        server.process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: "EngineCore: exiting busy loop" in server.log.read_text(),
            is_running=lambda: server.process.poll() is None,
        )
    code = server.process.wait(STOP_TIMEOUT_S - 10)  # it ends by itself: nobody kills it
    for thread in threads:
        thread.join(60)
    assert len(stored_blocks(folder, new)) == 2
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong and len(ended) == 8 and code == 130
    _, alive = psutil.wait_procs(processes, 10)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive), alive
