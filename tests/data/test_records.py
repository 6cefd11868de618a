import bz2
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockft.data import json_stream, records
from blockft.data.records import read_array, read_file, read_hub, read_lines
from blockft.data.sample import RecordError
from blockft.errors import UserError
from tests.pointers import LFS_POINTER, WEB_PAGE

RECORDS = [
    {"text": 'é "quoted" \\ ] , } \U0001f98a', "n": [1, {"a": None}]},
    {},
    {"text": "x" * 300, "t": True},
]


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_with_any_size_of_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_stream, "READ_BYTES", read_bytes)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, ensure_ascii=False, indent=indent), encoding="utf-8")
    assert [record for _, record in read_array(path)] == RECORDS
    wrapped = {"version": 1.25, "data": RECORDS, "n": 12, "empty": {}}
    path.write_text(json.dumps(wrapped, ensure_ascii=False, indent=indent), encoding="utf-8")
    assert [record for _, record in read_array(path, array_key="data")] == RECORDS


@pytest.mark.parametrize(
    "text", ['{"date": []}', "{}", "[]", '{"data": {}}', '{"data": [], 1', '{"data" []}']
)
def test_an_object_without_the_array_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}, line 1: "):
        list(read_array(path, array_key="data"))


def test_the_content_of_a_file_decides_how_it_is_read(tmp_path: Path) -> None:
    lines = [{"a": 1}, {"a": [2]}]
    texts = {
        "array.json": json.dumps(lines),
        "lines.json": "\n".join(map(json.dumps, lines)),
        "lines.txt": "\n \n" + "\n".join(map(json.dumps, lines)),
        "object.json": json.dumps({"a": 0, "data": lines}),
        "empty.json": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name in ("array.json", "lines.json", "lines.txt"):
        assert [record for _, record in read_file(tmp_path / name)] == lines
    assert [record for _, record in read_file(tmp_path / "object.json", array_key="data")] == lines
    assert list(read_file(tmp_path / "empty.json")) == []
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        list(read_file(tmp_path / "none.json"))


def test_a_key_that_occurs_twice_makes_a_record_bad(tmp_path: Path) -> None:
    for text, read in (
        ('{"a": 1}\n{"b": [{"a": 1, "a": 2}]}\n{"a": 3}', read_lines),
        ('[{"a": 1}, {"b": [{"a": 1, "a": 2}]}, {"a": 3}]', read_array),
    ):
        path = tmp_path / "a.json"
        path.write_text(text)
        first, (_, bad), last = read(path)
        assert (first[1], last[1]) == ({"a": 1}, {"a": 3})
        assert isinstance(bad, RecordError) and "the key 'a' occurs twice" in str(bad)
    path.write_text('{"data": [{"a": 1}], "data": [{"a": 2}]}')
    with pytest.raises(UserError, match="the key 'data' occurs twice"):
        list(read_file(path, array_key="data"))


def test_a_row_that_is_not_utf_8_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    texts = [b"a", b"\xff", b"c"]
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in range(4)))
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"".join(texts))])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": column}), path)
    (_, first), (place, bad), (_, last) = read_file(path)
    assert (first, last) == ({"a": "a"}, {"a": "c"})
    assert isinstance(bad, RecordError) and place.endswith("row 2")


@pytest.mark.parametrize(
    ("content", "message"),
    [(LFS_POINTER, "is a Git LFS pointer: fetch"), (WEB_PAGE, "is a web page"), (b"", "is empty: fetch")],
)
def test_a_file_in_place_of_parquet_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} {message}"):
        list(read_file(path))


def test_parquet_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": n, "who": {"name": [str(n)]}} for n in range(7)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    monkeypatch.setattr(records, "PARQUET_ROWS", 2)
    assert list(read_file(path)) == [(f"{path}, row {n}", row) for n, row in enumerate(rows, start=1)]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}, after row 0: not parquet"):
        list(read_file(path))


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["a", "a"]), path)
    with pytest.raises(UserError, match=f"^source {path} has the column 'a' twice: rename one of them$"):
        list(read_file(path))


def test_the_place_of_a_record_in_an_array_is_the_line_where_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a":\n1},\n\n{"a": 2}, {"a": 3}]\n')
    assert [at for at, _ in read_array(path)] == [f"{path}, line {n}" for n in (1, 4, 4)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"a": 1},\n{"a": },\n{"a": 3}]', 2),
        ('[{"a": 1},\n{"a": "\n"}]', 2),
        ('[{"a": 1}\n{"a": 2}]', 2),
        ('[{"a": 1},\n\n{"a": 2', 3),
        ('[{"a": 1},\n]', 2),
        ('{"a": 1}', 1),
        ("", 1),
        ("[]\n[]", 2),
    ],
)
def test_a_broken_array_names_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}, line {line}: "):
        list(read_array(path))


def test_records_before_broken_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a" 3}' + ", {}" * 1000)
    found = read_array(path)
    assert [next(found)[1], next(found)[1]] == [{"a": 1}, {"a": 2}]


def counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many characters are copied while an array is read."""
    copied = 0

    class Text(str):
        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            nonlocal copied
            found = super().__getitem__(key)
            copied += len(found)
            return found

    more = json_stream.JsonStream._read_more

    def more_of_it(self: json_stream.JsonStream, num_bytes: int) -> None:
        more(self, num_bytes)
        self._text = Text(self._text)

    monkeypatch.setattr(json_stream.JsonStream, "_read_more", more_of_it)
    assert sum(1 for _ in read_array(path)) == 2000
    return copied


def test_reading_an_array_is_linear_in_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": "x" * 100_000}, *([{"a": "y"}] * 1999)]))
    assert counted(path, monkeypatch) < path.stat().st_size


@pytest.mark.parametrize(
    ("text", "why"), [("[" * 100_000, "nested too deeply"), ("9" * 5000, "too many digits")]
)
def test_json_that_cannot_be_decoded_is_a_bad_line_or_a_short_error(
    tmp_path: Path, text: str, why: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'{{"a": 1}}\n{{"a": {text}\n{{"a": {text}}}')
    (_, first), _, (at, last) = read_lines(path)
    assert first == {"a": 1} and at == f"{path}, line 3"
    assert isinstance(last, RecordError) and why in str(last)
    path.write_text(f'[{{"a": 1}},\n{{"a": {text}}}]')
    with pytest.raises(UserError, match=f"{path}, line 2: .*{why}") as raised:
        list(read_array(path))
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("read_bytes", [1, 1 << 20])
def test_a_byte_order_mark_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(json_stream, "READ_BYTES", read_bytes)
    for text in ('[{"a": 1}]', '{"a": 1}\n', '{"data": [{"a": 1}]}'):
        (tmp_path / "a.json").write_text(text, encoding="utf-8-sig")
        found = read_file(tmp_path / "a.json", array_key="data")
        assert list(found) == [(f"{tmp_path / 'a.json'}, line 1", {"a": 1})]


def test_json_lines_are_distinguished_from_one_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n{"a": {"data": 1}}\n{"a": 2}\n')
    assert [record for _, record in read_file(path, array_key="data")] == [{"a": {"data": 1}}, {"a": 2}]
    path.write_text('{\n"a": 1}')
    with pytest.raises(UserError, match="no list 'data'"):
        list(read_file(path, array_key="data"))


def test_an_array_that_is_not_utf_8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1},\n{"a": "\xe9"}]')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        list(read_array(path))


def test_lines_have_places_and_broken_lines_have_reasons(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n"\xe9"\n')
    placed = list(read_lines(path))
    assert placed[0] == (f"{path}, line 1", {"a": 1})
    assert [at for at, _ in placed] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert all(isinstance(record, RecordError) for _, record in placed[1:])


def test_a_dataset_on_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: calls.append((a, k)) or iter([{"a": 1}]))
    assert list(read_hub("owner/name", "train", "hard")) == [("owner/name (hard, train), record 1", {"a": 1})]
    assert calls == [(("owner/name", "hard"), {"split": "train", "streaming": True})]


def test_a_dataset_that_breaks_off_is_an_error_that_names_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def records(*_: Any, **__: Any) -> Iterator[Any]:
        yield {"a": 1}
        raise datasets.exceptions.DatasetGenerationError("lost\nconnection")

    monkeypatch.setattr("datasets.load_dataset", records)
    found = read_hub("owner/name", "train")
    assert next(found)[1] == {"a": 1}
    with pytest.raises(UserError, match=r"owner/name \(train\), after record 1: .*\(lost\)"):
        next(found)


def test_spreadsheets_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"a\.xlsx is a spreadsheet: save it as"):
        list(read_file(tmp_path / "a.xlsx"))


def test_a_dataset_that_cannot_be_reached_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match="owner/name") as raised:
        list(read_hub("owner/name", "train"))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="split"):
        list(read_hub("owner/name", None))


@pytest.mark.parametrize("text", ['[{"a": 1}]', '\n{"a": 1}\n', '{"data": [{"a": 1}]}'])
def test_gzipped_files_are_read_by_their_content(tmp_path: Path, text: str) -> None:
    for name in ("a.json.gz", "a.json"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode("utf-8-sig")))
        assert [record for _, record in read_file(tmp_path / name, array_key="data")] == [{"a": 1}]


@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda data: data[:12] + b"x" * 9 + data[21:]])
def test_damaged_gzip_is_a_user_error(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(spoil(gzip.compress(b'{"a": 1}\n' * 9)))
    with pytest.raises(UserError, match=f"source {path} cannot be read: "):
        list(read_file(path))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ('{"a": 1}\n'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (gzip.compress('[{"a": 1}]'.encode("utf-16")), "is UTF-16"),
        (bz2.compress(b'{"a": 1}\n'), "is compressed: unpack it first"),
        (b"PAR1...", "is parquet: let its name end in .parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"ARROW1\0\0", "is an Arrow file"),
    ],
    # fixed ids: gzip writes the time into its header
    ids=["utf-16", "gzipped utf-16", "bzip2", "parquet", "lfs", "html", "arrow"],
)
def test_the_error_names_the_kind_of_an_unsupported_file(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"source {path} {problem}"):
        list(read_file(path))


@pytest.mark.parametrize(
    "text", ['{\n "data": [\n{"a": 1}]}', '{"data": [{"a": 1},\n{"a": 2}]}', '{"a":\n1}']
)
def test_an_object_over_several_lines_is_not_reported_as_a_bad_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    for array_key in (None, "data"):
        with pytest.raises(UserError, match=r"a\.jsonl is an object over several lines, neither"):
            list(read_file(path, array_key))


@pytest.mark.parametrize("text", ['{"a":\n', '{"a": "x\n', '{"a": [1,\n', "{\n", '{"a": 1}}\n'])
def test_a_broken_first_line_is_a_bad_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text + '{"a": 2}\n{"a": 3}\n')
    (_, broken), *others = read_file(path)
    assert isinstance(broken, RecordError) and [record for _, record in others] == [{"a": 2}, {"a": 3}]
