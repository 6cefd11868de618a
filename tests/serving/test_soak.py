"""Many clients ask one server for minutes: no error, no wrong answer, nothing that grows.

Slow: a server with vLLM, one minute by default. BLOCKFT_SOAK_SECONDS sets another length, and
BLOCKFT_SOAK_JSON names a file for the figures.
"""

import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from blockft.bench.measurement import measurement_provenance
from tests.serving.real_server import (
    MODEL,
    NUM_NEW,
    TOLERANCE,
    Chat,
    Server,
    demo_chats,
    needs_vllm,
    reference,
    reference_models,
    shuffled,
    start_server,
)

pytestmark = needs_vllm

SECONDS = float(os.environ.get("BLOCKFT_SOAK_SECONDS", "60"))
NUM_CLIENTS = 64
SAMPLE_S = 5
NEW_SHARE = 0.05
"""Share of the requests with a new document whose answers are compared. All others are compared."""

WARM_SHARE = 0.5
"""Share of the time after which the server must not grow."""

MAX_GROWTH = {"rss_mb": 32 if SECONDS >= 600 else 128, "descriptors": 8, "threads": 4}
"""Largest growth of the medians between the first and the last third after the warm-up. The allocators of the
processes fill during the first minutes."""

NUM_SAMPLES = 30
"""Samples that are kept in the file of figures."""

KINDS = {"block": 70, "full": 10, "new": 8, "stream": 5, "bad": 4, "leave": 3}
"""Kinds of requests and their weights. `new` has a document that no other request has."""

BAD: list[dict[str, Any]] = [
    {"prompt_logprobs": 1},
    {"mode": "local"},
    {"messages": [{"role": "user", "content": ["a " * 600, "b"]}]},
    {"messages": [{"role": "user", "content": ["a", 3]}]},
]


@dataclass
class Record:
    """What the clients of a server have seen.

    answers: the chat, the mode, and the ids and log probabilities of the answer.
    """

    requests: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    answers: list[tuple[Chat, str, list[int], list[float]]] = field(default_factory=list)
    texts: list[tuple[Chat, str]] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)


