"""Set up one rank of a distributed run, check that ranks agree, and shut it down."""

import atexit
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from blockft.errors import UserError, is_first_of_host
from blockft.outputs import SharedWriteError, is_disk_full, temporary_path
from blockft.training.compiler_lock import watch_compiler_locks
from blockft.training.core_share import find_usable_cores, share_threads
from blockft.training.library_internals import (
    compile_cpu_operator,
    forget_process_groups,
    unlink_shared_memory,
)
from blockft.training.library_warnings import library_output_on_stderr
from blockft.training.rank_watch import RankWatch
from blockft.training.worker_environment import (
    RANK_VARIABLES,
    check_worker_environment,
    is_worker,
    read_num_local,
    read_timeout_minutes,
)
from blockft.units import format_count

COLLECTIVE_TIMEOUT_MINUTES = 60
"""Least time that a rank waits for the others in a collective. A rank that has ended is found at once, so
this bounds only ranks that live and wait for each other forever."""

GROUP_TIMEOUT_S = 50
"""Time in which ranks that all run must connect to each other. A thousand ranks have a minute more."""


def use_cpu() -> bool:
    """Return whether training runs on the CPU."""
    return not torch.cuda.is_available()


@contextmanager
def worker_environment() -> Iterator[None]:
    """Hold the environment variables of a worker, see `set_worker_environment`.

    A process without a launcher leaves its group at the end, also after an error, and loses the variables.
    Otherwise the processes that it starts later would be ranks of this run.

    Raises:
        UserError: see `check_worker_environment`.
    """
    has_launcher = is_worker()
    own = [name for name in ("LOCAL_SIZE", "OMP_NUM_THREADS") if not os.environ.get(name)]
    set_worker_environment()
    try:
        yield
    finally:
        if not has_launcher:
            if dist.is_initialized():
                _destroy_process_group()
                forget_process_groups()
            for name in (*RANK_VARIABLES, *own):
                os.environ.pop(name, None)


