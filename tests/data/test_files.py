"""Which files a source path names."""

from pathlib import Path

import pytest

from blockft.data.files import find_files
from blockft.errors import UserError


def test_files_are_found_by_name_glob_and_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "manifest.json"):
        (tmp_path / name).touch()
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert find_files(str(tmp_path), (".jsonl",)) == both
    assert find_files(str(tmp_path / "*.jsonl"), (".jsonl",)) == both
    assert find_files(str(both[0]), (".jsonl",)) == both[:1]
    assert find_files("owner/name", (".jsonl",)) == []
    for missing in (str(tmp_path / "none"), "data/none.jsonl", "none-*"):
        with pytest.raises(UserError, match="does not exist"):
            find_files(missing, (".jsonl",))


def test_a_folder_may_hold_several_kinds_of_files(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.json", "README.md"):
        (tmp_path / name).touch()
    both = [tmp_path / "a.parquet", tmp_path / "b.json"]
    assert find_files(str(tmp_path), (".json", ".parquet")) == both
    with pytest.raises(UserError, match=r"\.jsonl or \.csv"):
        find_files(str(tmp_path), (".jsonl", ".csv"))


def test_gzipped_files_are_found_once(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz", "c.txt.gz"):
        (tmp_path / name).touch()
    assert find_files(str(tmp_path), (".jsonl",)) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    assert len(find_files(f"{tmp_path}/*.jsonl*", (".jsonl",))) == 3
    with pytest.raises(UserError, match="does not exist"):
        find_files("data/none.jsonl.gz", (".jsonl",))
