"""Damage a file or a folder at a seeded random place: what disks, networks and people do to stored files."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Damage:
    """A damage that was done to a copy of a folder. The text names the file for a failing test."""

    text: str


def _flip_bit(rng: random.Random, path: Path, _: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _zero_range(rng: random.Random, path: Path, _: Path) -> bytes:
    content = bytearray(path.read_bytes())
    length = rng.randint(1, min(400, len(content)))
    start = rng.randint(0, len(content) - length)
    content[start : start + length] = bytes(length)
    return bytes(content)


def _truncate(rng: random.Random, path: Path, _: Path) -> bytes:
    content = path.read_bytes()
    return content[: rng.choice([0, len(content) - 1, rng.randrange(len(content))])]


def _append(rng: random.Random, path: Path, _: Path) -> bytes:
    return path.read_bytes() + rng.choice([b"\n", b"\0" * 8, path.read_bytes()])


def _swap(rng: random.Random, path: Path, other: Path) -> bytes:
    return other.read_bytes()


def _move_bytes(rng: random.Random, path: Path, _: Path) -> bytes:
    content = path.read_bytes()
    start = rng.randrange(1, len(content)) if len(content) > 1 else 0
    return content[start:] + content[:start]


CHANGES: tuple[Callable[[random.Random, Path, Path], bytes], ...] = (
    *(_flip_bit,) * 4,
    *(_zero_range,) * 2,
    _truncate,
    _append,
    _swap,
    _move_bytes,
)
"""Changes of a file's content; flipped bits are the most frequent."""


def damage_file(rng: random.Random, folder: Path, name: str, other: str) -> Damage:
    """Damage one file of a folder; `other` is a file that may be put in its place."""
    path = folder / name
    if rng.random() < 0.1:
        path.unlink()
        kind = rng.choice(["removed", "replaced by a folder", "replaced by a loop of links"])
        if kind == "replaced by a folder":
            path.mkdir()
        elif kind != "removed":
            path.symlink_to(path.name)
        return Damage(f"{name} {kind}")
    before = path.read_bytes()
    while True:
        change = rng.choice(CHANGES) if before else _append
        after = change(rng, path, folder / other)
        if after != before:
            path.write_bytes(after)
            return Damage(f"{name} {change.__name__.strip('_')}")


def restore(folder: Path, original: Path) -> None:
    """Make a folder equal to the original again."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder, symlinks=True)
