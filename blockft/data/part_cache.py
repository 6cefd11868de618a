"""The part cache of `prepare`: what each source contributes, in shards, so that no finished work is repeated.

A part is a folder, named by a key: a digest of everything that decides its content. ::

    read-KEY.partial/   a part that is being written: complete shards, and perhaps the files of the next one
    read-KEY/           a complete part

    00000.json          written last of a shard: the digests of its files and its state, a JSON object
    complete.json       written last of a part: the number of shards and the state of the part

A shard without its JSON file does not count, so an interrupted part is continued after its last complete
shard. Damaged shards and those after them are written again.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockft.digest import (
    DamagedFile,
    FileDigest,
    digest_files,
    digest_json,
    dump_with_digest,
    files_to_record,
    parse_files,
    read_with_digest,
    verify_files,
)
from blockft.errors import notify
from blockft.outputs import write_atomic

VERSION = 1
"""Version of the format of parts; it is a part of every key."""

PARTIAL = ".partial"
COMPLETE = "complete.json"

_PART = re.compile(rf"(read|encode)-[0-9a-f]{{64}}({re.escape(PARTIAL)})?")
_OWN_FILE = re.compile(r"\.?((complete|\d{5,})\.json(\.[0-9a-f]+\.draft)?|\d{5,}\.\w+|samples-\d{5,}\.jsonl)")
"""Names of the files that `prepare` writes into a part."""


def part_name(kind: str, options: Mapping[str, Any]) -> str:
    """Return the name of a part.

    kind: "read" or "encode".
    options: everything that decides the content of the part, as JSON.
    """
    assert kind in ("read", "encode")
    return f"{kind}-{digest_json({'part version': VERSION, **options})}"


@dataclass(frozen=True)
class Shard:
    """A complete shard of a part: the digests of its files, and what its writer noted."""

    files: Mapping[str, FileDigest]
    state: Mapping[str, Any]


class Part:
    """One part of a cache, opened by its writer. Its content is verified here; see `part_name` for `name`."""

    def __init__(self, cache: Path, name: str) -> None:
        self.name = name
        self._complete_folder = cache / name
        self._partial_folder = cache / f"{name}{PARTIAL}"
        self.shards: list[Shard] = []
        self.state: dict[str, Any] = {}
        self.is_complete = self._complete_folder.is_dir()
        if not self.is_complete and not self._partial_folder.is_dir():
            return
        problem = self._load()
        if problem:
            where = f"after {len(self.shards)} of its shards" if self.shards else "as a whole"
            notify(f"{self.folder} is damaged ({problem}): it is written again {where}")
            if self.is_complete:
                remove_part(self._partial_folder)
                self._complete_folder.rename(self._partial_folder)
                self.is_complete = False
        if not self.is_complete:
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Remove the files that belong to no complete shard.

        If they were opened and written again, prepared folders that share them by hard links would change.
        """
        kept = {name for shard in self.shards for name in shard.files}
        kept |= {_marker(number) for number in range(len(self.shards))}
        for path in self.folder.rglob("*"):
            if _OWN_FILE.fullmatch(path.name) and path.relative_to(self.folder).as_posix() not in kept:
                path.unlink()

    @property
    def folder(self) -> Path:
        """Where the part is now."""
        return self._complete_folder if self.is_complete else self._partial_folder

    def start(self) -> None:
        """Create the folder of a part that is not complete."""
        self._partial_folder.mkdir(parents=True, exist_ok=True)

    def add_shard(self, files: Iterable[str], state: Mapping[str, Any]) -> None:
        """Complete the next shard, whose files are in the folder."""
        assert not self.is_complete
        shard = Shard(digest_files(self.folder, files), dict(state))
        record = {"part": self.name, "number": len(self.shards)}
        record |= {"files": files_to_record(shard.files), "state": shard.state}
        write_atomic(self.folder / _marker(len(self.shards)), dump_with_digest(record))
        self.shards.append(shard)

    def finish(self, state: Mapping[str, Any]) -> None:
        """Complete the part: no shard follows."""
        assert not self.is_complete
        self.start()
        self.state = dict(state)
        record = {"part": self.name, "shards": len(self.shards), "state": self.state}
        write_atomic(self.folder / COMPLETE, dump_with_digest(record))
        self._partial_folder.rename(self._complete_folder)
        self.is_complete = True

    def _load(self) -> str:
        """Read the shards up to the first damaged one; return what is damaged, or ""."""
        try:
            for number in range(self._count_markers()):
                self.shards.append(self._load_shard(number))
            if self.is_complete:
                record = read_with_digest(self.folder / COMPLETE)
                if record["part"] != self.name:
                    return f"{COMPLETE} belongs to another part"
                if record["shards"] != len(self.shards):
                    return f"it has {len(self.shards)} of its {record['shards']} shards"
                self.state = record["state"]
        except (DamagedFile, KeyError) as error:
            return str(error)
        return ""

    def _load_shard(self, number: int) -> Shard:
        record = read_with_digest(self.folder / _marker(number))
        if record["part"] != self.name or record["number"] != number:
            raise DamagedFile(f"{_marker(number)} belongs to another part")
        shard = Shard(parse_files(record["files"]), record["state"])
        verify_files(self.folder, shard.files)
        return shard

    def _count_markers(self) -> int:
        numbers = [int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal()]
        return max(numbers, default=-1) + 1


def remove_part(folder: Path) -> None:
    """Remove the files of a part, and its folders if nothing else is in them."""
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif _OWN_FILE.fullmatch(path.name):
                path.unlink()
    with suppress(OSError):
        folder.rmdir()


def remove_other_parts(cache: Path, used: Collection[str]) -> None:
    """Remove the parts of a cache whose names are not in `used`; other files stay."""
    for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
        if _PART.fullmatch(folder.name) and folder.name not in used and not folder.is_symlink():
            remove_part(folder)


def remove_empty_parts(cache: Path) -> None:
    """Remove the parts of a cache that have no complete shard."""
    for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
        if _PART.fullmatch(folder.name) and not (folder / _marker(0)).exists():
            remove_part(folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())


def _marker(number: int) -> str:
    return f"{number:05}.json"
