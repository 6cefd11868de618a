"""A file of JSON, decoded value by value: it is never in memory whole."""

import codecs
import json
import re
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from blockft.errors import UserError

READ_BYTES = 1 << 20
"""How much of a file is read at once; a value longer than that is read in growing steps."""

NO_PART_OF_A_NUMBER = re.compile(r"[^+\-.0-9eE]")


class Window:
    """A sliding window over a file of JSON: tokens and values are taken one after the other."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.line = 1
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            rest = len(self._text)
            while self._at < rest and self._text[self._at] in " \t\r\n":
                self.line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < rest or self._ended:
                return self._text[self._at : self._at + 1]
            self._more(READ_BYTES)

    def take(self, wanted: str) -> None:
        """Step over one character; empty is the end of the file."""
        if (found := self.peek()) != wanted:
            name = repr(wanted) if wanted else "the end of the file"
            self.fail(f"expected {name}, found {repr(found) if found else 'the end of the file'}")
        self._at += len(wanted)

    def value(self) -> Any:
        """Step over one JSON value."""
        self.peek()
        step = READ_BYTES
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # a value cut off by the window fails at its end, or inside a text that has not closed yet
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if self._ended or not cut_off:
                    self.fail(f"not JSON ({error.msg})")
                self._more(step)
                step *= 2
                continue
            except (RecursionError, ValueError) as error:
                self.fail(why_unreadable(error))
            if not self._ended and not NO_PART_OF_A_NUMBER.search(self._text, end):
                # the beginning of a number is a number, too
                self._more(step)
                continue
            self.line += self._text.count("\n", self._at, end)
            self._at = end
            return value

    def fail(self, reason: str) -> NoReturn:
        """Raise UserError for the record at hand."""
        raise UserError(f"{self._path}, line {self.line}: {reason}")

    def _more(self, num_bytes: int) -> None:
        data = self._file.read(num_bytes)
        rest = self._text[self._at :]
        try:
            self._text, self._at = rest + self._decoder.decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            self.line += rest.count("\n") + error.object[: error.start].count(b"\n")
            self.fail("not UTF-8")
        self._ended = not data


def why_unreadable(error: RecursionError | ValueError) -> str:
    """Why JSON that is sound as far as it was read cannot be decoded."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a whole number has too many digits"
