"""Start real servers of `blockft serve`, and compare their answers with the masked forward pass."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from blockft.attention.layout import Layout
from blockft.inference.engine import Engine
from blockft.model.load import load_model
from blockft.model.masked_forward import masked_logits
from blockft.serving.missing_blocks import KNOWN_S
from tests.commands import ROOT, free_port
from tests.serving.vllm_environment import vllm_python

needs_vllm = [pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]
"""Marks of tests that start a real server."""

MODEL = ROOT / "data/demo/model"
NUM_QUESTIONS = 60
NUM_NEW = 4
START_TIMEOUT_S = 600
TOLERANCE = 1e-4
"""Of log probabilities. Block mode and full mode differ by far more on many questions."""

Chat = list[dict[str, Any]]


@dataclass
class Server:
    """A running server and its client."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=300, max_retries=0
        )

    def ask(self, chat: Chat, mode: str = "block", num_new: int = NUM_NEW, **options: Any) -> Any:
        """Return a completion with the ids and log probabilities of its tokens."""
        extra = {"messages": chat, "mode": mode, "return_token_ids": True} | options
        return self.client.completions.create(
            model="", prompt="", max_tokens=num_new, temperature=0, logprobs=0, extra_body=extra
        )

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


def start_server(folder: Path, cache: Path, *options: str, model: Path = MODEL) -> Server:
    """Start a server whose pages hold 32 tokens, and wait until it answers."""
    port, log = free_port(), folder / "server.log"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    command = [
        vllm_python(),
        "-m",
        "blockft",
        "serve",
        str(model),
        "--cache",
        str(cache),
        "--port",
        str(port),
    ]
    command += ["--block-size", "32", *options]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return Server(port, process, log)
        except OSError:
            time.sleep(1)
    process.kill()
    raise AssertionError(log.read_text()[-4000:])


def demo_chats(folder: Path) -> list[Chat]:
    """Return questions over documents of the demo, which share some documents."""
    world = [sys.executable, str(ROOT / "data/demo/world.py"), str(folder / "world"), "--scenes", "40"]
    subprocess.run(world, check=True, cwd=ROOT)
    lines = (folder / "world/heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines[:NUM_QUESTIONS]]


def shuffled(chats: Sequence[Chat]) -> list[Chat]:
    """Return the chats with their documents in another order."""
    result = []
    for seed, ((message,)) in enumerate(chats):
        instruction, *documents, question = message["content"]
        random.Random(seed).shuffle(documents)
        result.append([message | {"content": [instruction, *documents, question]}])
    return result


@cache
def reference_models(path: Path) -> tuple[Engine, Any]:
    model = load_model(str(path), backend="sdpa", dtype=torch.float32)
    return Engine.load(path, device="cpu"), model


@torch.inference_mode()
def reference(
    chat: Chat, mode: str = "block", *, min_new: int = 1, num_new: int = NUM_NEW, path: Path = MODEL
) -> tuple[list[int], list[float]]:
    """Return the greedy answer of the masked forward pass, and the log probabilities of its tokens.

    The answer does not end before it has `min_new` tokens.
    """
    engine, model = reference_models(path)
    blocks = [[*block] for block in engine.encode(engine.parse_request({"messages": chat}), num_new)]
    if mode == "full":
        blocks = [[*itertools.chain.from_iterable(blocks)]]
    ids: list[int] = []
    logprobs: list[float] = []
    while len(ids) < num_new and not (ids and ids[-1] in engine.eos_token_ids):
        prompt = [*itertools.chain.from_iterable(blocks)]
        logits = masked_logits(model, prompt, [Layout(tuple(map(len, blocks)))], 1)[-1]
        allowed = logits.clone()
        if len(ids) < min_new:
            allowed[[*engine.eos_token_ids]] = -torch.inf
        ids.append(int(allowed.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
        blocks[-1].append(ids[-1])
    return ids, logprobs


def check(
    server: Server,
    asked: Sequence[tuple[Chat, str]],
    *,
    num_clients: int = 8,
    min_new: int = 1,
    num_new: int = NUM_NEW,
    path: Path = MODEL,
) -> Counter[str]:
    """Compare the answers of a server with the reference. Return the sources of all blocks."""
    with ThreadPoolExecutor(num_clients) as clients:
        ask = partial(server.ask, num_new=num_new, min_tokens=min_new)
        answers = list(clients.map(lambda one: ask(*one), asked))
    sources = Counter[str]()
    for (chat, mode), answer in zip(asked, answers, strict=True):
        ids, logprobs = reference(chat, mode, min_new=min_new, num_new=num_new, path=path)
        (choice,) = answer.choices
        assert choice.token_ids == ids
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=TOLERANCE)
        assert answer.usage.block_attention["mode"] == mode
        sources.update(answer.usage.block_attention["sources"])
    return sources


def forget_memory() -> None:
    """Wait until the front end looks for the latest blocks in the folder."""
    time.sleep(KNOWN_S + 0.5)


def in_mode(mode: str, chats: Sequence[Chat]) -> list[tuple[Chat, str]]:
    return [(chat, mode) for chat in chats]
