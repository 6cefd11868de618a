"""An error of one rank is an error of all ranks that work together. A rank alone works without a port."""

import errno
import os
import socket
from collections.abc import Iterator
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


@pytest.fixture
def eight_threads() -> Iterator[None]:
    """A process of its own cores, eight of them, without a launcher and without a number of threads."""
    variables = ("RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS")
    num_threads = torch.get_num_threads()
    with patch.dict(os.environ):
        for name in variables:
            os.environ.pop(name, None)
        torch.set_num_threads(8)
        yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize(("num_local", "num_threads"), [(1, 8), (2, 4), (3, 2), (16, 1)])
def test_the_ranks_of_a_host_share_its_cores(eight_threads: None, num_local: int, num_threads: int) -> None:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    os.environ.update(rank, LOCAL_SIZE=str(num_local))
    distributed.set_worker_environment()
    assert torch.get_num_threads() == num_threads
    assert os.environ["OMP_NUM_THREADS"] == str(num_threads)


def test_a_number_of_threads_from_the_user_is_kept(eight_threads: None) -> None:
    os.environ["OMP_NUM_THREADS"] = "3"  # read by libraries at their start, not here
    with distributed.worker_environment():
        assert torch.get_num_threads() == 8
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_process_without_a_launcher_keeps_its_threads_and_variables(eight_threads: None) -> None:
    before = dict(os.environ)
    with distributed.worker_environment():
        assert torch.get_num_threads() == 8
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert added.keys() <= {"DS_ACCELERATOR", "PATH"}
