"""`blockft bench serve`: start the servers that are compared, or ask servers that run already."""

import contextlib
import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from blockft.bench import serve as serve_benchmark
from blockft.bench.benchmark_model import is_shape, load_benchmark_model
from blockft.bench.serve import ServePlan
from blockft.bench.serve_client import ServerKind, Target
from blockft.bench.serve_workload import Workload, WorkloadOptions
from blockft.bench.server_process import ServerCommand, running_server
from blockft.bench.synthetic_source import save_tokenizer, write_source
from blockft.config.bounds import MAX_RATE
from blockft.errors import UserError, notify
from blockft.inputs import shorten, text_problem
from blockft.model.load import load_config, load_tokenizer
from blockft.model.random_model import load_shape_config
from blockft.outputs import check_writable
from blockft.serving.launch import SERVER, check_options
from blockft.units import parse_bytes

HOST = "127.0.0.1"

SPARE_TOKENS = 16
"""Tokens that a server takes beyond the longest prompt and its answer."""

NUM_RECORDS = 200
"""Records on which the tokenizer of a shape is trained."""

MIN_IDS = 300
"""Fewest token ids of a shape: the bytes, the markup and some words."""


@dataclass(frozen=True, kw_only=True)
class ServerArguments:
    """Which servers are measured.

    blocks_url   address of a running server of `blockft serve`, with /v1
    plain_url    address of a running server of vLLM alone; without any address both servers are started
    api_key_env  the environment variable with the key of running servers
    python       the Python of an environment with vLLM and blockft; None is this one
    folder       where the temporary folder for the cache and a random model is created
    dtype        type of the weights and of the blocks
    host_bytes   memory for blocks, and GPU memory for blocks (`device_bytes`), as sizes; None is the default
    options      of vLLM's server
    """

    blocks_url: str | None
    plain_url: str | None
    api_key_env: str | None
    python: Path | None
    folder: Path | None
    dtype: str
    start_timeout_s: float
    host_bytes: str | None
    device_bytes: str | None
    options: Sequence[str]

    @property
    def sizes(self) -> dict[str, str]:
        """The options of `blockft serve` that set the memory for blocks."""
        sizes = {"--host-bytes": self.host_bytes, "--device-bytes": self.device_bytes}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def urls(self) -> dict[ServerKind, str]:
        """The addresses of running servers."""
        urls: dict[ServerKind, str | None] = {"plain": self.plain_url, "blocks": self.blocks_url}
        return {kind: url for kind, url in urls.items() if url is not None}


def bench_serve(
    model_or_shape: str,
    *,
    workload: WorkloadOptions,
    plan: ServePlan,
    servers: ServerArguments,
    out: Path | None,
    png: Path | None,
) -> None:
    """Compare vLLM with cached blocks with vLLM alone, one server after the other.

    Raises:
        UserError: an argument contradicts another one; a model, a server or a file cannot be used.
    """
    _check(workload, plan, servers)
    for file in (out, png):
        if file:
            check_writable(file)
    with tempfile.TemporaryDirectory(prefix="blockft-serve-", dir=servers.folder) as temporary:
        folder = Path(temporary)
        dtype = _dtype_name(servers.dtype)
        path = model_or_shape
        if is_shape(model_or_shape):
            path = str(folder / "model")
            _save_random_model(model_or_shape, Path(path))
        num_positions = load_config(path).max_position_embeddings
        if workload.num_tokens + SPARE_TOKENS > num_positions:
            raise UserError(
                f"a prompt and its answer have {workload.num_tokens} tokens, {model_or_shape} has "
                f"{num_positions} positions: use fewer or shorter documents"
            )
        drawn = Workload(load_tokenizer(path), workload)
        if servers.urls:
            listed = _running(servers)
        else:
            listed = _started(path, workload.num_tokens, dtype, servers, folder)
        serve_benchmark.bench_serve(
            model_or_shape,
            drawn,
            plan,
            listed,
            record={"dtype": dtype, "sizes": servers.sizes, "vllm_options": [*servers.options]}
            if not servers.urls
            else {},
            out=out,
            png=png,
        )