def set_worker_environment() -> None:
    """Set the environment variables of a worker; without a launcher the process is the only rank.

    Call it before the first import of deepspeed. DeepSpeed would look for MPI if the variables were missing.

    Raises:
        UserError: see `check_worker_environment`.
    """
    check_worker_environment()
    # the ninja beside this Python comes first, which is seldom on PATH over ssh: another version of ninja
    # would compile DeepSpeed's operators again
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not is_worker():
        single_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(single_rank, MASTER_PORT=str(find_free_port()))
    if use_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def find_free_port() -> int:
    """Return a TCP port of this machine that no process uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def init_distributed(watch: RankWatch | None = None) -> None:
    """Join the other ranks of the run, which must all call it within DEEPSPEED_TIMEOUT minutes (default 10).

    The ranks of a host then divide its cores, see `core_share`.

    Raises:
        UserError: this host has no GPU for this rank, or the ranks cannot connect.
    """
    if not use_cpu():
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(
                f"LOCAL_RANK is {local_rank}, but this process sees {format_count(num_gpus, 'GPU')}: start "
                "one process per GPU on every host, and let each process see all GPUs of its host"
            )
        torch.cuda.set_device(local_rank)  # otherwise NCCL puts every rank on the first GPU
        torch.cuda.init()
    import deepspeed

    watch_compiler_locks()
    # DeepSpeed prints on stdout that it compiled an operator
    with library_output_on_stderr():
        compile_cpu_operator()
    if watch:
        watch.wait_until_ready()
        watch.leave_port(to_store=True)
    backend = "gloo" if use_cpu() else "nccl"
    timeout = timedelta(minutes=max(COLLECTIVE_TIMEOUT_MINUTES, read_timeout_minutes()))
    with _time_limit(watch), library_output_on_stderr():
        if int(os.environ["WORLD_SIZE"]) == 1 and not dist.is_initialized():
            # a rank alone needs no port, which another program could have taken since it was chosen
            store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but missing in __all__
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
        if use_cpu():
            atexit.register(_destroy_process_group)
            # DeepSpeed would run numactl for every reduced gradient, to count the nodes of memory. If it were
            # set earlier, a rank alone would open shared memory.
            os.environ.setdefault("LOCAL_SIZE", str(read_num_local()))
        # NCCL would guess the device of a rank alone, and print a warning that it has guessed
        devices = None if use_cpu() else [torch.cuda.current_device()]
        dist.barrier(device_ids=devices)  # from here on every rank has opened the shared memory of the others
    if use_cpu():
        unlink_shared_memory()
    _share_cores()


def _share_cores() -> None:
    """Set the number of threads of this rank, unless OMP_NUM_THREADS does. All ranks call it.

    Otherwise every rank would compute on the CPU with as many threads as there are cores.
    """
    own = find_usable_cores()
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    if os.environ.get("OMP_NUM_THREADS"):
        return
    num_threads = share_threads(own, ranks, torch.get_num_threads())
    torch.set_num_threads(num_threads)
    # for DeepSpeed's optimizers on the CPU, and so that accelerate does not choose another number
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


def _time_limit(watch: RankWatch | None) -> AbstractContextManager[None]:
    """Return a context in which ranks that are all ready must connect to each other."""
    if watch is None:
        return nullcontext()
    seconds = GROUP_TIMEOUT_S + 60 * int(os.environ["WORLD_SIZE"]) // 1000
    variable = "GLOO_SOCKET_IFNAME" if use_cpu() else "NCCL_SOCKET_IFNAME"
    return watch.time_limit(
        seconds,
        f"all ranks run, but they could not connect to each other within {seconds} s: name the network "
        f"interface between the hosts with {variable}, and open all ports between the hosts (blockft doctor "
        "--hostfile FILE shows the interfaces)",
    )


def run_on_each_host(check: Callable[[], None]) -> None:
    """Call `check` on the first rank of every host. All ranks call this function and wait for the result.

    Raises:
        UserError: on every rank, if `check` raised one on any host.
    """
    error = None
    if is_first_of_host():
        try:
            check()
        except UserError as raised:
            error = str(raised)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for message in errors:
        if message:
            raise UserError(message)


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise an error of one rank on all ranks, which then have all stopped what they do inside.

    All ranks enter and leave it. The ranks must not wait for each other inside.

    Raises:
        SharedWriteError: on every rank, if one of them cannot write.
        UserError: on every rank, if one of them raised one.
        DistError: on the other ranks, if one of them raised another error.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, own and _shared_error(own))
    first = next((error for error in errors if error), None)
    if own and not isinstance(_shared_error(own), Exception):
        raise own
    if isinstance(first, Exception):
        raise first from own
    if first:
        raise dist.DistError(first)


def _shared_error(error: Exception) -> UserError | SharedWriteError | str:
    """Return what the other ranks learn of an error; only an expected one is raised there as well."""
    if is_disk_full(error):
        return SharedWriteError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if isinstance(error, OSError):
        return SharedWriteError(error.errno, error.strerror, error.filename)
    return UserError(str(error)) if isinstance(error, UserError) else "another rank has failed"


def check_ranks(run: Path, run_signature: dict[str, Any]) -> None:
    """Check that all ranks start the same run in the same folder. All ranks call it.

    Raises:
        UserError: on every rank, if the signatures differ or a rank does not see the files of rank 0.
    """
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    signatures: list[Any] = [None] * num_processes
    dist.all_gather_object(signatures, run_signature)
    for name, expected in signatures[0].items():
        if different := [i for i in range(num_processes) if signatures[i].get(name) != expected]:
            raise UserError(
                f"rank {different[0]} and rank 0 differ in {name}: every host must start the same command "
                "in a directory with the same files"
            )
    chosen = [temporary_path(run).name]
    dist.broadcast_object_list(chosen)
    shared_file = run.with_name(chosen[0])
    write_error = [""]
    if rank == 0:
        try:
            run.parent.mkdir(parents=True, exist_ok=True)
            shared_file.touch()
        except OSError as error:
            write_error = [f"train.output_dir {run} cannot be written: {error.strerror}"]
    dist.broadcast_object_list(write_error)
    if write_error[0]:
        raise UserError(write_error[0])
    is_visible: list[Any] = [None] * num_processes
    dist.all_gather_object(is_visible, shared_file.exists())
    if rank == 0:
        shared_file.unlink()
    if missing := [i for i in range(num_processes) if not is_visible[i]]:
        raise UserError(
            f"rank {missing[0]} does not see the files that rank 0 writes beside {run}: put train.output_dir "
            "on a file system that all hosts share, because each rank writes its part of every checkpoint"
        )


def shutdown_distributed() -> None:
    """Wait for all ranks and leave the process group. All ranks call it when their work is done.

    Without the wait a launcher would end a host's other ranks, which may still be writing, when one rank ends
    with an exit code other than 0.
    """
    dist.barrier()
    _destroy_process_group()
    forget_process_groups()


def _destroy_process_group() -> None:
    """Leave the process group before Python shuts down, because Gloo's threads would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
