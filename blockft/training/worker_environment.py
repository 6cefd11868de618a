"""The environment variables that a launcher sets for each rank. Imports only light modules."""

import os
import re

from blockft.errors import UserError
from blockft.inputs import shorten

MAX_WORLD_SIZE = 1 << 20
"""Largest number of processes of a run."""

MAX_TIMEOUT_MINUTES = 1_000_000
"""Largest time that DeepSpeed waits for processes."""

DEFAULT_TIMEOUT_MINUTES = 10
"""Time in which all ranks must connect, unless DEEPSPEED_TIMEOUT says otherwise, as in DeepSpeed."""

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets for each rank."""


def is_worker() -> bool:
    """Return whether a launcher (deepspeed, torchrun, or srun with RANK exported) started this process."""
    return "RANK" in os.environ


def check_worker_environment() -> None:
    """Check the variables that a launcher sets, if a launcher started this process.

    Raises:
        UserError: a variable is missing or has a value that no launcher gives it.
    """
    read_timeout_minutes()
    if not is_worker():
        return
    num_processes = _read_variable("WORLD_SIZE", 1, MAX_WORLD_SIZE)
    _read_variable("RANK", 0, num_processes - 1)
    _read_variable("LOCAL_RANK", 0, num_processes - 1)
    _read_variable("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR", "").strip():
        raise UserError("RANK is set, but MASTER_ADDR is not: set it to the address of the first host")


def read_num_local() -> int:
    """Return the number of ranks that a launcher starts together on this host; 1 if it does not say.

    torchrun and DeepSpeed say it. A value that contradicts the place of this rank is not theirs.
    """
    local_rank, num_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    node = int(os.environ["RANK"]) - local_rank
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        value = os.environ.get(name, "")
        if re.fullmatch(r"\d{1,9}", value, re.ASCII) and local_rank < int(value) <= num_ranks - node:
            return int(value)
    return 1


def read_timeout_minutes() -> int:
    """Return the time in which all ranks must connect.

    Raises:
        UserError: DEEPSPEED_TIMEOUT is not a number of minutes.
    """
    return _read_variable("DEEPSPEED_TIMEOUT", 1, MAX_TIMEOUT_MINUTES, default=DEFAULT_TIMEOUT_MINUTES)


def _read_variable(name: str, smallest: int, largest: int, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(
            f"RANK is set, but {name} is not: start the processes with deepspeed, torchrun or --num-gpus, or "
            "unset RANK"
        )
    if not re.fullmatch(r"\d{1,9}", value, re.ASCII) or not smallest <= int(value) <= largest:
        raise UserError(
            f"the environment variable {name} is {shorten(value)!r}, it should be a whole number from "
            f"{smallest} to {largest}: correct or unset it"
        )
    return int(value)
