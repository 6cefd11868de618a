"""Becoming a worker of a distributed run, and starting the workers with the `deepspeed` launcher."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil
import torch


def is_worker() -> bool:
    """Whether a launcher (deepspeed, torchrun, srun with its variables exported) started this process."""
    return "RANK" in os.environ


def use_cpu() -> bool:
    """Whether training runs on the CPU; DeepSpeed must know before it is imported."""
    return not torch.cuda.is_available()


def prepare_worker() -> None:
    """Make this process a worker: alone, unless a launcher has said otherwise.

    DeepSpeed would look for MPI if the variables were missing.
    """
    if use_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not is_worker():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))


def start_workers(words: Sequence[str], num_gpus: int) -> int:
    """Run `blockft WORDS` on several processes of this machine; the launcher's exit code.

    SIGINT and SIGTERM reach every process once, and each saves before it stops; then the code is 130.
    """
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--no_local_rank",
        "--num_gpus",
        str(num_gpus),
    ]
    command += ["--master_port", str(_free_port()), "--module", "blockft", *words]
    environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if use_cpu() else {})
    # in a session of its own, or Ctrl-C would reach the workers a second time, which ends them at once
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    asked: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        asked.append(number)
        for child in psutil.Process(launcher.pid).children():
            child.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    code = launcher.wait()
    return 130 if asked else code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
