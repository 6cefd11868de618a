"""The last lines that a command prints: its result, and the commands that can follow it."""

import os
import shlex
import sys
from collections.abc import Iterable


def print_next(result: str, *commands: Iterable[object]) -> None:
    """Print a result and the commands that can follow it, each of which can be pasted into a shell.

    The lines go to stderr, because stdout is read by programs. Of several ranks only the first prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    print(result, file=sys.stderr)
    for command in commands:
        print(f"next: blockft {shlex.join(map(str, command))}", file=sys.stderr)
