"""The command line: parses words, calls a verb, turns errors into exit codes. Heavy imports happen inside."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import Any

import typer

from blockft.cli import pipeline  # isort: skip  (--help lists verbs in the order in which they are defined)
from blockft.cli import answers, bench, cache, options
from blockft.errors import UserError

__all__ = ["answers", "bench", "cache", "main", "options", "pipeline"]

options.app.add_typer(options.bench, name="bench")
options.app.add_typer(options.cache, name="cache")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 our mistake, 2 the user's, 130 interrupted."""
    code = 1

    def end_worker() -> None:
        # a thread of Gloo that lets go of a tensor while Python shuts down aborts it, after its work is done
        if "RANK" in os.environ:
            for stream in (sys.stdout, sys.stderr):
                # None where there is no such stream
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(code)

    atexit.register(end_worker)  # the first to be registered is the last to be called
    # the deepspeed launcher puts --local_rank=N first unless it is told not to
    given = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    if "RANK" not in os.environ:  # a worker of a launcher ends at once until it has something to save
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = options.app(given or ["--help"], standalone_mode=False) or 0
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


def _fail(sentence: str) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on every host, for each may have a mistake of its own
        print("blockft:", " ".join(sentence.split()), file=sys.stderr)
    return 2


_UsageError: Any = typer.BadParameter.__base__
"""What typer raises for unknown commands and options; it has no public name of its own."""
