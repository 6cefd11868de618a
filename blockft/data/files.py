"""Files of a source: resolve a path, glob or folder, and open files of text that may be compressed."""

import codecs
import glob
import gzip
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from blockft.errors import UserError
from blockft.file_content import HEAD_BYTES, content_problem
from blockft.inputs import missing_path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""The id of a dataset on the Hub: owner/name."""

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""First bytes of a file of zstd that begins with a frame of other data, as parallel programs write it."""

READ_BYTES = 1 << 20
"""Number of bytes of a compressed file that are unpacked at a time."""

COMPRESSION_SUFFIXES = (".gz", ".zst")
"""Ends of the names of compressed files."""

RECORD_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv")
"""Ends of the names of files that can be read, compressed or not."""

UNSUPPORTED_MAGIC = {
    codecs.BOM_UTF16_LE: "is UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16: save it as UTF-8",
    b"PAR1": "is parquet: let its name end in .parquet",
    b"PK\x03\x04": "is compressed: unpack it first",
    b"BZh": "is compressed: unpack it first",
    b"\xfd7zXZ": "is compressed: unpack it first",
    b"ARROW1": "is an Arrow file: save it as parquet or JSON lines",
}
"""First bytes of files that are not JSON in UTF-8, with the rest of the error message."""


def find_files(path: str, suffixes: Sequence[str], *, kind: str = "source") -> list[Path]:
    """Return the files of a source, sorted. The list is empty if `path` is a dataset id on the Hub.

    `path` is a file, a folder, a glob or a Hub id. In a folder, files count that end in one of `suffixes`,
    with or without `.gz` or `.zst`, but no hidden ones, such as the `._a.json` of macOS. Of files that differ
    only in their compression, one is read: the unpacked one, otherwise the one that ends in `.gz`.

    kind: what errors call the files. Only a source may be a dataset on the Hub.

    Raises:
        UserError: nothing exists at `path`.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        visible = (file for file in root.iterdir() if not file.name.startswith("."))
        files = [file for file in visible if record_suffix(file) in suffixes]
        chosen: dict[Path, Path] = {}
        for file in sorted(files):  # a.json stands before a.json.gz, which stands before a.json.zst
            chosen.setdefault(without_compression_suffix(file), file)
        if not files:
            raise UserError(f"{kind} folder {path} holds no file that ends in {' or '.join(suffixes)}")
        return sorted(chosen.values())
    if matches := [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]:
        return matches
    if kind != "source":
        message = f"{kind} {path} does not exist: no file, folder or match of a glob"
        raise UserError(missing_path(path, message))
    if HUB_ID.fullmatch(path) and record_suffix(root) not in RECORD_SUFFIXES:
        return []
    message = f"source {path} does not exist: no file, folder, match of a glob, or id on the Hub (owner/name)"
    raise UserError(missing_path(path, message))


def without_compression_suffix(path: Path) -> Path:
    """Return the path without `.gz` or `.zst` at its end."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSION_SUFFIXES else path


def record_suffix(path: Path) -> str:
    """Return the end of a file's name that says what it holds, in lower case: `.csv` of `A.CSV.gz`."""
    return without_compression_suffix(path).suffix.lower()


def open_text(path: Path) -> BinaryIO:
    """Open a file of text in UTF-8 for reading, after its byte order mark. A compressed file is unpacked.

    The content decides whether a file is compressed with gzip or zstd, not its name.

    Raises:
        UserError: the first bytes show that the file is no text in UTF-8.
    """
    with path.open("rb") as raw:
        magic = raw.read(len(ZSTD_MAGIC))
    with _open_unpacked(path, magic) as file:
        head = file.read(HEAD_BYTES)
    by_magic = (problem for magic, problem in UNSUPPORTED_MAGIC.items() if head.startswith(magic))
    if problem := next(by_magic, None) or content_problem(head):
        raise UserError(f"source {path} {problem}")
    file = _open_unpacked(path, magic)
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def _open_unpacked(path: Path, magic: bytes) -> BinaryIO:
    if magic.startswith(GZIP_MAGIC):
        return cast(BinaryIO, gzip.GzipFile(path))
    if magic == ZSTD_MAGIC or ZSTD_SKIPPABLE.fullmatch(magic):
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(path), READ_BYTES))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """The unpacked content of a file that is compressed with zstd. A truncated file raises an OSError."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._stream = pa.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()
