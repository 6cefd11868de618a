"""`blockft bench serve`: start the servers that are compared, or ask servers that run already."""

import contextlib
import math
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from blockft.bench import serve as serve_benchmark
from blockft.bench.benchmark_model import is_shape, load_benchmark_model
from blockft.bench.serve import ServePlan, Server
from blockft.bench.serve_client import ServerKind, Target
from blockft.bench.serve_report import ServeReport
from blockft.bench.serve_workload import Workload, WorkloadOptions
from blockft.bench.server_process import ServerCommand, ServerProcess
from blockft.bench.synthetic_source import save_tokenizer, write_source
from blockft.bench.time_limit import TimeLimit
from blockft.config.bounds import MAX_RATE
from blockft.errors import UserError, notify
from blockft.inputs import shorten, text_problem
from blockft.model.load import load_config, load_tokenizer
from blockft.model.random_model import SHAPES, load_shape_config
from blockft.outputs import atomic_folder, check_writable, lock_output_folder
from blockft.serving.launch import SERVER, check_options
from blockft.units import parse_bytes

HOST = "127.0.0.1"

PAGE_BYTES = "--kv-cache-memory-bytes"
"""vLLM's option for the memory of its pages."""

MEMORY_SHARE = "--gpu-memory-utilization"
"""vLLM's option for the share of the GPU memory that must be free at the start of a server."""

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
    together     whether both servers run at once; None if the options set the memory of pages in bytes
    model_folder where the random weights of a shape are kept, or are already
    log_folder   where the logs of the servers are kept
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
    together: bool | None
    model_folder: Path | None
    log_folder: Path | None

    @property
    def has_page_bytes(self) -> bool:
        """Whether the options set the memory of vLLM's pages in bytes, so that it is not what is free."""
        return self.names(PAGE_BYTES)

    def names(self, name: str) -> bool:
        """Return whether the options have one with this name."""
        return any(option.split("=")[0].replace("_", "-") == name for option in self.options)

    @property
    def are_together(self) -> bool:
        """Whether both servers run at once."""
        return not self.urls and (self.has_page_bytes if self.together is None else self.together)

    @property
    def own_options(self) -> list[str]:
        """The names of given options that need a server that the benchmark starts."""
        given = {
            "--servers-together": self.together,
            "--servers-in-turn": self.together is False,
            "--model-folder": self.model_folder,
            "--log-folder": self.log_folder,
        }
        return [name for name, value in given.items() if value]

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
    limit: TimeLimit,
    out: Path | None,
    png: Path | None,
) -> None:
    """Compare vLLM with cached blocks with vLLM alone, one server after the other.

    Raises:
        UserError: an argument contradicts another one; a model, a server or a file cannot be used.
    """
    _check(model_or_shape, workload, plan, servers)
    for file in (out, png):
        if file:
            check_writable(file)
    dtype = _dtype_name(servers.dtype)
    with (
        tempfile.TemporaryDirectory(prefix="blockft-serve-", dir=servers.folder) as temporary,
        contextlib.ExitStack() as stack,
    ):
        with limit.interrupting("before a server is measured (random weights may be kept: --model-folder)"):
            path = _find_model(model_or_shape, servers.model_folder, Path(temporary))
            _check_positions(model_or_shape, path, workload)
            load_average = serve_benchmark.read_load()
            listed = _list_servers(path, workload.num_tokens, dtype, servers, Path(temporary))
            for server in listed:
                if server.process and servers.are_together:
                    notify(f"starting {server.name}")
                    server.process.begin()
                    stack.callback(server.process.stop, limit.end)
            drawn = Workload(load_tokenizer(path), workload)
        report = ServeReport(
            model_or_shape,
            [server.target.kind for server in listed],
            plan.parts,
            plan.ttft_limit_ms,
            record={
                **_describe(listed, servers, dtype),
                "method": " ".join(serve_benchmark.METHOD.split()),
                "workload": asdict(workload),
                "plan": asdict(plan),
                "limit_s": limit.limit_s,
                "load_average": load_average,
            },
            out=out,
        )
        serve_benchmark.bench_serve(
            drawn, plan, listed, report, limit=limit, start_timeout_s=servers.start_timeout_s, png=png
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


def _check(model_or_shape: str, workload: WorkloadOptions, plan: ServePlan, servers: ServerArguments) -> None:
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
    if servers.urls and (options := [*servers.sizes, *servers.own_options, *servers.options]):
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
    for name, folder in (("--folder", servers.folder), ("--log-folder", servers.log_folder)):
        if folder and not folder.is_dir():
            raise UserError(f"{name} {folder} is not a folder")
    if servers.model_folder and not is_shape(model_or_shape):
        raise UserError(
            f"--model-folder is for the random weights of a shape, but {shorten(model_or_shape)} is a model: "
            "leave it out"
        )
    if servers.are_together and torch.cuda.is_available() and not servers.has_page_bytes:
        raise UserError(
            f"--servers-together needs {PAGE_BYTES} on a GPU, or each server would take the memory of the "
            "other one: add it, or give --servers-in-turn"
        )
    if servers.api_key_env and servers.api_key_env not in os.environ:
        raise UserError(f"--api-key-env names {shorten(servers.api_key_env)!r}, which is not set")


def _list_servers(
    path: str, num_tokens: int, dtype: str, servers: ServerArguments, folder: Path
) -> list[Server]:
    """Return the servers that are measured: those that run already, or both, which are not begun."""
    if servers.urls:
        key = os.environ[servers.api_key_env] if servers.api_key_env else "none"
        return [Server(target=Target(kind=kind, url=url, api_key=key)) for kind, url in servers.urls.items()]
    logs = servers.log_folder or folder
    kinds: tuple[ServerKind, ...] = ("plain", "blocks")
    listed = []
    for kind in kinds:
        command = _command(kind, path, num_tokens, dtype, servers, folder / "cache")
        process = ServerProcess(command, logs / f"{kind}.log")
        listed.append(Server(target=Target(kind=kind, url=f"{command.url}/v1"), process=process))
    return listed


def _describe(listed: Sequence[Server], servers: ServerArguments, dtype: str) -> dict[str, Any]:
    """Return entries of the JSON that say how the servers were started; none for running servers."""
    commands = {
        server.target.kind: shlex.join(server.process.command.words) for server in listed if server.process
    }
    if not commands:
        return {}
    return {
        "dtype": dtype,
        "sizes": servers.sizes,
        "vllm_options": [*servers.options],
        "commands": commands,
        "servers_run_together": servers.are_together,
    }


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
    if servers.are_together and servers.has_page_bytes and not servers.names(MEMORY_SHARE):
        # the share has no effect on the memory of the pages, but the other server may have its memory already
        words += [MEMORY_SHARE, "0.1"]
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


def _find_model(model_or_shape: str, folder: Path | None, temporary: Path) -> str:
    """Return the folder or the Hub id of a model; the random weights of a shape are written first.

    Raises:
        UserError: the model folder holds another model than the shape.
    """
    if not is_shape(model_or_shape):
        return model_or_shape
    expected = load_shape_config(model_or_shape).to_dict()
    if folder is None:
        folder = temporary / "model"
        _save_random_model(model_or_shape, folder)
    elif not folder.exists():
        with (
            lock_output_folder(folder, "blockft bench serve") as locked,
            atomic_folder(locked) as unfinished,
        ):
            _save_random_model(model_or_shape, unfinished)
    else:
        found = load_config(str(folder)).to_dict()
        for name in SHAPES[model_or_shape]:
            if found.get(name) != expected[name]:
                raise UserError(
                    f"--model-folder {folder} has {name} {found.get(name)}, the shape {model_or_shape} has "
                    f"{expected[name]}: name another folder"
                )
    return str(folder)


def _check_positions(model_or_shape: str, path: str, workload: WorkloadOptions) -> None:
    num_positions = load_config(path).max_position_embeddings
    if workload.num_tokens + SPARE_TOKENS > num_positions:
        raise UserError(
            f"a prompt and its answer have {workload.num_tokens} tokens, {model_or_shape} has "
            f"{num_positions} positions: use fewer or shorter documents"
        )


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
