"""Check that all ranks of a run form one group: an all-reduce with a known sum, and its bandwidth."""

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from blockft.errors import UserError
from blockft.printable import print_text
from blockft.training.distributed import (
    init_distributed,
    set_worker_environment,
    shutdown_distributed,
    use_cpu,
)
from blockft.training.rank_watch import watching_ranks
from blockft.units import format_bytes

NUM_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Size of the tensor whose reduction is timed, by device."""

NUM_RUNS = 3
"""Number of timed reductions, of which the fastest counts."""

GROUP_CHECK_S = 90
"""Time limit of the whole check, with the start of its processes."""


def run_group_check() -> dict[str, Any]:
    """Form the group of this process and the others that a launcher started; return what was measured.

    All ranks call it.

    Raises:
        UserError: the ranks cannot connect, or their sum is wrong.
    """
    set_worker_environment()
    with watching_ranks() as watch:
        init_distributed(watch)
        found = _reduce()
        shutdown_distributed()
    return found


def _reduce() -> dict[str, Any]:
    """Return the number of ranks and the bandwidth of an all-reduce."""
    num_ranks, device = dist.get_world_size(), "cpu" if use_cpu() else "cuda"
    total = torch.tensor([float(dist.get_rank() + 1)], device=device)
    dist.all_reduce(total)
    expected = num_ranks * (num_ranks + 1) / 2
    if total.item() != expected:
        raise UserError(
            f"an all-reduce over {num_ranks} ranks gave {total.item():g} instead of {expected:g}: the "
            "network or a GPU of the hosts is broken; look for it by leaving out hosts"
        )
    num_bytes = NUM_BYTES[device]
    tensor, seconds = torch.ones(num_bytes // 4, device=device), []
    for _ in range(NUM_RUNS + 1):  # the first one makes the connections
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
        tensor.fill_(1)
    return {
        "num_ranks": num_ranks,
        "backend": dist.get_backend(),
        "num_bytes": num_bytes,
        "bus_bytes_per_s": 2 * (num_ranks - 1) / num_ranks * num_bytes / min(seconds[1:]),
    }


def print_group_check() -> None:
    """Check the group as one of its ranks; rank 0 prints the result as one line of JSON."""
    found = run_group_check()
    if os.environ["RANK"] == "0":
        print_text(json.dumps({"group_check": found}), flush=True)


def describe_group_check(exit_code: int, lines: Sequence[str]) -> str:
    """Return what the ranks have found, from the exit code and the output of their launcher.

    Raises:
        UserError: the check failed; the message is that of the rank that failed.
    """
    for line in lines:
        _, separator, text = line.partition('{"group_check": ')
        if separator and exit_code == 0:
            found = json.loads(text.rstrip()[:-1])
            if found["num_ranks"] == 1:
                return f"1 rank ({found['backend']}), no other rank to exchange with"
            return (
                f"{found['num_ranks']} ranks ({found['backend']}), the sum is right, bus bandwidth "
                f"{format_bytes(int(found['bus_bytes_per_s']))}/s at {format_bytes(found['num_bytes'])}"
            )
    messages = [line.partition("blockft: ")[2] for line in lines if "blockft: " in line]
    last = next((line for line in reversed(lines) if line.strip()), "no message")
    raise UserError(messages[0] if messages else f"the launcher ended with exit code {exit_code}: {last}")
