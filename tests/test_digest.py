"""Digests depend on every byte of files and memory, and damage is found before the content is used."""

import hashlib
import json
import math
import os
import sys
from bisect import bisect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft import digest as digest_module
from blockft.digest import (
    DamagedFile,
    FileDigest,
    check_no_other_files,
    digest_buffers,
    digest_files,
    dump_with_digest,
    files_to_record,
    list_files,
    parse_files,
    read_with_digest,
    verify_files,
)


def digest_of(content: bytes) -> str:
    return digest_buffers({"content": (len(content), lambda start, end: content[start:end])})["content"]


def test_files_and_memory_of_the_same_content_have_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "CHUNK_BYTES", 10)
    monkeypatch.setattr(digest_module, "_PIECE_BYTES", 3)
    for size in (0, 1, 9, 10, 11, 20, 57):
        content = os.urandom(size)
        (tmp_path / "file").write_bytes(content)
        assert digest_files(tmp_path, ["file"]) == {"file": FileDigest(size, digest_of(content))}


def test_the_digest_is_the_documented_tree_of_sha_256() -> None:
    content = bytes(range(256)) * 2**17  # 32 MiB and so two chunks
    leaves = [hashlib.sha256(content[start : start + 2**24]).digest() for start in (0, 2**24)]
    assert (
        digest_of(content)
        == hashlib.sha256(b"blockft tree 33554432 16777216 " + b"".join(leaves)).hexdigest()
    )


def test_every_bit_and_the_order_of_chunks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_module, "CHUNK_BYTES", 4)
    content = bytes(range(12))
    flipped = [
        content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :] for i in range(12) for bit in range(8)
    ]
    others = [*flipped, content[4:8] + content[:4] + content[8:], content[:8], content + b"\0", b""]
    assert len({digest_of(other) for other in [content, *others]}) == 1 + len(others)


def test_a_file_that_was_verified_is_read_again_after_any_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    expected = digest_files(tmp_path, ["weights"])
    read: list[list[str]] = []

    def count(folder: Path, names: list[str]) -> dict[str, FileDigest]:
        read.append(names)
        return digest_files(folder, names)

    monkeypatch.setattr(digest_module, "digest_files", count)
    monkeypatch.setattr(digest_module, "_SETTLED_NS", 2**62)
    for _ in range(2):  # a file that is this new may change within the same time stamp
        verify_files(tmp_path, expected)
    assert read == [["weights"]] * 2
    monkeypatch.setattr(digest_module, "_SETTLED_NS", -(2**62))
    for _ in range(2):
        verify_files(tmp_path, expected)
    assert read[2:] == [["weights"], []]
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:  # the clock of the file system is coarse
        path.unlink()
        path.write_bytes(b"abd")
    with pytest.raises(DamagedFile, match="weights has changed"):
        verify_files(tmp_path, expected)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "folder": "not a regular file",
        "pipe": "not a regular file",
        "loop": "cannot be read",
        "none": "is missing",
        "a\0b": "cannot be read",
        "n" * 300: "cannot be read",
    }.items():
        with pytest.raises(DamagedFile, match=reason):
            digest_files(tmp_path, [name])


def test_files_that_were_added_are_found_and_hidden_ones_passed_over(tmp_path: Path) -> None:
    for name in ("a", ".hidden", "sub/.hidden", "sub/b", ".cache/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_files(tmp_path) == ["a", "sub/b"]
    check_no_other_files(["a", "sub/b"], ["a", "sub/b"])
    with pytest.raises(DamagedFile, match="sub/b was added"):
        check_no_other_files(["a", "sub/b"], ["a"])


def test_a_slow_verification_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"1" * 2_000_000)
    expected = digest_files(tmp_path, ["file"])
    monkeypatch.setattr(digest_module, "_REPORTED_S", 3600)
    verify_files(tmp_path, expected)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(digest_module, "_REPORTED_S", -1)
    verify_files(tmp_path, expected)
    assert capsys.readouterr().err.startswith(f"blockft: checked 2.0 MB of {tmp_path} in ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@given(record=st.dictionaries(st.text().filter(lambda key: key != "digest"), json_values, max_size=4))
def test_json_with_a_digest_is_read_as_it_was_written(
    record: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "record.json"
    path.write_text(dump_with_digest(record), encoding="utf-8")
    assert repr(read_with_digest(path)) == repr(json.loads(json.dumps(record)))


def test_every_byte_of_json_with_a_digest_counts(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    text = dump_with_digest({"step": 4, "loss": 0.5, "histogram": {1: 2, 10: 3}, "name": "é \udc80"}).encode()
    path.write_bytes(text)
    assert read_with_digest(path)["histogram"] == {"1": 2, "10": 3}
    damages = [text[:index] for index in range(len(text))]
    damages += [
        text[:i] + bytes([text[i] ^ 1 << bit]) + text[i + 1 :] for i in range(len(text)) for bit in range(8)
    ]
    damages += [text + b"\n", text.replace(b"  ", b"\t"), text.replace(b"0.5", b"5e-1"), b"\0" * len(text)]
    for damage in damages:
        path.write_bytes(damage)
        with pytest.raises(DamagedFile, match="record.json"):
            read_with_digest(path)


def can_decode(depth: int) -> bool:
    try:
        json.loads("[" * depth + "]" * depth)
    except RecursionError:
        return False
    return True


def test_json_that_is_nested_deeply_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    deepest = bisect(range(sys.getrecursionlimit()), False, key=lambda depth: not can_decode(depth)) - 1
    # around the limits of the decoder, and of the encoder, which takes long for such values
    for depth in range(deepest - 8, deepest + 3):
        path.write_text(f'{{"digest": "", "value": {"[" * depth}{"]" * depth}}}')
        with pytest.raises(DamagedFile, match="record.json"):
            read_with_digest(path)


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {"a": 1},
        {"a": {"bytes": "x", "digest": ""}},
        {"a": {"bytes": 1}},
        {"a": {"bytes": math.inf, "digest": ""}},
    ],
)
def test_a_list_of_files_of_another_form_is_refused(record: object) -> None:
    with pytest.raises(DamagedFile, match="malformed"):
        parse_files(record)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/../../b", "", "a\0b"])
def test_a_list_of_files_names_none_outside_of_its_folder(name: str) -> None:
    with pytest.raises(DamagedFile, match="outside"):
        parse_files(files_to_record({name: FileDigest(1, "abc")}))
