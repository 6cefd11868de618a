"""Messages for users on stderr: an error in one sentence, or a warning in one line."""

import difflib
import os
import sys
from collections.abc import Iterable
from typing import Any

from blockft.printable import print_text

MAX_NAME_LEN = 200
"""Longest name, in characters, for which a similar one is looked for."""

INTERNAL_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130
"""Exit codes of a command that fails: by a mistake in the program, by one of the user, and by a signal."""


class UserError(Exception):
    """A mistake of the user, in one sentence: what is wrong, what was found, what is allowed, the remedy.

    The command line prints it on stderr without a traceback and exits with `exit_code`.
    """

    exit_code = USER_ERROR


class RankError(UserError):
    """A mistake that one rank of a run may find alone, so that every rank prints it.

    If it reports the failure of another rank, `exit_code` is that rank's.
    """

    def __init__(self, message: str, *, exit_code: int = USER_ERROR) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ReportedError(RankError):
    """A mistake that another process has already printed, so that this one only ends."""


def warn(message: str) -> None:
    """Print a warning on stderr as one line. Of several ranks of a host only the first prints."""
    notify(f"warning: {message}")


def notify(message: str) -> None:
    """Print a remark on stderr as one line. Of several ranks of a host only the first prints."""
    if is_first_of_host():
        print_text(f"blockft: {' '.join(message.split())}", file=sys.stderr)


def is_first_of_host() -> bool:
    """Return whether this process is the first rank of its host, or no rank of a run at all.

    A process whose variables no launcher gives is no rank.
    """
    local_rank, num_processes = os.environ.get("LOCAL_RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    is_rank = local_rank.isdecimal() and num_processes.isdecimal()
    return not (is_rank and 0 < int(local_rank[:9]) < int(num_processes[:9]))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the question whether the most similar of `names` is meant, or "" if none is similar."""
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean {folded[close[0]]}?" if close else ""


def list_allowed(value: Any, names: Iterable[str]) -> str:
    """Return the values that are allowed instead of `value`, and whether the most similar one is meant."""
    names = list(names)
    allowed = f"allowed: {', '.join(names)}"
    return "; ".join(filter(None, (allowed, did_you_mean(str(value)[:MAX_NAME_LEN], names))))


def check_type(value: Any, expected: type | tuple[type, ...], name: str, remedy: str = "") -> None:
    """Check the type of an argument of the Python API.

    Raises:
        TypeError: the argument has another type. The message ends in `remedy`.
    """
    if not isinstance(value, expected):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        allowed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TypeError(f"{name} is {type(value).__name__}, it should be {allowed}{remedy and f': {remedy}'}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
