"""Files and texts that users name are checked before they are used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockft import inputs
from blockft.data.json_stream import JsonError, decode_json
from blockft.errors import UserError
from blockft.inputs import missing_path, parse_json, shorten_paths


@pytest.mark.parametrize("read", [lambda text: parse_json(text, "x"), decode_json])
def test_a_key_that_occurs_twice_is_named_also_in_a_very_large_object(read: Callable[[str], Any]) -> None:
    # a search that compares every key with every other one takes minutes here
    keys = json.dumps(dict.fromkeys(f"k{i}" for i in range(50_000)))
    with pytest.raises((UserError, JsonError), match="the key 'k49999' occurs twice"):
        read(f'{keys[:-1]}, "k49999": null}}')


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/a.json", "/data/b.json"], ["a.json", "b.json"]),
        (["/x/a/d.json", "/x/b/d.json"], ["a/d.json", "b/d.json"]),
        (["owner/name", "other/name"], ["owner/name", "other/name"]),
        (["/a.json", "/a.json"], ["a.json", "a.json"]),
        (["/a.json", "a.json"], ["/a.json", "a.json"]),
        (["data/*.json"], ["*.json"]),
    ],
)
def test_paths_are_as_short_as_they_differ(paths: list[str], names: list[str]) -> None:
    assert shorten_paths(paths) == names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("trian.jsonl", "train.jsonl"),
        ("train.json", "train.jsonl"),
        ("Train.jsonl", "train.jsonl"),
        ("heldout.jsonl", None),  # only the ending is that of the others
        ("x.jsonl", None),
        ("traim.md", "train.md"),
        ("x" * 100_000, None),
    ],
)
def test_a_message_about_a_missing_file_names_one_that_is_similar(
    name: str, meant: str | None, tmp_path: Path
) -> None:
    for file in ("train.jsonl", "train.md", ".trian.jsonl", "questions.jsonl"):
        (tmp_path / file).touch()
    expected = f"missing; did you mean {tmp_path}/{meant}?" if meant else "missing"
    assert missing_path(tmp_path / name, "missing") == expected
    assert missing_path(tmp_path / "no" / "such" / "train.jsonl", "missing") == "missing"


def test_no_similar_file_is_looked_for_in_a_folder_of_very_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are compared one by one, which takes minutes for a million."""
    monkeypatch.setattr(inputs, "MAX_SIMILAR", 3)
    for number in range(4):
        missing = missing_path(tmp_path / "tran.jsonl", "missing")
        assert missing == (f"missing; did you mean {tmp_path}/train.jsonl?" if number else "missing")
        (tmp_path / ("train.jsonl" if number == 0 else f"{number}")).touch()
    assert missing_path(tmp_path / "tran.jsonl", "missing") == "missing"