def ask(server: Server, chats: list[Chat], rng: random.Random, record: Record) -> None:
    """Send one request of a random kind. An exception is an error of the server."""
    (kind,) = rng.choices([*KINDS], [*KINDS.values()])
    chat = rng.choice(chats)
    record.requests[kind] += 1
    if kind == "bad":
        with pytest.raises(openai.BadRequestError):
            server.ask(chat, **rng.choice(BAD))
    elif kind == "leave":
        client = server.client.with_options(timeout=rng.uniform(0.001, 0.2))
        with suppress(openai.APITimeoutError):
            client.completions.create(model="", prompt="", extra_body={"messages": chat}, max_tokens=100)
    elif kind == "stream":
        messages: Any = chat  # lists of block texts, which the client does not know
        chunks = server.client.chat.completions.create(
            model="", messages=messages, max_tokens=NUM_NEW, temperature=0, stream=True
        )
        texts = (chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        record.texts.append((chat, "".join(texts)))
    else:
        if kind == "new":
            (message,) = chat
            first, *documents = message["content"]
            new = f"The mayor of Oslo {rng.getrandbits(60):x} is Ann.\n"
            chat = [message | {"content": [first, new, *documents]}]
        mode = "full" if kind == "full" else "block"
        answer = server.ask(chat, mode)
        (choice,) = answer.choices
        record.sources.update(answer.usage.block_attention["sources"])
        if kind == "new" and rng.random() > NEW_SHARE:
            return
        record.answers.append((chat, mode, choice.token_ids, choice.logprobs.token_logprobs))


def run_clients(server: Server, chats: list[Chat], record: Record, seconds: float) -> None:
    """Ask from all clients at the same time until the time is over."""
    deadline = time.monotonic() + seconds

    def run_client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < deadline:
            try:
                ask(server, chats, rng, record)
            except Exception as error:
                record.errors.append(f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        list(clients.map(run_client, range(NUM_CLIENTS)))


def usage(server: Server) -> dict[str, float]:
    """Return what the processes of a server use, and vLLM's own gauges."""
    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    rss_mb = {f"{p.name()} {index}": p.memory_info().rss / 1e6 for index, p in enumerate(processes)}
    return {
        "rss_mb": sum(rss_mb.values()),
        **{f"rss_mb of {name}": size for name, size in rss_mb.items()},
        "descriptors": sum(process.num_fds() for process in processes),
        "threads": sum(process.num_threads() for process in processes),
        "waiting": server.metric("vllm:num_requests_waiting{"),
        "running": server.metric("vllm:num_requests_running{"),
        "pages_used": server.metric("vllm:kv_cache_usage_perc{"),
    }


@contextmanager
def sample_usage(server: Server, begun: float) -> Iterator[list[dict[str, float]]]:
    """Sample the usage of a server while the body runs."""
    samples: list[dict[str, float]] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            samples.append({"seconds": time.monotonic() - begun} | usage(server))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def growth(samples: list[dict[str, float]], name: str) -> float:
    """Return the growth of a figure between the first and the last third of the samples."""
    values = [sample[name] for sample in samples]
    third = max(len(values) // 3, 1)
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def wait_until_idle(server: Server) -> dict[str, float]:
    """Wait until vLLM has finished the requests of clients that left, and return its usage."""
    deadline = time.monotonic() + 60
    while (found := usage(server))["running"] or found["waiting"]:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    return found


def check_answers(record: Record) -> float:
    """Compare all answers with the masked forward pass. Return the largest difference."""
    known: dict[str, tuple[list[int], list[float]]] = {}
    largest = 0.0

    def expected(chat: Chat, mode: str) -> tuple[list[int], list[float]]:
        key = json.dumps([chat, mode])
        if key not in known:
            known[key] = reference(chat, mode)
        return known[key]

    for chat, mode, ids, logprobs in record.answers:
        expected_ids, expected_logprobs = expected(chat, mode)
        assert ids == expected_ids
        differences = (abs(a - b) for a, b in zip(logprobs, expected_logprobs, strict=True))
        largest = max(largest, *differences)
    tokenizer = reference_models(MODEL)[0].tokenizer
    for chat, text in record.texts:
        assert text == tokenizer.decode(expected(chat, "block")[0], skip_special_tokens=True)
    assert largest < TOLERANCE
    return largest


def save(figures: dict[str, Any]) -> None:
    """Write the figures into the file that BLOCKFT_SOAK_JSON names, if it names one."""
    if file := os.environ.get("BLOCKFT_SOAK_JSON"):
        command = f"BLOCKFT_SOAK_SECONDS={SECONDS:.0f} pytest -m slow tests/serving/test_soak.py"
        content = measurement_provenance() | {"command": command} | figures
        Path(file).write_text(json.dumps(content, indent=2) + "\n")


def test_many_clients_for_minutes_leave_no_error_no_wrong_answer_and_no_growth(tmp_path: Path) -> None:
    """Blocks are evicted from memory and from the folder all the time, and clients leave."""
    chats = demo_chats(tmp_path)
    chats += shuffled(chats)
    limits = ("--host-bytes", "4MB", "--cache-bytes", "40MB", "--num-gpu-blocks-override", "512")
    server = start_server(tmp_path, tmp_path / "cache", "--max-model-len", "512", *limits)
    record = Record()
    try:
        begun = time.monotonic()
        with sample_usage(server, begun) as samples:
            run_clients(server, chats, record, SECONDS)
        idle = wait_until_idle(server)
        folder_mb = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.safetensors")) / 1e6
        failures = server.metric("blockft_failures_total{")
        missing = server.metric('blockft_failures_total{reason="missing"}')
    finally:
        code = server.stop()
    warm = [sample for sample in samples if sample["seconds"] > WARM_SHARE * SECONDS]
    grown = {name: growth(warm, name) for name in MAX_GROWTH}
    figures = {
        "clients": NUM_CLIENTS,
        "seconds": SECONDS,
        "requests": dict(record.requests),
        "requests_per_s": sum(record.requests.values()) / SECONDS,
        "errors": record.errors[:100],
        "num_errors": len(record.errors),
        "sources": dict(record.sources),
        "failures_counted": {"all": failures, "missing": missing},
        "growth": grown,
        "idle": idle,
        "folder_mb": folder_mb,
        "exit_code": code,
        "samples": samples[:: len(samples) // NUM_SAMPLES + 1],
    }
    save(figures)
    assert not record.errors, Counter(record.errors).most_common(5)
    figures |= {"largest_logprob_difference": check_answers(record), "num_compared": len(record.answers)}
    save(figures)
    assert all(grown[name] <= limit for name, limit in MAX_GROWTH.items()), grown
    assert not idle["waiting"] and not idle["running"] and idle["pages_used"] == 0, idle
    assert folder_mb < 44 and code == 130
