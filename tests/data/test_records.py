import json
from pathlib import Path

import pytest

from blockft.data import records
from blockft.data.records import find_files, read_array, read_hub, read_lines
from blockft.data.sample import RecordError
from blockft.errors import UserError

RECORDS = [
    {"text": 'é "quoted" \\ ] , } \U0001f98a', "n": [1, {"a": None}]},
    {},
    {"text": "x" * 300, "t": True},
]


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_through_a_small_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, indent: int | None
) -> None:
    monkeypatch.setattr(records, "READ_BYTES", read_bytes)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, ensure_ascii=False, indent=indent), encoding="utf-8")
    assert [record for _, record in read_array(path)] == RECORDS


def test_records_of_an_array_are_placed_by_the_line_they_start_at(tmp_path: Path) -> None:
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


def test_what_stands_before_a_break_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a" 3}' + ", {}" * 1000)
    found = read_array(path)
    assert [next(found)[1], next(found)[1]] == [{"a": 1}, {"a": 2}]


def test_an_array_that_is_not_utf_8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1},\n{"a": "\xe9"}]')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        list(read_array(path))


def test_lines_are_placed_and_broken_ones_say_why(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n"\xe9"\n')
    placed = list(read_lines(path))
    assert placed[0] == (f"{path}, line 1", {"a": 1})
    assert [at for at, _ in placed] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert all(isinstance(record, RecordError) for _, record in placed[1:])


def test_files_are_found_by_name_glob_and_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "manifest.json"):
        (tmp_path / name).touch()
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert find_files(str(tmp_path), ".jsonl") == both
    assert find_files(str(tmp_path / "*.jsonl"), ".jsonl") == both
    assert find_files(str(both[0]), ".jsonl") == both[:1]
    assert find_files("owner/name", ".jsonl") == []
    for missing in (str(tmp_path / "none"), "data/none.jsonl", "none-*"):
        with pytest.raises(UserError, match="does not exist"):
            find_files(missing, ".jsonl")


def test_a_data_set_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(UserError, match="owner/name") as raised:
        list(read_hub("owner/name", "train"))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="split"):
        list(read_hub("owner/name", None))
