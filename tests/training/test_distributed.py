"""An error of one rank is an error of all ranks that work together. A rank alone works without a port."""

import errno
import os
import socket
from functools import partial

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
    distributed.set_worker_environment()
    os.environ["MASTER_PORT"] = str(port)
    distributed.init_distributed()
    group = dist.new_group([0])  # as DeepSpeed makes further groups
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    os.write(1, f"{dist.get_world_size()} rank, sum {total.item()}\n".encode())


def test_a_rank_alone_needs_no_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = fork_ranks(partial(join_alone, server.getsockname()[1])).wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 rank, sum 1.0\n"
