"""Records of a source: what a file, glob, folder or Hub data set holds, one by one and placed."""

import codecs
import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from blockft.data.sample import RecordError
from blockft.errors import UserError

READ_BYTES = 1 << 20
"""How much of a JSON array is read at once; a record longer than that is read in growing steps."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Placed = tuple[str, Any]
"""Where a record stands (file and line), and the record, or the RecordError why it cannot be read."""


def find_files(path: str, suffix: str) -> list[Path]:
    """The files of a source, sorted; in a folder those that end in `suffix`; none if the path is a Hub id.

    Raises:
        UserError: nothing is there.
    """
    here = Path(path)
    if here.is_file():
        return [here]
    if here.is_dir():
        if in_folder := [file for file in sorted(here.iterdir()) if file.suffix == suffix]:
            return in_folder
        raise UserError(f"source folder {path} holds no file that ends in {suffix}")
    if found := [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]:
        return found
    if HUB_ID.fullmatch(path) and here.suffix not in (".json", ".jsonl"):
        return []
    raise UserError(
        f"source {path} does not exist: no file, folder, match of a glob, or id on the Hub (owner/name)"
    )


def read_lines(path: Path) -> Iterator[Placed]:
    """The records of a file of JSON lines; empty lines are passed over."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line)


def read_array(path: Path) -> Iterator[Placed]:
    """The elements of a JSON array, decoded one by one: the file is never in memory whole.

    Raises:
        UserError: the file is no JSON array, or breaks off; after that nothing in it can be read.
    """
    with path.open("rb") as file:
        window = _Window(path, file)
        window.take("[")
        while window.peek() != "]":
            yield f"{path}, line {window.line}", window.value()
            if window.peek() != "]":
                window.take(",")
                if window.peek() == "]":
                    window.fail("a record is missing after a comma")
        window.take("]")
        window.take("")


def read_hub(path: str, split: str | None) -> Iterator[Placed]:
    """The records of a data set on the Hub, streamed.

    Raises:
        UserError: no split is given, or the data set cannot be reached.
    """
    import datasets

    if split is None:
        raise UserError(f"source {path} does not exist here; for a data set on the Hub name its split, too")
    try:
        records = iter(datasets.load_dataset(path, split=split, streaming=True))
        first = next(records, None)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"source {path} is no local file, and the Hub gives no such data set: {reason}"
        ) from error
    number = 1
    while first is not None:
        yield f"{path} ({split}), record {number}", first
        first, number = next(records, None), number + 1


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RecordError(f"not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return RecordError(f"not JSON ({error.msg}, column {error.colno})")


class _Window:
    """A sliding window over a file of JSON."""

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
            self.fail(
                f"expected {name} of a JSON array, found {repr(found) if found else 'the end of the file'}"
            )
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
