"""Print text of users as it is: control characters are escaped, so that no text controls the terminal."""

import re
import sys
from typing import TextIO

_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for tabs and new lines
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction marks, which reorder the rest of a line
    r"\u2028\u2029"  # line and paragraph separators
    r"\ud800-\udfff]"  # surrogates: bytes of a path that are no UTF-8, which cannot be printed
)


def printable(text: object) -> str:
    r"""Return the text with control characters written as in JSON, such as \u001b. Tabs and new lines stay.

    Text in JSON keeps its meaning.
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def print_text(
    text: object = "", *, end: str = "\n", file: TextIO | None = None, flush: bool = False
) -> None:
    """Print a text with its control characters escaped, on stdout unless `file` is given."""
    print(printable(text), end=end, file=sys.stdout if file is None else file, flush=flush)


def print_answer(text: str, *, end: str = "\n") -> None:
    """Print a text of a model on stdout: as it is, but with its control characters escaped on a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)
