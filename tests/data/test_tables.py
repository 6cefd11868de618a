import csv
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.data.files import RECORD_SUFFIXES, find_files
from blockft.data.records import read_file
from blockft.data.sample import RecordError
from blockft.errors import UserError


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path) -> list[Any]:
    return [record for _, record in read_file(path)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def test_rows_have_their_first_line_as_place(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", '\ufeffq,a\r\n"who,\r\n""he""?",fox\r\n\r\nwhat?,\r\n')
    assert list(read_file(path)) == [
        (f"{path}, line 2", {"q": 'who,\r\n"he"?', "a": "fox"}),
        (f"{path}, line 5", {"q": "what?", "a": None}),
    ]


CELLS = st.text(st.characters(codec="utf-8"))
HEADERS = st.lists(CELLS.map(str.strip), min_size=1, max_size=4, unique=True).filter(any)


def tables(names: list[str]) -> st.SearchStrategy[tuple[list[str], list[list[str]]]]:
    rows = st.lists(st.lists(CELLS, min_size=len(names), max_size=len(names)), max_size=4)
    return st.tuples(st.just(names), rows)


@given(HEADERS.flatmap(tables), st.sampled_from(["csv", "tsv"]))
def test_what_python_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, table: tuple[list[str], list[list[str]]], kind: str
) -> None:
    names, rows = table
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL)
    writer.writerows([names, *rows])
    path = write(tmp_path_factory.mktemp("t") / f"t.{kind}", text.getvalue())
    expected = [
        {name: cell or None for name, cell in zip(names, row, strict=True) if name}
        for row in rows
        if any(map(str.strip, row))
    ]
    if len(names) == 1 and set(names[0]) & set(",\t;|") or names[0].startswith(('{"', '[{"', "sep=")):
        return  # refused: other delimiters, JSON, or a line of Excel
    assert read(path) == expected


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_compressed_tables_are_read_by_their_content(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    for name in ("t.csv", "t.csv.gz", "t.csv.zst"):
        assert read(write(tmp_path / name, compress(b"q,a\n1,2\n"))) == [{"q": "1", "a": "2"}]


def test_a_ragged_row_is_a_bad_record_that_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", "q\ta\n1\t2\n3\n4\t5\t6\n7\t8\n")
    records = list(read_file(path))
    assert [place for place, _ in records] == [f"{path}, line {n}" for n in (2, 3, 4, 5)]
    assert [isinstance(record, RecordError) for _, record in records] == [False, True, True, False]
    assert str(records[1][1]) == "the row has 1 cells, it should have 2 as the header has"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "q,q\n1,2\n", "has the column 'q' twice in its header"),
        ("t.csv", "q, q \n1,2\n", "has the column 'q' twice in its header"),
        ("t.csv", "sep=;\nq;a\n1;2\n", "begins with the line 'sep=;' of Excel: remove this line"),
        ("t.csv", '{"q": "1", "a": "2"}\n', r"looks like JSON: let its name end in \.jsonl"),
        ("t.csv", "", "has no header"),
        ("t.csv", "\n\n", "has no header"),
        ("t.csv", "q;a\n1;2\n", "between semicolons, not commas: save it with commas"),
        ("t.csv", "q\ta\n1\t2\n", r"between tabs, not commas: let its name end in \.tsv"),
        ("t.tsv", "q,a\n1,2\n", "between commas, not tabs"),
        ("t.csv", 'q,a\n1,"2\n3,4\n', r"t\.csv, line 2: not a row of cells between commas"),
        ("t.csv", 'q,a\n1,"2"3\n', r"t\.csv, line 2: not a row"),
        ("t.csv", b"q,a\n1,2\n3,\xff\n", r"t\.csv, line 3: not UTF-8 \(byte 3\): save the table as UTF-8"),
        ("t.csv", "q,a\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(write(tmp_path / name, text))
    assert "\n" not in str(raised.value)


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    long = "word " * 60_000
    assert read(write(tmp_path / "t.csv", f"q,a\n{long},2\n")) == [{"q": long, "a": "2"}]


def test_columns_without_a_name_and_rows_of_empty_cells_are_left_out(tmp_path: Path) -> None:
    pandas_index = write(tmp_path / "t.csv", ",q\n0,who?\n")
    spreadsheet = write(tmp_path / "s.csv", ",,,\nq,a,,\n1,2,,\n,,,\n, ,,\n")
    assert read(pandas_index) == [{"q": "who?"}]
    assert read(spreadsheet) == [{"q": "1", "a": "2"}]


def test_endings_of_names_may_be_in_capitals(tmp_path: Path) -> None:
    write(tmp_path / "A.CSV", "q,a\n1,2\n")
    write(tmp_path / "B.TSV.GZ", gzip.compress(b"q\ta\n3\t4\n"))
    files = find_files(str(tmp_path), RECORD_SUFFIXES)
    assert [record for file in files for record in read(file)] == [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}]


def test_hidden_files_of_a_folder_are_not_read(tmp_path: Path) -> None:
    for name in ("a.csv", "._a.csv", ".a.jsonl"):
        (tmp_path / name).touch()
    assert find_files(str(tmp_path), RECORD_SUFFIXES) == [tmp_path / "a.csv"]


def test_of_equal_files_the_least_compressed_is_read(tmp_path: Path) -> None:
    for name in ("a.csv.zst", "a.csv.gz", "a.csv", "b.jsonl.zst", "b.jsonl.gz", "c.json.zst"):
        (tmp_path / name).touch()
    found = [file.name for file in find_files(str(tmp_path), RECORD_SUFFIXES)]
    assert found == ["a.csv", "b.jsonl.gz", "c.json.zst"]


@pytest.mark.parametrize("num_bytes", [1, 9, 30])
def test_truncated_zstd_is_a_user_error(tmp_path: Path, num_bytes: int) -> None:
    data = zstd(b"".join(b'{"a": %d}\n' % n for n in range(2000)))
    path = write(tmp_path / "a.jsonl.zst", data[:-num_bytes])
    with pytest.raises(UserError, match=f"source {path} cannot be read: Truncated"):
        read(path)


def test_zstd_of_several_frames_is_read(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x02\0\0\0ab"
    path = write(tmp_path / "a.jsonl", skippable + zstd(b'{"a": 1}\n') + zstd(b'{"a": 2}\n'))
    assert read(path) == [{"a": 1}, {"a": 2}]
