"""Tables in text files: read CSV and TSV row by row, with the line of each row."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from blockft.data.files import open_text, record_suffix
from blockft.data.sample import RecordError
from blockft.errors import UserError
from blockft.inputs import shorten

TABLE_SUFFIXES = (".csv", ".tsv")
"""Ends of the names of tables, with or without the suffix of a compression."""

MAX_CELL_CHARACTERS = 1 << 30
"""Longest text of a cell."""

_DELIMITER_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def read_table(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place of each row, and the row as a record: the names of the header, and the cells as texts.

    Cells of a file that ends in `.csv` stand between commas, cells of a `.tsv` file between tabs. A cell in
    double quotes may hold delimiters and new lines, and two quotes for one. An empty cell is null. Blank
    lines and rows of empty cells are skipped. Columns without a name, such as the index that pandas writes,
    are left out. A row with another number of cells than the header becomes a RecordError.

    Raises:
        UserError: the header is missing, has a name twice or has another delimiter; the file is not UTF-8; a
            quote is not closed.
    """
    delimiter = "\t" if record_suffix(path) == ".tsv" else ","
    csv.field_size_limit(MAX_CELL_CHARACTERS)  # the default of 131,072 is less than some documents have
    with open_text(path) as file:
        rows = _placed_rows(path, file, delimiter)
        _, header = next(rows, (0, []))
        names = _check_header(path, header, delimiter)
        for line, cells in rows:
            yield f"{path}, line {line}", _record(names, cells)


def _placed_rows(path: Path, file: BinaryIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line of each row that is not blank, and its cells."""
    reader = csv.reader(_decoded_lines(path, file), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line}: not a row of cells between {_DELIMITER_NAMES[delimiter]} ({error}): write "
            "a cell that holds quotes, delimiters or new lines in double quotes, and its own quotes twice"
        ) from error


def _decoded_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 (byte {error.start + 1}): save the table as UTF-8"
            ) from error


def _check_header(path: Path, header: list[str], delimiter: str) -> list[str]:
    """Return the names of the columns, without white space around them.

    Raises:
        UserError: there is none, a name occurs twice, the names stand between other delimiters, or the line
            belongs to no table.
    """
    names = [name.strip() for name in header]
    if not any(names):
        raise UserError(f"source {path} has no header: the first line of a table names its columns")
    if names[0].startswith("sep="):
        raise UserError(f"source {path} begins with the line {names[0]!r} of Excel: remove this line")
    if names[0].startswith(('{"', '[{"')):
        raise UserError(
            f"source {path} is no table, its first line looks like JSON: let its name end in .jsonl or .json"
        )
    repeated = [name for name, number in Counter(names).items() if name and number > 1]
    if repeated:
        raise UserError(
            f"source {path} has the column {shorten(repeated[0], 60)!r} twice in its header: "
            "rename one of them"
        )
    others = [other for other in _DELIMITER_NAMES if other != delimiter and other in header[0]]
    if len(header) == 1 and others:
        remedy = (
            "let its name end in .tsv" if others[0] == "\t" else "save it with commas, or with tabs as .tsv"
        )
        raise UserError(
            f"source {path} has one column {shorten(header[0], 60)!r}, so its cells seem to stand between "
            f"{_DELIMITER_NAMES[others[0]]}, not {_DELIMITER_NAMES[delimiter]}: {remedy}"
        )
    return names


def _record(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return RecordError(f"the row has {len(cells)} cells, it should have {len(names)} as the header has")
    return {name: cell or None for name, cell in zip(names, cells, strict=True) if name}
