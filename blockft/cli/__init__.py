"""The command line: parses arguments, calls a command, and turns errors into exit codes."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import Any

import typer

from blockft.cli import bench, cache, commands
from blockft.errors import UserError
from blockft.printable import print_text

__all__ = ["bench", "cache", "commands", "main"]

commands.app.add_typer(cache.app, name="cache")
commands.app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line.

    Exit codes: 0 success, 1 internal error, 2 user error, 130 interrupted.
    """
    code = 1

    def end_worker() -> None:
        # a Gloo thread that frees a tensor while Python shuts down aborts the process after its work is done
        if "RANK" in os.environ:
            for stream in (sys.stdout, sys.stderr):
                # a process without this stream has None here
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(code)

    atexit.register(end_worker)  # exit handlers run in reverse order, so this one runs last
    # the deepspeed launcher passes --local_rank=N first, unless it is told not to
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    if "RANK" not in os.environ:  # a rank ends at once on SIGTERM until it has something to save
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = commands.parse_and_run(arguments)
    except _UsageError as error:
        code = _fail(f"{error.format_message()} (see blockft --help)")
    except UserError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    sys.exit(code)


def _fail(message: str) -> int:
    """Print an error as one line, once on every host, because each host may have its own mistake."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_text(f"blockft: {' '.join(message.split())}", file=sys.stderr)
    return 2


_UsageError: Any = typer.BadParameter.__base__
"""What typer raises for unknown commands and options; typer does not export the class."""
