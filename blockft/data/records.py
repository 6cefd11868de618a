"""Records of a source: read JSON, JSON lines, parquet and Hub datasets one by one, with their places."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockft.data.files import open_json, without_gzip_suffix
from blockft.data.json_stream import JsonStream, decoding_problem
from blockft.data.sample import RecordError
from blockft.errors import UserError

PARQUET_ROWS = 1000
"""Number of parquet rows that are converted to records at a time."""

PlacedRecord = tuple[str, Any]
"""The place of a record (file and line), and the record, or a RecordError if the record cannot be read."""


def read_file(path: Path, array_key: str | None = None) -> Iterator[PlacedRecord]:
    """Read the records of a file lazily.

    A file whose name ends in `.parquet` is read as parquet. For any other file the first characters decide
    between a JSON array and JSON lines; the file may be compressed with gzip. If `array_key` is given, a JSON
    object that has this key is read as well: its value is the array of records. `array_key` is ignored for a
    file whose name ends in `.jsonl` (or `.jsonl.gz`).

    Raises:
        UserError: the file cannot be read, or is neither parquet, a JSON array nor JSON lines.
    """
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
            return
        first = _first_character(path)
        is_lines = without_gzip_suffix(path).suffix == ".jsonl"
        if first == b"[":
            yield from read_array(path)
        elif first == b"{" and array_key and not is_lines and _may_contain_key(path, array_key):
            yield from read_array(path, array_key)
        elif first == b"{" and _is_multiline_object(path):
            raise UserError(
                f"source {path} is an object over several lines, neither JSON lines nor a list of records"
            )
        else:
            yield from read_lines(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = isinstance(error, OSError) and error.strerror or error
        raise UserError(f"source {path} cannot be read: {reason}") from error


def read_lines(path: Path) -> Iterator[PlacedRecord]:
    """Read a file of JSON lines. Blank lines are skipped; a line that is not JSON gives a RecordError."""
    with open_json(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse_line(line)


def read_array(path: Path, array_key: str | None = None) -> Iterator[PlacedRecord]:
    """Read the elements of a JSON array one by one. With `array_key`, the array is the value of that key.

    Raises:
        UserError: the file holds no such array, or its JSON is broken. The rest of the file is lost then.
    """
    with open_json(path) as file:
        stream = JsonStream(path, file)
        if array_key is None:
            yield from _array_elements(path, stream)
        else:
            yield from _elements_under_key(path, stream, array_key)
        stream.expect_end()


def read_hub(path: str, split: str | None, name: str | None = None) -> Iterator[PlacedRecord]:
    """Stream the records of a dataset on the Hub; `name` is its configuration.

    Raises:
        UserError: `split` is None, or the dataset cannot be reached.
    """
    import datasets

    if split is None:
        raise UserError(
            f"source {path} does not exist here; for a dataset on the Hub, name its split as well"
        )
    try:
        records = iter(datasets.load_dataset(path, name, split=split, streaming=True))
        record = next(records, None)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"source {path} is no local file, and the Hub gives no such dataset: {reason}"
        ) from error
    place = f"{path} ({name}, {split})" if name else f"{path} ({split})"
    number = 1
    while record is not None:
        yield f"{place}, record {number}", record
        record, number = next(records, None), number + 1


def _first_character(path: Path) -> bytes:
    """Return the first character of a file that is not white space."""
    with open_json(path) as file:
        while chunk := file.read(4096):
            if text := chunk.lstrip():
                return text[:1]
    return b""


def _may_contain_key(path: Path, array_key: str | None) -> bool:
    """Return whether the first object of a file has the key or spans several lines.

    An object over several lines is not a line of JSON lines, so the search stops at its second line.
    """
    with open_json(path) as file:
        stream = JsonStream(path, file)
        stream.peek()
        first_line = stream.line
        for key in _object_keys(stream):
            if key == array_key or stream.line > first_line:
                return True
            stream.read_value()
        return stream.line > first_line


def _is_multiline_object(path: Path) -> bool:
    """Return whether the first object of a file spans several lines; False if its first line is broken."""
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


def _array_elements(path: Path, stream: JsonStream) -> Iterator[PlacedRecord]:
    stream.expect("[")
    while stream.peek() != "]":
        yield f"{path}, line {stream.line}", stream.read_value()
        if stream.peek() != "]":
            stream.expect(",")
            if stream.peek() == "]":
                stream.fail("a record is missing after a comma")
    stream.expect("]")


def _elements_under_key(path: Path, stream: JsonStream, array_key: str) -> Iterator[PlacedRecord]:
    has_key = False
    for key in _object_keys(stream):
        if key == array_key:
            has_key = True
            yield from _array_elements(path, stream)
        else:
            stream.read_value()
    if not has_key:
        stream.fail(f"the JSON object has no list {array_key!r}")


def _object_keys(stream: JsonStream) -> Iterator[Any]:
    """Yield the keys of a JSON object. The caller reads the value of a key before it takes the next key."""
    stream.expect("{")
    while stream.peek() != "}":
        key = stream.read_value()
        stream.expect(":")
        yield key
        if stream.peek() != "}":
            stream.expect(",")
    stream.expect("}")


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RecordError(f"not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return RecordError(f"not JSON ({error.msg}, column {error.colno})")
    except (RecursionError, ValueError) as error:
        return RecordError(decoding_problem(error))
