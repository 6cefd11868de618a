"""The command line: parses arguments, calls a command, and turns errors into exit codes."""

import atexit
import errno
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from blockft.cli.interrupt import CODE as INTERRUPTED
from blockft.cli.interrupt import Interrupts
from blockft.cli.streams import BROKEN_PIPE, OutputClosed, prepare_streams
from blockft.errors import RankError, ReportedError, UserError, is_first_of_host
from blockft.inputs import shorten, text_problem
from blockft.printable import print_text

MAX_MESSAGE_LEN = 4000
"""Longest error message in characters; a message may quote long texts of the user."""

USER_ERROR = 2
"""The exit code of a command that ends because of a mistake of the user."""

_STATES_OF_THE_SYSTEM = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
"""System errors that no program causes, so that they are the user's to mend. Others are internal errors."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 success, 1 internal error, 2 user error, 130 interrupted, 141 the reader of the output has
    gone.
    """
    code = 1
    prepare_streams()

    def end_worker() -> None:
        # a Gloo thread that frees a tensor while Python shuts down aborts the process after its work is done
        if "RANK" in os.environ:
            for stream in (sys.stdout, sys.stderr):
                # a process without this stream has None here
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(code)

    atexit.register(end_worker)  # exit handlers run in reverse order, so this one runs last
    interrupts = Interrupts()
    # a rank ends at once on SIGTERM until it has something to save
    interrupts.install(signal.SIGINT, *([] if "RANK" in os.environ else [signal.SIGTERM]))
    try:
        code = _run()
        interrupts.stop()
    except KeyboardInterrupt:
        interrupts.stop()
        code = INTERRUPTED
    except SystemExit as ended:
        interrupts.stop()
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if not interrupts.received:
            raise
    except BaseException:
        interrupts.stop()
        # an interruption may surface as another error: of a worker process, or of an import
        if not interrupts.received:
            raise
    finally:
        # Python would print an error of this flush as it shuts down
        with suppress(OutputClosed, UserError):
            sys.stdout.flush()
    sys.exit(INTERRUPTED if interrupts.received else code)


def _run() -> int:
    """Run the command that the arguments name and return its exit code."""
    # all imports happen here, where an interruption is handled
    import typer

    from blockft.cli import commands

    # typer does not export the class of the errors about unknown commands and options
    usage_error: Any = typer.BadParameter.__base__
    # the deepspeed launcher passes --local_rank=N first, unless it is told not to
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    try:
        _check_arguments(arguments)
        code = commands.parse_and_run(arguments)
        sys.stdout.flush()
        return code
    except usage_error as error:
        return _fail(f"{error.format_message()} (see blockft --help)")
    except ReportedError:
        return USER_ERROR
    except UserError as error:
        return _fail(str(error), on_every_rank=isinstance(error, RankError))
    except OutputClosed:
        return BROKEN_PIPE
    except typer.Abort:
        return INTERRUPTED
    except MemoryError:
        return _fail("this machine has too little memory: choose smaller sizes")
    except OSError as error:
        if error.filename is None or error.errno not in _STATES_OF_THE_SYSTEM:
            raise
        return _fail(f"{error.filename} cannot be used: {error.strerror}")


def _check_arguments(arguments: list[str]) -> None:
    """Check that the arguments are texts: paths and names are written to files in UTF-8.

    Raises:
        UserError: an argument is not text in the encoding of the locale.
    """
    for argument in arguments:
        if text_problem(argument):
            raise UserError(
                f"the argument {shorten(ascii(argument))} is not text in the encoding "
                f"{sys.getfilesystemencoding()} of this locale: correct it, or use a locale with UTF-8"
            )


def _fail(message: str, *, on_every_rank: bool = False) -> int:
    """Print an error as one line, once on every host, because each host may have its own mistake."""
    if on_every_rank or is_first_of_host():
        # without a reader of the message the exit code alone tells of the error
        with suppress(OutputClosed, UserError):
            text = shorten(" ".join(message.split()), MAX_MESSAGE_LEN)
            print_text(f"blockft: {text}", file=sys.stderr)
    return USER_ERROR
