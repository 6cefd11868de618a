"""Records of a source: read JSON, parquet, tables and Hub datasets one by one, with their places."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blockft.data.files import open_text, record_suffix
from blockft.data.json_stream import JsonError, JsonStream, RecordDecoder, repeated_key_problem
from blockft.data.sample import RecordError
from blockft.data.tables import TABLE_SUFFIXES, read_table
from blockft.errors import UserError, first_line
from blockft.file_content import check_content
from blockft.hub_access import check_hub, http_library

PARQUET_ROWS = 1000
"""Number of parquet rows that are converted to records at a time."""

SPREADSHEET_SUFFIXES = (".xlsx", ".xls", ".ods")
"""Files of spreadsheets, which cannot be read."""

PlacedRecord = tuple[str, Any]
"""The place of a record (file and line), and the record, or a RecordError if the record cannot be read."""


def read_file(
    path: Path, array_key: str | None = None, on_field: Callable[[str, Any], None] | None = None
) -> Iterator[PlacedRecord]:
    """Read the records of a file lazily.

    A file whose name ends in `.parquet` is read as parquet, and `.csv` and `.tsv` as a table. For any other
    file the first characters decide between a JSON array and JSON lines. All files but parquet may be
    compressed with gzip or zstd. If `array_key` is given, a JSON object that has this key is read as well:
    its value is the array of records. `array_key` is ignored for a file whose name ends in `.jsonl` (before
    the suffix of a compression). `on_field` is called with each other key of the object, and its value.

    Raises:
        UserError: the file cannot be read, or is neither parquet, a table, a JSON array nor JSON lines.
    """
    suffix = record_suffix(path)
    if suffix in SPREADSHEET_SUFFIXES:
        raise UserError(f"source {path} is a spreadsheet: save it as CSV, parquet or JSON lines")
    try:
        if path.suffix.lower() == ".parquet":
            yield from _read_parquet(path)
            return
        if suffix in TABLE_SUFFIXES:
            yield from read_table(path)
            return
        first = _first_character(path)
        is_lines = suffix == ".jsonl"
        if first == b"[":
            yield from read_array(path)
        elif first == b"{" and array_key and not is_lines and _may_contain_key(path, array_key):
            yield from read_array(path, array_key, on_field)
        elif first == b"{" and _is_multiline_object(path):
            raise UserError(
                f"source {path} is an object over several lines, neither JSON lines nor a list of records: "
                "write the list of its records to a file, or one record a line"
            )
        else:
            yield from read_lines(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = isinstance(error, OSError) and error.strerror or error
        raise UserError(f"source {path} cannot be read: {reason}") from error


def read_lines(path: Path) -> Iterator[PlacedRecord]:
    """Read a file of JSON lines. Blank lines are skipped; a line that is not JSON gives a RecordError."""
    decoder = RecordDecoder()
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse_line(line, decoder)


def read_array(
    path: Path, array_key: str | None = None, on_field: Callable[[str, Any], None] | None = None
) -> Iterator[PlacedRecord]:
    """Read the elements of a JSON array one by one. With `array_key`, the array is the value of that key.

    `on_field` is called with each other key and its value.

    Raises:
        UserError: the file holds no such array, or its JSON is broken. The rest of the file is lost then.
    """
    with open_text(path) as file:
        stream = JsonStream(path, file)
        if array_key is None:
            yield from _array_elements(path, stream)
        else:
            yield from _elements_under_key(path, stream, array_key, on_field)
        stream.expect_end()


def read_hub(
    path: str, split: str | None, name: str | None = None, revision: str | None = None
) -> Iterator[PlacedRecord]:
    """Stream the records of a dataset on the Hub; `name` is its configuration, `revision` a commit.

    Raises:
        UserError: `split` is None, or the dataset cannot be reached.
    """
    import datasets

    hub_errors = (OSError, ValueError, datasets.exceptions.DatasetsError, http_library().HTTPError)
    if split is None:
        raise UserError(
            f"source {path} does not exist here; for a dataset on the Hub, name its split as well"
        )
    if not datasets.config.HF_HUB_OFFLINE:  # HF_DATASETS_OFFLINE sets it, too
        check_hub(f"source {path}", dataset=path)
    options = {} if revision is None else {"revision": revision}
    try:
        records = iter(datasets.load_dataset(path, name, split=split, streaming=True, **options))
        record = next(records, ...)
    except hub_errors as error:
        raise UserError(
            f"source {path} is not a local file, and cannot be read from the Hub: {first_line(error)}"
        ) from error
    place = f"{path} ({name}, {split})" if name else f"{path} ({split})"
    number = 1
    while record is not ...:
        yield f"{place}, record {number}", record
        try:
            record, number = next(records, ...), number + 1
        except hub_errors as error:
            raise UserError(
                f"{place}, after record {number}: the rest cannot be read ({first_line(error)}): run the "
                "command again, or download the dataset and name its files"
            ) from error


def _first_character(path: Path) -> bytes:
    """Return the first character of a file that is not white space."""
    with open_text(path) as file:
        while chunk := file.read(4096):
            if text := chunk.lstrip():
                return text[:1]
    return b""


def _may_contain_key(path: Path, array_key: str | None) -> bool:
    """Return whether the first object of a file has the key or spans several lines.

    An object over several lines is not a line of JSON lines, so the search stops at its second line.
    """
    with open_text(path) as file:
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

    check_content(path)
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_column_names(path, file.schema_arrow.names)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group]):
                    for row in _batch_rows(batch):
                        number += 1
                        yield f"{path}, row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{path}, after row {number}: not parquet ({first_line(error)})") from error


def _check_column_names(path: Path, names: list[str]) -> None:
    """Refuse two columns of one name, of which Python would keep the second."""
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        raise UserError(f"source {path} has the column {repeated[0]!r} twice: rename one of them")


def _batch_rows(batch: Any) -> list[Any]:
    """Return the rows of an Arrow record batch. A row that Python cannot represent becomes a RecordError."""
    try:
        rows: list[Any] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # a text is not UTF-8, or a time is out of range
        if batch.num_rows == 1:
            return [RecordError(f"the row cannot be read: {error}")]
        return [row for i in range(batch.num_rows) for row in _batch_rows(batch.slice(i, 1))]
    return rows


def _array_elements(path: Path, stream: JsonStream) -> Iterator[PlacedRecord]:
    stream.expect("[")
    while stream.peek() != "]":
        place, value = f"{path}, line {stream.line}", stream.read_value()
        if stream.repeated_key is not None:
            value = RecordError(repeated_key_problem(stream.repeated_key))
        yield place, value
        if stream.peek() != "]":
            stream.expect(",")
            if stream.peek() == "]":
                stream.fail("a record is missing after a comma")
    stream.expect("]")


def _elements_under_key(
    path: Path, stream: JsonStream, array_key: str, on_field: Callable[[str, Any], None] | None
) -> Iterator[PlacedRecord]:
    has_key = False
    for key in _object_keys(stream):
        if key == array_key:
            if has_key:
                stream.fail(repeated_key_problem(array_key))
            has_key = True
            yield from _array_elements(path, stream)
        else:
            value = stream.read_value()
            if on_field:
                on_field(key, value)
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


def _parse_line(line: bytes, decoder: RecordDecoder) -> Any:
    try:
        return decoder.decode_text(line)
    except JsonError as error:
        return RecordError(str(error))
