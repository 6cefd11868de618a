"""Files of a source: resolve a path, glob or folder, and open JSON files."""

import codecs
import glob
import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

from blockft.errors import UserError
from blockft.file_content import HEAD_BYTES, content_problem

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""The id of a dataset on the Hub: owner/name."""

GZIP_MAGIC = b"\x1f\x8b"

UNSUPPORTED_MAGIC = {
    codecs.BOM_UTF16_LE: "is UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16: save it as UTF-8",
    b"PAR1": "is parquet: let its name end in .parquet",
    b"PK\x03\x04": "is compressed: unpack it first",
    b"BZh": "is compressed: unpack it first",
    b"\xfd7zXZ": "is compressed: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed: unpack it first",
    b"ARROW1": "is an Arrow file: save it as parquet or JSON lines",
}
"""First bytes of files that are not JSON in UTF-8, with the rest of the error message."""


def find_files(path: str, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a source, sorted. The list is empty if `path` is a dataset id on the Hub.

    `path` is a file, a folder, a glob or a Hub id. In a folder, files count that end in one of `suffixes`,
    with or without `.gz`. A gzipped file is skipped if the unpacked file is in the same folder.

    Raises:
        UserError: nothing exists at `path`.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        files = [file for file in sorted(root.iterdir()) if without_gzip_suffix(file).suffix in suffixes]
        unpacked = {file for file in files if without_gzip_suffix(file) == file}
        files = [file for file in files if file in unpacked or without_gzip_suffix(file) not in unpacked]
        if not files:
            raise UserError(f"source folder {path} holds no file that ends in {' or '.join(suffixes)}")
        return files
    if matches := [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]:
        return matches
    if HUB_ID.fullmatch(path) and without_gzip_suffix(root).suffix not in (".json", ".jsonl", ".parquet"):
        return []
    raise UserError(
        f"source {path} does not exist: no file, folder, match of a glob, or id on the Hub (owner/name)"
    )


def without_gzip_suffix(path: Path) -> Path:
    """Return the path without `.gz` at its end."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def open_json(path: Path) -> BinaryIO:
    """Open a file of JSON in UTF-8 for reading, after its byte order mark. A gzipped file is unpacked.

    The content decides whether a file is gzipped, not its name.

    Raises:
        UserError: the first bytes show that the file is not JSON in UTF-8.
    """
    with path.open("rb") as raw:
        is_gzip = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    file = cast(BinaryIO, gzip.GzipFile(path)) if is_gzip else path.open("rb")
    head = file.read(HEAD_BYTES)
    by_magic = (problem for magic, problem in UNSUPPORTED_MAGIC.items() if head.startswith(magic))
    if problem := next(by_magic, None) or content_problem(head):
        file.close()
        raise UserError(f"source {path} {problem}")
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    return file
