"""An error of one rank is an error of all ranks that work together. A rank alone works without a port."""

import errno
import os
import socket
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from blockft.errors import RankError, UserError
from blockft.training import distributed
from blockft.training.distributed import errors_on_all_ranks
from tests.commands import fork_ranks

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
TORCH_FULL = RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 128 vs 22")
DENIED = OSError(errno.EACCES, "Permission denied", "a file")
MISTAKE = UserError("a mistake")
RANK_MISTAKE = RankError("a mistake")
FAULT = ZeroDivisionError("division by zero")


def fail_on(failing: dict[int, Exception]) -> None:
    """Raise errors on some ranks and print what each rank raises in the end."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    with errors_on_all_ranks():
        pass
    try:
        with errors_on_all_ranks():
            if rank in failing:
                raise failing[rank]
    except Exception as error:
        # one write, so that the lines of two ranks do not mix
        os.write(1, f"rank {rank}: {type(error).__name__} {error}\n".encode())
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ({1: FULL}, ["SharedWriteError [Errno 28] No space left on device"] * 2),
        ({0: TORCH_FULL}, ["SharedWriteError [Errno 28] No space left on device"] * 2),
        ({1: DENIED}, ["SharedWriteError [Errno 13] Permission denied: 'a file'"] * 2),
        ({0: MISTAKE}, ["UserError a mistake"] * 2),
        # every rank knows of it, so that one of a host prints it
        ({1: RANK_MISTAKE}, ["UserError a mistake"] * 2),
        ({0: MISTAKE, 1: FULL}, ["UserError a mistake"] * 2),
        # a lost connection, for which the watch over ranks names the failed one
        ({0: FAULT}, ["ZeroDivisionError division by zero", "DistError another rank has failed"]),
        ({1: FAULT}, ["DistError another rank has failed", "ZeroDivisionError division by zero"]),
    ],
)
def test_all_ranks_raise_the_error_of_one(failing: dict[int, Exception], expected: list[str]) -> None:
    ranks = fork_ranks(partial(fail_on, failing), num_ranks=2, GLOO_SOCKET_IFNAME="lo")
    done = ranks.wait()
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert lines == [f"rank {rank}: {text}" for rank, text in enumerate(expected)]


def join_alone(port: int) -> None:
    import deepspeed

    distributed.set_worker_environment()
    os.environ["MASTER_PORT"] = str(port)
    init = deepspeed.init_distributed

    def init_without_shared_memory(**options: Any) -> None:
        assert "LOCAL_SIZE" not in os.environ, "DeepSpeed would open shared memory for this rank"
        init(**options)

    with patch.object(deepspeed, "init_distributed", init_without_shared_memory):
        distributed.init_distributed()
    assert os.environ["LOCAL_SIZE"] == "1", "DeepSpeed would start a program for every reduced gradient"
    group = dist.new_group([0])  # as DeepSpeed makes further groups
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    os.write(1, f"{dist.get_world_size()} rank, sum {total.item()}\n".encode())


def test_a_rank_alone_needs_no_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = fork_ranks(partial(join_alone, server.getsockname()[1])).wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 rank, sum 1.0\n"


def start_with_affinity(affinities: list[set[int]], threads: str | None) -> None:
    """Join the other ranks as a process that is bound to cores of a larger host, and print its threads."""
    rank = int(os.environ["RANK"]) if distributed.is_worker() else 0
    os.environ.pop("OMP_NUM_THREADS")
    if threads:
        os.environ["OMP_NUM_THREADS"] = threads
    torch.set_num_threads(len(affinities[rank]))  # as OpenMP counts them
    with patch.object(os, "sched_getaffinity", lambda _: affinities[rank]), distributed.worker_environment():
        distributed.init_distributed()
        line = f"rank {rank}: {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}\n"
        os.write(1, line.encode())
        distributed.shutdown_distributed()


ALL = set(range(8))


@pytest.mark.parametrize(
    ("affinities", "expected"),
    [
        ([ALL], [8]),
        ([ALL, ALL], [4, 4]),
        ([ALL, ALL, ALL], [2, 2, 2]),
        # srun --cpus-per-task=4, or numactl for each rank
        ([{0, 1, 2, 3}, {4, 5, 6, 7}], [4, 4]),
        # two ranks on each socket
        ([{0, 1, 2, 3}, {4, 5, 6, 7}, {0, 1, 2, 3}, {4, 5, 6, 7}], [2, 2, 2, 2]),
        # a container, or a task of SLURM with all ranks
        ([{2, 3, 4, 5}, {2, 3, 4, 5}], [2, 2]),
        ([{0}, {0}, {0}], [1, 1, 1]),
    ],
)
def test_ranks_divide_the_cores_that_they_share(affinities: list[set[int]], expected: list[int]) -> None:
    command = partial(start_with_affinity, affinities, None)
    done = fork_ranks(command, num_ranks=len(affinities), GLOO_SOCKET_IFNAME="lo").wait()
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {i}: {num} {num}" for i, num in enumerate(expected)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_number_of_threads_from_the_user_is_kept(num_ranks: int) -> None:
    # a library reads the variable at its start, not here
    command = partial(start_with_affinity, [ALL] * num_ranks, "3")
    done = fork_ranks(command, num_ranks=num_ranks, GLOO_SOCKET_IFNAME="lo").wait()
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {i}: 8 3" for i in range(num_ranks)]


def keep_threads_and_variables() -> None:
    os.environ.pop("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    before = dict(os.environ)
    with distributed.worker_environment():
        distributed.init_distributed()
    changed = {name for name in os.environ if before.get(name) != os.environ[name]}
    assert not changed - {"DS_ACCELERATOR", "PATH"}, changed
    assert torch.get_num_threads() == 1


def test_a_process_without_a_launcher_keeps_its_threads_and_variables() -> None:
    done = fork_ranks(keep_threads_and_variables).wait()
    assert done.returncode == 0, done.stderr
