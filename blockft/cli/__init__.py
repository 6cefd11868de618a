"""The command line: parses arguments, calls a command, and turns errors into exit codes."""

import atexit
import errno
import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from blockft.cli.interrupt import Interrupts
from blockft.cli.streams import BROKEN_PIPE, OutputClosed, prepare_streams
from blockft.errors import (
    INTERNAL_ERROR,
    INTERRUPTED,
    RankError,
    ReportedError,
    UserError,
    is_first_of_host,
)
from blockft.inputs import shorten, text_problem
from blockft.printable import print_text

MAX_MESSAGE_LEN = 4000
"""Longest error message in characters; a message may quote long texts of the user."""

GROUP_COMMANDS = ("train", "doctor")
"""Commands whose processes form a group if a launcher starts several."""

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
    code = INTERNAL_ERROR
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
    # the deepspeed launcher passes --local_rank=N first, unless it is told not to
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    try:
        _check_arguments(arguments)
        with _watching_ranks(arguments):
            code = _call_command(arguments)
        sys.stdout.flush()
        return code
    except ReportedError as error:
        return error.exit_code
    except UserError as error:
        _print_error(str(error), on_every_rank=isinstance(error, RankError))
        return error.exit_code
    except OutputClosed:
        return BROKEN_PIPE


def _watching_ranks(arguments: list[str]) -> AbstractContextManager[object]:
    """Watch the other ranks of a run from the first moment on, if a launcher started this process.

    A rank that fails while it imports or reads its arguments then ends the others, too.
    """
    is_rank = "RANK" in os.environ and arguments[:1] in ([name] for name in GROUP_COMMANDS)
    if not is_rank or {"--help", "--dry-run"} & set(arguments):
        return nullcontext()
    from blockft.training.rank_watch import watching_ranks

    return watching_ranks(has_just_started=True)


def _call_command(arguments: list[str]) -> int:
    """Call the command that the arguments name and return its exit code.

    Raises:
        UserError: the arguments are wrong, memory ran out, or the system refuses to use a file.
    """
    # all imports happen here, where an interruption and a failure of a rank are handled
    import typer

    from blockft.cli import commands

    # typer does not export the class of the errors about unknown commands and options
    usage_error: Any = typer.BadParameter.__base__
    try:
        return commands.parse_and_run(arguments)
    except usage_error as error:
        from blockft.cli.usage import describe_usage_error

        raise UserError(describe_usage_error(error)) from error
    except typer.Abort:
        return INTERRUPTED
    except MemoryError as error:
        raise UserError("this machine has too little memory: choose smaller sizes") from error
    except OSError as error:
        if error.filename is None or error.errno not in _STATES_OF_THE_SYSTEM:
            raise
        raise UserError(f"{error.filename} cannot be used: {error.strerror}") from error


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


def _print_error(message: str, *, on_every_rank: bool) -> None:
    """Print an error as one line, once on every host, because each host may have its own mistake."""
    if on_every_rank or is_first_of_host():
        # without a reader of the message the exit code alone tells of the error
        with suppress(OutputClosed, UserError):
            text = shorten(" ".join(message.split()), MAX_MESSAGE_LEN)
            print_text(f"blockft: {text}", file=sys.stderr)
