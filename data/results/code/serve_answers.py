"""Compare the answers of `blockft serve` with those of blockft's engine and of the masked forward pass.

usage: python data/results/code/serve_answers.py MODEL OUT.json [--prompts demo|readme] [--num-prompts N]
           [--max-new-tokens N] [--dtype TYPE] [--device NAME] [--timeout S] [options of vLLM]

Starts a server in an environment with vLLM and blockft, and asks greedy answers of block mode: with a cold cache,
with a warm one, with the documents in another order, and mixed with requests in full mode. The engine computes
the same answers in float32 first. The log probability of every token is compared with that of the masked forward
pass in float32. The prompts are questions of the demo, or questions over paragraphs of the project's README
files. Run it from the root of the project; further options, such as --enforce-eager, go to vLLM's server.
"""

import argparse
import contextlib
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from blockft.attention.layout import Layout
from blockft.bench.measurement import write_measurement
from blockft.bench.server_process import ServerCommand, ServerProcess, wait_for_servers
from blockft.inference.engine import Engine
from blockft.inference.runner import CacheOptions
from blockft.model.load import load_model
from blockft.model.masked_forward import masked_logits
from blockft.serving.supported_engine import check_version

NUM_CLIENTS = 8
NUM_DOCUMENTS = 8
PARAGRAPH_CHARS = (250, 900)
TOPICS = ("tests", "settings", "models", "folders", "blocks")
CHECKS = {  # the order of the documents, and the mode
    "cold": [("given", "block")],
    "warm": [("given", "block")],
    "shuffled": [("shuffled", "block")],
    "mixed with full mode": [("given", "block"), ("given", "full"), ("shuffled", "full")],
}

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Reference:
    """A prompt, the token ids of its blocks, and the ids of the engine's answer, without the token that ends it."""

    chat: Chat
    blocks: list[list[int]]
    mode: str
    ids: list[int]
    end_ids: frozenset[int]


def main() -> None:
    options, vllm_options = parse_arguments()
    model, device = str(options.model), options.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = demo_chats(folder) if options.prompts == "demo" else readme_chats(options.num_prompts)
        orders = {"given": chats[: options.num_prompts]}
        orders["shuffled"] = [*map(shuffle_documents, range(len(orders["given"])), orders["given"])]
        masked = load_model(model, backend="sdpa", dtype=torch.float32).to(device)
        asked = answer_by_engine(model, device, folder / "engine", orders, options.max_new_tokens)
        result = {
            "command": " ".join(["python", "data/results/code/serve_answers.py", *sys.argv[1:]]),
            "server": check_version(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "dtype": options.dtype,
            "equal answers of block and full mode": sum(
                a.ids == b.ids
                for a, b in zip(asked["given", "block"], asked["given", "full"], strict=True)
            ),
            "checks": [],
        }
        command = server_command(model, folder / "cache", options.dtype, vllm_options)
        with contextlib.ExitStack() as stack:
            server = ServerProcess(command, options.out.with_suffix(".log"))
            stack.callback(server.stop)
            server.begin()
            for _, error in wait_for_servers([server], options.timeout, math.inf):
                if error:
                    raise error
            for name, kinds in CHECKS.items():
                jobs = [reference for kind in kinds for reference in asked[kind]]
                random.Random(1).shuffle(jobs)
                figures = check_answers(command.url, masked, jobs, options.max_new_tokens)
                result["checks"].append({"check": name} | figures)
                print(json.dumps(result["checks"][-1]), flush=True)
                write_measurement(options.out, result)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", choices=("demo", "readme"), default="demo")
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="of the server")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--timeout", type=float, default=600, help="of the server's start, in seconds")
    return parser.parse_known_args()


