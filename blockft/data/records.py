"""Records of a source: what a file, glob, folder or Hub data set holds, one by one and placed."""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from blockft.data.json_stream import Window, why_unreadable
from blockft.data.sample import RecordError
from blockft.errors import UserError

PARQUET_ROWS = 1000
"""Rows of a parquet file turned into records at a time."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

GZIP = b"\x1f\x8b"

UNSUPPORTED_SUFFIXES = {
    codecs.BOM_UTF16_LE: "is UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16: save it as UTF-8",
    b"PAR1": "is parquet: let its name end in .parquet",
    b"PK\x03\x04": "is compressed: unpack it first",
    b"BZh": "is compressed: unpack it first",
    b"\xfd7zXZ": "is compressed: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed: unpack it first",
}
"""How files begin that hold no JSON in UTF-8, and what to do about them."""

PlacedRecord = tuple[str, Any]
"""Where a record stands (file and line), and the record, or the RecordError why it cannot be read."""


def find_files(path: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a source, sorted; in a folder those with one of the suffixes; none for a Hub id.

    A file may be packed by gzip; in a folder it counts unless it lies there unpacked, too.

    Raises:
        UserError: nothing is there.
    """
    here = Path(path)
    if here.is_file():
        return [here]
    if here.is_dir():
        found = [file for file in sorted(here.iterdir()) if without_gzip_suffix(file).suffix in suffixes]
        if in_folder := [
            file
            for file in found
            if without_gzip_suffix(file) == file or without_gzip_suffix(file) not in found
        ]:
            return in_folder
        raise UserError(f"source folder {path} holds no file that ends in {' or '.join(suffixes)}")
    if found := [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]:
        return found
    if HUB_ID.fullmatch(path) and without_gzip_suffix(here).suffix not in (".json", ".jsonl", ".parquet"):
        return []
    raise UserError(
        f"source {path} does not exist: no file, folder, match of a glob, or id on the Hub (owner/name)"
    )


def without_gzip_suffix(path: Path) -> Path:
    """The name of a file without the suffix of gzip."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def read_file(path: Path, under: str | None = None) -> Iterator[PlacedRecord]:
    """The records of a file, lazily: of a JSON array, of JSON lines, or of a .parquet file.

    `under` is the key by which a JSON object holds the array, where the format may wrap it so. JSON may be
    packed by gzip, whatever the file is called.

    Raises:
        UserError: the file cannot be read on, or is of another kind.
    """
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
            return
        opening = _first_character(path)
        if opening == b"[":
            yield from read_array(path)
        elif (
            opening == b"{"
            and under
            and without_gzip_suffix(path).suffix != ".jsonl"
            and _may_contain_key(path, under)
        ):
            yield from read_array(path, under)
        elif opening == b"{" and _is_multiline_object(path):
            raise UserError(
                f"source {path} is an object over several lines, neither JSON lines nor a list of records"
            )
        else:
            yield from read_lines(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = isinstance(error, OSError) and error.strerror or error
        raise UserError(f"source {path} cannot be read: {reason}") from error


def read_lines(path: Path) -> Iterator[PlacedRecord]:
    """The records of a file of JSON lines; empty lines are passed over."""
    with _open_unpacked(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line)


def read_array(path: Path, under: str | None = None) -> Iterator[PlacedRecord]:
    """The elements of a JSON array, or of that which an object holds `under` a key, decoded one by one.

    Raises:
        UserError: the file holds no such array, or breaks off; after that nothing in it can be read.
    """
    with _open_unpacked(path) as file:
        window = Window(path, file)
        if under is None:
            yield from _array_elements(path, window)
        else:
            yield from _elements_under_key(path, window, under)
        window.take("")


def read_hub(path: str, split: str | None, name: str | None = None) -> Iterator[PlacedRecord]:
    """The records of a data set on the Hub, streamed; `name` is that of its configuration.

    Raises:
        UserError: no split is given, or the data set cannot be reached.
    """
    import datasets

    if split is None:
        raise UserError(f"source {path} does not exist here; for a data set on the Hub name its split, too")
    try:
        records = iter(datasets.load_dataset(path, name, split=split, streaming=True))
        first = next(records, None)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"source {path} is no local file, and the Hub gives no such data set: {reason}"
        ) from error
    place = f"{path} ({name}, {split})" if name else f"{path} ({split})"
    number = 1
    while first is not None:
        yield f"{place}, record {number}", first
        first, number = next(records, None), number + 1


def _open_unpacked(path: Path) -> BinaryIO:
    """The file, unpacked, from behind its byte order mark, if it has one.

    Raises:
        UserError: by how it begins it holds no JSON in UTF-8.
    """
    with path.open("rb") as packed:
        is_gzip = packed.read(len(GZIP)) == GZIP
    file = cast(BinaryIO, gzip.GzipFile(path)) if is_gzip else path.open("rb")
    opening = file.read(max(map(len, UNSUPPORTED_SUFFIXES)))
    for kind, what in UNSUPPORTED_SUFFIXES.items():
        if opening.startswith(kind):
            file.close()
            raise UserError(f"source {path} {what}")
    file.seek(len(codecs.BOM_UTF8) if opening.startswith(codecs.BOM_UTF8) else 0)
    return file


def _first_character(path: Path) -> bytes:
    """The first character that is no white space."""
    with _open_unpacked(path) as file:
        while block := file.read(4096):
            if text := block.lstrip():
                return text[:1]
    return b""


def _may_contain_key(path: Path, under: str | None) -> bool:
    """Whether the object that opens a file has the key, or is no line of JSON lines, as it has several."""
    with _open_unpacked(path) as file:
        window = Window(path, file)
        window.peek()
        first_line = window.line
        for key in _object_keys(window):
            if key == under or window.line > first_line:
                return True
            window.value()
        return window.line > first_line


def _is_multiline_object(path: Path) -> bool:
    """Whether the object that opens a file goes on behind its first line; one that is broken does not."""
    try:
        return _may_contain_key(path, None)
    except UserError:
        return False


def _read_parquet(path: Path) -> Iterator[PlacedRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}, row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{path}, after row {number}: not parquet ({str(error).splitlines()[0]})") from error


def _array_elements(path: Path, window: Window) -> Iterator[PlacedRecord]:
    window.take("[")
    while window.peek() != "]":
        yield f"{path}, line {window.line}", window.value()
        if window.peek() != "]":
            window.take(",")
            if window.peek() == "]":
                window.fail("a record is missing after a comma")
    window.take("]")


def _elements_under_key(path: Path, window: Window, under: str) -> Iterator[PlacedRecord]:
    found = False
    for key in _object_keys(window):
        if key == under:
            found = True
            yield from _array_elements(path, window)
        else:
            window.value()
    if not found:
        window.fail(f"the JSON object has no list {under!r}")


def _object_keys(window: Window) -> Iterator[Any]:
    """The keys of a JSON object; the value of each is taken before the next is asked for."""
    window.take("{")
    while window.peek() != "}":
        key = window.value()
        window.take(":")
        yield key
        if window.peek() != "}":
            window.take(",")
    window.take("}")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RecordError(f"not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return RecordError(f"not JSON ({error.msg}, column {error.colno})")
    except (RecursionError, ValueError) as error:
        return RecordError(why_unreadable(error))
