"""Parts of the cache of `prepare`: complete shards survive, damage is found, and foreign files stay."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockft.data.part_cache import (
    Part,
    link_or_copy,
    part_name,
    remove_empty_parts,
    remove_other_parts,
)

NAME = part_name("read", {"source": "a"})


def write_part(cache: Path, num_shards: int = 3, *, finish: bool = True) -> Part:
    part = Part(cache, NAME)
    part.start()
    for number in range(len(part.shards), num_shards):
        (part.folder / f"{number:05}.frames").write_bytes(bytes([number]) * 100)
        part.add_shard([f"{number:05}.frames"], {"samples": number})
    if finish:
        part.finish({"read": num_shards})
    return part


def files(part: Part) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in part.folder.iterdir()}


def test_a_key_depends_on_the_kind_and_on_every_option() -> None:
    options = [{"source": "a"}, {"source": "b"}, {"source": "a", "seed": 0}]
    names = {part_name(kind, given) for kind in ("read", "encode") for given in options}
    assert len(names) == 6


def test_a_complete_part_is_found_again(tmp_path: Path) -> None:
    written = write_part(tmp_path)
    found = Part(tmp_path, NAME)
    assert found.is_complete and found.state == {"read": 3} and found.shards == written.shards


def test_an_interrupted_part_continues_after_its_last_complete_shard(tmp_path: Path) -> None:
    expected = files(write_part(tmp_path / "whole"))
    interrupted = write_part(tmp_path, 2, finish=False)
    (interrupted.folder / "00002.frames").write_bytes(b"half")
    again = Part(tmp_path, NAME)
    assert not again.is_complete and len(again.shards) == 2 and again.folder.name.endswith(".partial")
    assert files(write_part(tmp_path)) == expected


@pytest.mark.parametrize(
    "name", ["00000.frames", "00001.frames", "00001.json", "00002.json", "complete.json"]
)
@pytest.mark.parametrize("damage", ["flip", "remove", "swap"])
@pytest.mark.parametrize("finish", [True, False])
def test_damaged_shards_are_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str, finish: bool
) -> None:
    expected = files(write_part(tmp_path / "whole"))
    part = write_part(tmp_path, finish=finish)
    path = part.folder / name
    if not path.exists():
        return
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:  # a valid file of another place
        path.write_bytes((part.folder / "00000.json").read_bytes() if name != "00000.json" else b"")
    again = Part(tmp_path, NAME)
    is_last_marker = damage == "remove" and name == "00002.json" and not finish
    assert not again.is_complete and len(again.shards) < 3 or name == "complete.json"
    assert ("is written again" in capsys.readouterr().err) is not is_last_marker
    assert files(write_part(tmp_path)) == expected


@pytest.mark.parametrize("finish", [True, False])
def test_a_part_that_is_written_again_changes_no_file_that_is_linked_to_it(
    tmp_path: Path, finish: bool
) -> None:
    part = write_part(tmp_path, finish=finish)
    link_or_copy(part.folder / "00001.frames", tmp_path / "prepared")
    before = (tmp_path / "prepared").stat()
    (part.folder / "00001.json").write_text("{}")
    write_part(tmp_path)
    after = (tmp_path / "prepared").stat()
    assert (after.st_mtime_ns, after.st_nlink) == (before.st_mtime_ns, 1)


def test_only_parts_that_are_not_used_are_removed(tmp_path: Path) -> None:
    part = write_part(tmp_path)
    other = Part(tmp_path, part_name("encode", {}))
    other.start()
    for name in ("notes.txt", "read-me/file", f"{other.folder.name}/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    remove_other_parts(tmp_path, {part.name})
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.txt"))
    assert left == [f"{other.folder.name}/mine.txt", "notes.txt"] and (tmp_path / "read-me/file").exists()
    assert part.folder.is_dir()
    remove_other_parts(tmp_path, set())
    assert not part.folder.exists()


def test_parts_without_a_complete_shard_are_removed(tmp_path: Path) -> None:
    part = write_part(tmp_path, 1, finish=False)
    for kind in ("encode", "read"):
        Part(tmp_path, part_name(kind, {"empty": True})).start()
    remove_empty_parts(tmp_path)
    assert list(tmp_path.iterdir()) == [part.folder]


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("text")
    link_or_copy(tmp_path / "a", tmp_path / "linked")
    assert (tmp_path / "linked").samefile(tmp_path / "a")

    def refuse(*_: object) -> Iterator[None]:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "text"
