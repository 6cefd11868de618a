"""Start vLLM's server with the connector and the front end."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from blockft.errors import UserError
from blockft.held_signals import hold_signals
from blockft.serving.served_model import ServedModel

SERVER = "vllm.entrypoints.openai.api_server"

STOP_TIMEOUT_S = 60
"""How long the server may take to end after SIGTERM."""

RESERVED_OPTIONS = {
    **dict.fromkeys(("--model", "--tokenizer"), "the model is the first argument of blockft serve"),
    **dict.fromkeys(
        ("--revision", "--tokenizer-revision", "--hf-config-path", "--hf-overrides", "--tokenizer-mode"),
        "the server answers with the model whose blocks are in the cache",
    ),
    **dict.fromkeys(("--quantization", "-q", "--load-format"), "the cached blocks are not quantised"),
    **dict.fromkeys(
        ("--kv-cache-dtype", "--calculate-kv-scales"), "pages have the type of the cached blocks (--dtype)"
    ),
    **dict.fromkeys(
        ("--kv-transfer-config", "--kv-offloading-size", "--kv-offloading-backend"),
        "blockft serve sets the connector",
    ),
    "--disable-sliding-window": "the cached blocks have the windows of the model",
    **dict.fromkeys(
        ("--enable-lora", "--lora-modules"),
        "blocks of an adapter are not cached: merge the adapter with blockft export",
    ),
    **dict.fromkeys(
        ("--speculative-config", "-sc", "--spec-method", "--spec-model"), "a draft model would have no blocks"
    ),
    **dict.fromkeys(
        ("--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp")
        + ("--decode-context-parallel-size", "-dcp", "--prefill-context-parallel-size", "-pcp"),
        "workers share a model by its heads alone (--tensor-parallel-size): start several servers",
    ),
    **dict.fromkeys(("--api-server-count", "-asc", "--headless", "--grpc"), "one HTTP server is supported"),
    "--trust-remote-code": "blockft never runs code of a model folder",
}
"""Options of vLLM that are refused, and why."""


def check_options(options: Sequence[str]) -> None:
    """Check options for vLLM.

    Raises:
        UserError: an option is reserved.
    """
    for option in options:
        # vLLM reads _ as -, and --name.key as a part of the option's JSON
        name = option.split("=")[0].split(".")[0].replace("_", "-")
        if reserved := _reserved_option(name):
            raise UserError(f"{option.split('=')[0]} is not allowed: {RESERVED_OPTIONS[reserved]}")


def _reserved_option(name: str) -> str | None:
    """Return the reserved option that vLLM reads for a name, which may be the start of an option's name."""
    if name in RESERVED_OPTIONS:
        return name
    if not re.fullmatch("--.+", name):
        return None
    return next((option for option in RESERVED_OPTIONS if option.startswith(name)), None)


def server_command(served: ServedModel, file: Path, options: Sequence[str]) -> list[str]:
    """Return the command of the server. `file` is the file of the served model."""
    transfer = {
        "kv_connector": "BlockConnector",
        "kv_connector_module_path": "blockft.serving.vllm_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"served_model": str(file)},
    }
    return [
        *(sys.executable, "-m", SERVER, "--model", served.path, "--dtype", served.shape.dtype),
        *("--kv-transfer-config", json.dumps(transfer)),
        *("--middleware", "blockft.serving.front_end.BlockFrontEnd"),
        *options,
    ]


def run_server(served: ServedModel, folder: Path, options: Sequence[str]) -> int:
    """Run the server until it ends, and return its exit code. An interruption is passed on to it.

    folder: a private folder that exists as long as the server.
    """
    file = folder / "served_model.json"
    served.save(file)
    environment = os.environ | {"BLOCKFT_SERVED_MODEL": str(file)}
    process: subprocess.Popen[bytes] | None = None
    try:
        with hold_signals():
            process = subprocess.Popen(server_command(served, file, options), env=environment)
        code = process.wait()
    except BaseException:  # an interruption may come as another error
        if process is not None:
            _stop(process)
        raise
    # a process that a signal ended has a negative code
    return code if code >= 0 else 128 - code


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server. Its processes are killed if it does not end, or if a signal interrupts the wait.

    vLLM may ignore SIGTERM while it starts.
    """
    process.send_signal(signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    finally:
        if process.poll() is None:
            # the engine and its workers would go on without the server, with the memory of the GPU
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()