def default_warmups(corpus_size: int, num_documents: int) -> int:
    """Return the number of warm-up requests that is the default: twice what covers the corpus."""
    return 2 * -(-corpus_size // num_documents)


def parse_rates(text: str) -> list[float]:
    """Return the rates of a comma-separated text; none if the text is empty.

    Raises:
        UserError: an entry is not a positive number.
    """
    rates = []
    for entry in text.split(",") if text else []:
        try:
            rate = float(entry)
        except ValueError:
            rate = 0.0
        if not 0 < rate <= MAX_RATE:
            raise UserError(
                f"--rates has {entry.strip()[:40]!r}: write numbers above 0, and at most {MAX_RATE:,g}, "
                "separated by commas"
            )
        rates.append(rate)
    return rates


def _check(workload: WorkloadOptions, plan: ServePlan, servers: ServerArguments) -> None:
    if workload.corpus_size < workload.num_documents:
        raise UserError(
            f"--corpus-size is {workload.corpus_size}, but a prompt has {workload.num_documents} different "
            "documents: set a larger corpus or fewer documents"
        )
    numbers = {
        "--zipf": workload.zipf,
        "--first-rate": plan.first_rate,
        "--seconds": plan.seconds,
        "--ttft-limit-ms": plan.ttft_limit_ms,
        "--timeout": plan.timeout_s,
        "--start-timeout": servers.start_timeout_s,
    }
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise UserError(f"{name} is {number}: write a number")
    slowest = min(plan.rates, default=plan.first_rate)
    if slowest * plan.seconds < 1:
        raise UserError(
            f"{slowest:g} requests a second give no request in {plan.seconds:g} s: set larger rates or "
            "--seconds"
        )
    for size in servers.sizes.values():
        parse_bytes(size)
    if servers.urls and (options := [*servers.sizes, *servers.options]):
        raise UserError(
            f"the option {options[0]} is for servers that the benchmark starts, but there are URLs: "
            "leave it out, or start the servers with it"
        )
    check_options(servers.options)
    for name, url in (("--blocks-url", servers.blocks_url), ("--plain-url", servers.plain_url)):
        if url is not None and (text_problem(url) or not url.startswith(("http://", "https://"))):
            raise UserError(f"{name} is {shorten(url)!r}, it should start with http:// or https://")
    if servers.python and not os.access(servers.python, os.X_OK):
        raise UserError(f"--python {servers.python} is no program: name the python of an environment")
    if servers.folder and not servers.folder.is_dir():
        raise UserError(f"--folder {servers.folder} is not a folder")
    if servers.api_key_env and servers.api_key_env not in os.environ:
        raise UserError(f"--api-key-env names {shorten(servers.api_key_env)!r}, which is not set")


def _running(servers: ServerArguments) -> list[serve_benchmark.Server]:
    key = os.environ[servers.api_key_env] if servers.api_key_env else "none"
    return [
        (Target(kind=kind, url=url, api_key=key), contextlib.nullcontext(0.0))
        for kind, url in servers.urls.items()
    ]


def _started(
    path: str, num_tokens: int, dtype: str, servers: ServerArguments, folder: Path
) -> list[serve_benchmark.Server]:
    """Return both servers, each of which is started when its turn comes."""
    listed: list[serve_benchmark.Server] = []
    kinds: tuple[ServerKind, ...] = ("plain", "blocks")
    for kind in kinds:
        command = _command(kind, path, num_tokens, dtype, servers, folder / "cache")
        running = _announced(kind, command, folder / f"{kind}.log", servers.start_timeout_s)
        listed.append((Target(kind=kind, url=f"{command.url}/v1"), running))
    return listed


@contextlib.contextmanager
def _announced(kind: ServerKind, command: ServerCommand, log: Path, timeout_s: float) -> Iterator[float]:
    name = serve_benchmark.LABELS[kind][0]
    notify(f"starting {name}")
    with running_server(command, log, timeout_s) as start_s:
        notify(f"{name} answers after {start_s:.0f} s")
        yield start_s


def _command(
    kind: ServerKind, path: str, num_tokens: int, dtype: str, servers: ServerArguments, cache: Path
) -> ServerCommand:
    port = _free_port()
    own = {
        "plain": [SERVER, "--model", path, "--enable-prompt-tokens-details"],
        "blocks": ["blockft", "serve", path, "--cache", str(cache), *chain(*servers.sizes.items())],
    }
    words = [
        str(servers.python or sys.executable),
        "-m",
        *own[kind],
        "--dtype",
        dtype,
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    words += ["--max-model-len", str(num_tokens + SPARE_TOKENS), "--enable-prefix-caching"]
    environment = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"} if Path(path).exists() else {}
    return ServerCommand(words=[*words, *servers.options], host=HOST, port=port, environment=environment)


def _free_port() -> int:
    """Return a port of this machine that no process listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def _dtype_name(dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"


def _save_random_model(shape: str, folder: Path) -> None:
    """Write random weights of a shape, and a tokenizer with as many ids as the shape has."""
    config = load_shape_config(shape)
    if config.vocab_size < MIN_IDS:
        raise UserError(f"the shape {shape} has {config.vocab_size} token ids, at least {MIN_IDS} are needed")
    notify(f"writing random weights of {shape}")
    model = load_benchmark_model(shape, config)
    model.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="blockft-source-") as temporary:
        source = Path(temporary) / "source.jsonl"
        write_source(source, NUM_RECORDS, 0)
        save_tokenizer(folder, source, num_ids=config.vocab_size)
