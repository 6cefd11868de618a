"""Standard input, output and error of the command line: closed, full, broken, or of another encoding."""

import codecs
import io
import os
import sys
from typing import Any

from blockft.errors import UserError

BROKEN_PIPE = 141
"""Exit code of a program whose reader has gone, as shells report a death by SIGPIPE: 128 + 13."""


_ESCAPES = "blockft.escapes"
"""Name under which Python knows `_escape`."""


class OutputClosed(Exception):
    """The reader of standard output or standard error has gone."""


class _RawOutput(io.FileIO):
    """A file descriptor of an output whose errors are raised as an exception of the command line.

    Any code that prints can then let them pass: no other file can raise them.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._name = name

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError as error:
            self._discard()
            raise OutputClosed from error
        except OSError as error:
            self._discard()
            raise UserError(f"{self._name} cannot be written: {error.strerror}") from error

    def _discard(self) -> None:
        """Discard all further output, which Python would try to write again when it ends."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def prepare_streams() -> None:
    """Open the standard streams that are closed, and make the outputs ready for any text.

    A closed output discards what is printed. Otherwise the next file that is opened would take its number,
    and printed lines would go into that file. A character that the terminal's encoding does not have is
    printed as its escape in JSON, so that printed JSON stays JSON.

    Streams that a caller put in place of the standard streams stay as they are.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest free number, which is this one
            os.open(os.devnull, mode)
    codecs.register_error(_ESCAPES, _escape)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _open_output(sys.stdout, 1, "standard output")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _open_output(sys.stderr, 2, "standard error")


def _open_output(stream: Any, descriptor: int, name: str) -> io.TextIOWrapper:
    if stream is not None:
        stream.flush()
    is_error = descriptor == 2
    raw = _RawOutput(descriptor, name)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors=_ESCAPES,
        line_buffering=is_error or raw.isatty(),
    )


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Write the characters that an encoding lacks as JSON does: by two escapes beyond U+FFFF."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    codes = (int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2))
    return "".join(f"\\u{code:04x}" for code in codes), error.end
