"""Becoming a worker of a distributed run, and starting the workers with the `deepspeed` launcher."""

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psutil
import torch
import torch.distributed as dist

from blockft.errors import UserError
from blockft.training.hosts import (
    PDSH_FAILURE,
    Hosts,
    check_hosts_reachable,
    pdsh_environment,
    quote_for_remote_shell,
    signal_hosts,
)

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux lists it."""


def is_worker() -> bool:
    """Whether a launcher (deepspeed, torchrun, srun with its variables exported) started this process."""
    return "RANK" in os.environ


def use_cpu() -> bool:
    """Whether training runs on the CPU; DeepSpeed must know before it is imported."""
    return not torch.cuda.is_available()


def set_worker_environment() -> None:
    """Make this process a worker: alone, unless a launcher has said otherwise.

    DeepSpeed would look for MPI if the variables were missing.
    """
    if use_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed builds with the ninja that was installed beside it, which over ssh is seldom on PATH
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    if not is_worker():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))


def init_distributed() -> None:
    """Wait for all ranks of the run, DEEPSPEED_TIMEOUT minutes at most (10 unless set).

    Raises:
        UserError: this host has no GPU for this rank; they did not come together.
    """
    if not use_cpu():
        local_rank, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= found:
            raise UserError(
                f"LOCAL_RANK is {local_rank}, and this process sees {_count(found)}: start one process per "
                "GPU on every host, and let each see all GPUs of its host"
            )
        torch.cuda.set_device(local_rank)  # NCCL would put every rank on the first
    import deepspeed

    try:
        deepspeed.init_distributed(dist_backend="gloo" if use_cpu() else "nccl", verbose=False)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "connectFullMesh" in str(error)):
            raise
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the run's processes did not meet at {address} ({str(error).splitlines()[0]}): see that every "
            "host has started and can reach this one, and name the network interface that joins them "
            "(GLOO_SOCKET_IFNAME on CPU, NCCL_SOCKET_IFNAME on GPU)"
        ) from error
    if use_cpu():
        atexit.register(_destroy_process_group)
        dist.barrier()  # now every rank has opened every other's
        for buffer in SHARED_MEMORY.glob(_buffer_pattern()):
            buffer.unlink(missing_ok=True)


def _count(num_gpus: int) -> str:
    return f"{num_gpus} GPU" + ("s" if num_gpus != 1 else "")


def check_gpus(num_gpus: int) -> None:
    """Make sure that this machine has so many GPUs; where it has none, processes run on CPUs.

    Raises:
        UserError: it has some, but fewer.
    """
    if not use_cpu() and num_gpus > (found := torch.cuda.device_count()):
        raise UserError(
            f"--num-gpus is {num_gpus}, and this process sees {_count(found)}: ask for {found} or fewer (see "
            "CUDA_VISIBLE_DEVICES), or give more machines with --hostfile"
        )


def _buffer_pattern() -> str:
    """What DeepSpeed calls this rank's shared memory. With its name gone, it goes with the processes that use
    it, however they end; DeepSpeed itself never removes it."""
    address = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    return f"deepspeed_allreduce_buffer_*_{address}"


def check_ranks(run: Path, facts: dict[str, Any]) -> None:
    """Make sure that all ranks are about to do the same run, in the same folder. All of them call it.

    Raises:
        UserError: on every rank alike: they hold different facts, or do not see what rank 0 writes.
    """
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    said: list[Any] = [None] * num_processes
    dist.all_gather_object(said, facts)
    for name, mine in said[0].items():
        if others := [i for i in range(num_processes) if said[i].get(name) != mine]:
            raise UserError(
                f"rank {others[0]} has another {name} than rank 0: every host must start the same command in "
                "a directory with the same files"
            )
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    sign = run.parent / f".{run.name}.{token[0]}"
    fault = [""]
    if rank == 0:
        try:
            run.parent.mkdir(parents=True, exist_ok=True)
            sign.touch()
        except OSError as error:
            fault = [f"train.output_dir {run} cannot be written: {error.strerror}"]
    dist.broadcast_object_list(fault)
    if fault[0]:
        raise UserError(fault[0])
    dist.all_gather_object(said, sign.exists())
    if rank == 0:
        sign.unlink()
    if blind := [i for i in range(num_processes) if not said[i]]:
        raise UserError(
            f"rank {blind[0]} does not see what rank 0 writes beside {run}: put train.output_dir on a file "
            "system that all hosts share, for each rank writes its part of every checkpoint"
        )


def shutdown_distributed() -> None:
    """Wait for all ranks and leave their group: the end of a worker that did its work. All of them call it.

    A launcher ends a host's other ranks when one ends with a code, even if they are still writing.
    """
    dist.barrier()
    _destroy_process_group()


def _destroy_process_group() -> None:
    """Gloo's threads let go of Python objects; if they do so while Python shuts down, the process aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_workers(words: Sequence[str], *, num_gpus: int, hosts: Hosts | None) -> int:
    """Run `blockft WORDS` on several processes, of this machine or of hosts; the launcher's exit code.

    SIGINT and SIGTERM reach every rank that was started from here once, and all save before they stop; then
    the code is 130. Asked a second time, they end at once. A host that fails ends the others.

    Raises:
        UserError: a host cannot be reached.
    """
    over_ssh = hosts is not None and hosts.node_rank is None
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    if hosts is None:
        command += ["--num_gpus", str(num_gpus), "--master_port", str(_free_port())]
    else:
        command += ["--hostfile", str(hosts.file)]
        command += ["--master_addr", hosts.master_addr, "--master_port", str(hosts.master_port)]
        # --force_multi: DeepSpeed would run a file of one host here, wherever that is
        command += ["--no_ssh_check", "--force_multi"]
    if hosts is not None and hosts.node_rank is not None:
        command += ["--no_ssh", "--node_rank", str(hosts.node_rank)]
    environment = dict(os.environ)
    if hosts is not None and over_ssh:
        check_hosts_reachable(hosts)
        environment = pdsh_environment(hosts)
        words = [quote_for_remote_shell(word) for word in words]
    if use_cpu():
        environment["DS_ACCELERATOR"] = "cpu"
    # in a session of its own, or Ctrl-C would reach the workers a second time, which ends them at once
    launcher = subprocess.Popen(
        [*command, "--module", "blockft", *words],
        env=environment,
        stderr=subprocess.PIPE if over_ssh else None,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    asked: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        asked.append(number)
        if not (children := psutil.Process(launcher.pid).children()):
            launcher.terminate()
        elif hosts is not None and over_ssh:
            signal_hosts(hosts, gently=len(asked) == 1)
        else:
            # the node's launcher would kill ranks that need more than 30 seconds to save
            ranks = [rank for child in children for rank in child.children()] if len(asked) == 1 else []
            for process in ranks or children:
                process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    if hosts is not None and over_ssh:
        assert launcher.stderr is not None
        threading.Thread(target=_watch, args=(launcher.stderr, hosts, asked), daemon=True).start()
    code = launcher.wait()
    return 130 if asked else code


def _watch(lines: IO[str], hosts: Hosts, asked: list[int]) -> None:
    """Pass pdsh's complaints on; when a host has failed, end all: they would wait for it for minutes."""
    failed = False
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        if PDSH_FAILURE.match(line) and not asked and not failed:
            failed = True
            signal_hosts(hosts, gently=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