def demo_chats(folder: Path) -> list[Chat]:
    """Return questions of the demo, which share some documents."""
    world = [sys.executable, "data/demo/world.py", str(folder / "world"), "--scenes", "40"]
    subprocess.run(world, check=True)
    lines = (folder / "world/heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def readme_chats(number: int) -> list[Chat]:
    """Return questions over paragraphs of the README files, which share paragraphs."""
    listed = subprocess.run(["git", "ls-files", "*README.md"], capture_output=True, text=True).stdout.split()
    files = map(Path, listed or sorted(map(str, Path().glob("*/**/README.md"))))
    shortest, longest = PARAGRAPH_CHARS
    paragraphs = [text.strip() for file in files for text in file.read_text(encoding="utf-8").split("\n\n")]
    texts = [f"{text}\n\n" for text in dict.fromkeys(paragraphs) if shortest < len(text) < longest][:40]
    rng = random.Random(0)
    return [
        [
            {
                "role": "user",
                "content": [
                    "Answer from the documents.\n\n",
                    *rng.sample(texts, NUM_DOCUMENTS),
                    f"Question {index}: what do the documents say about {rng.choice(TOPICS)}?",
                ],
            }
        ]
        for index in range(number)
    ]


def shuffle_documents(seed: int, chat: Chat) -> Chat:
    (message,) = chat
    instruction, *documents, question = message["content"]
    random.Random(seed).shuffle(documents)
    return [message | {"content": [instruction, *documents, question]}]


def answer_by_engine(
    model: str, device: str, folder: Path, orders: dict[str, list[Chat]], max_new_tokens: int
) -> dict[tuple[str, str], list[Reference]]:
    """Return the prompts with the engine's answers, by order of the documents and mode."""
    found = {}
    cache = CacheOptions(folder=folder)
    with Engine.load(model, device=device, dtype=torch.float32, rotate="keys", cache=cache) as engine:
        for order, chats in orders.items():
            requests = [{"messages": chat} for chat in chats]
            blocks = [
                [list(ids) for ids in engine.encode(engine.parse_request(request), max_new_tokens)]
                for request in requests
            ]
            for mode in ("block", "full"):
                answers = engine.generate_batch(
                    requests, max_new_tokens=max_new_tokens, mode=mode, temperature=0
                )
                found[order, mode] = [
                    Reference(chat, ids, mode, list(answer.ids), frozenset(engine.eos_token_ids))
                    for chat, ids, answer in zip(chats, blocks, answers, strict=True)
                ]
    return found


def server_command(model: str, cache: Path, dtype: str, options: Sequence[str]) -> ServerCommand:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "blockft", "serve", model, "--cache", str(cache), "--dtype", dtype]
    words += ["--host", "127.0.0.1", "--port", str(port), *options]
    # float32 products in float32, also in Triton's kernels
    precise = {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"} if dtype == "float32" else {}
    return ServerCommand(words=words, host="127.0.0.1", port=port, environment=precise)


def check_answers(url: str, masked: Any, jobs: Sequence[Reference], max_new_tokens: int) -> dict[str, Any]:
    """Ask all prompts, and compare the answers and their log probabilities."""
    begun = time.monotonic()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = [*pool.map(lambda job: ask(url, job, max_new_tokens), jobs)]
    seconds = time.monotonic() - begun
    num_equal, differences, first_differences, wrong = 0, [0.0], [0.0], []
    sources = Counter[str]()
    for answer, job in zip(answers, jobs, strict=True):
        (choice,) = answer["choices"]
        sources.update(answer["usage"]["block_attention"]["sources"])
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        expected = expected_logprobs(masked, job, ids)
        found = [abs(a - b) for a, b in zip(logprobs, expected, strict=True)]
        differences += found
        first_differences.append(found[0])
        if (ids[:-1] if ids[-1] in job.end_ids else ids) == job.ids:
            num_equal += 1
        else:
            wrong.append({"server": ids, "engine": job.ids})
    return {
        "equal": num_equal,
        "of": len(jobs),
        "worst_logprob": max(differences),
        "worst_first_logprob": max(first_differences),
        "sources": dict(sources),
        "seconds": seconds,
        "wrong": wrong[:3],
    }


def ask(url: str, job: Reference, max_new_tokens: int) -> Any:
    body = {
        "messages": job.chat,
        "mode": job.mode,
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "logprobs": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    # the server is on this machine: a proxy of the environment must not be asked
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as response:
        return json.load(response)


@torch.inference_mode()
def expected_logprobs(masked: Any, job: Reference, ids: list[int]) -> list[float]:
    """Return the log probabilities of an answer's tokens by the masked forward pass."""
    *context, final = job.blocks
    blocks = [*context, [*final, *ids]]
    if job.mode == "full":
        blocks = [list(chain.from_iterable(blocks))]
    layout = Layout(tuple(map(len, blocks)))
    logits = masked_logits(masked, list(chain.from_iterable(blocks)), [layout], len(ids) + 1)[:-1]
    return logits.float().log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].tolist()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
