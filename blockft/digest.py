"""Digests of files and of memory: a reader finds damage before it uses the content.

The digest of a content is SHA-256 over the SHA-256 of each of its chunks and over its length::

    content    [chunk 0][chunk 1]...[rest]
    digest     SHA-256("blockft tree" length chunk_size SHA-256(chunk 0) SHA-256(chunk 1) ... SHA-256(rest))

All cores hash the chunks of one large file together. hashlib releases the interpreter's lock meanwhile.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blockft.errors import notify
from blockft.units import format_bytes

CHUNK_BYTES = 2**24
"""Number of bytes of a chunk. Another number gives other digests."""

DIGEST = "digest"
"""Key of a JSON object under which its own digest stands."""

_PIECE_BYTES = 2**20
"""Number of bytes that a thread reads at once."""

_SETTLED_NS = 2_000_000_000
"""A file that changed within this time may change again without another time stamp."""

_REPORTED_S = 1.0
"""A verification that takes longer is reported on stderr."""

_SHOWN_BYTES = 2**30
"""Smaller contents are read in about a second, without a bar."""

_verified: dict[tuple[str, int, int, int], str] = {}
"""Digests of this process's files by path, inode, size and time of the last change."""


class DamagedFile(Exception):
    """A file is not what was written. The message is the file's name and what is wrong with it."""


class AddedFile(DamagedFile):
    """A folder holds a file that was not written with the others, which may all be whole."""


@dataclass(frozen=True)
class FileDigest:
    """Size and digest of a file."""

    num_bytes: int
    digest: str


# --- contents


def digest_buffers(contents: Mapping[str, tuple[int, Callable[[int, int], Any]]]) -> dict[str, str]:
    """Return the digests of contents by name.

    A content is its number of bytes and a function of `start` and `end` that returns a buffer with the bytes
    between them. The function is called in several threads.
    """

    def digest_chunk(read: Callable[[int, int], Any], start: int, end: int) -> bytes:
        return hashlib.sha256(read(start, end)).digest()

    return _digest(
        {name: (num_bytes, partial(digest_chunk, read)) for name, (num_bytes, read) in contents.items()}
    )


def _digest(contents: Mapping[str, tuple[int, Callable[[int, int], bytes]]]) -> dict[str, str]:
    """Return the digests of contents by name; the functions return the SHA-256 of a chunk."""
    with ThreadPoolExecutor(min(32, len(os.sched_getaffinity(0)))) as pool:
        chunks: dict[str, list[Future[bytes]]] = {
            name: [
                pool.submit(digest_chunk, start, min(start + CHUNK_BYTES, num_bytes))
                for start in range(0, num_bytes, CHUNK_BYTES)
            ]
            for name, (num_bytes, digest_chunk) in contents.items()
        }
        try:
            with _progress(sum(num_bytes for num_bytes, _ in contents.values())) as advance:
                return {
                    name: _combine(num_bytes, chunks[name], advance)
                    for name, (num_bytes, _) in contents.items()
                }
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show the progress if there is much to read. The import is slow, and most contents are small."""
    if num_bytes < _SHOWN_BYTES:
        yield lambda amount: None
        return
    from blockft.progress import BYTE, progress

    with progress("digests", num_bytes, unit=BYTE, transient=True) as advance:
        yield advance


def _combine(num_bytes: int, chunks: Iterable[Future[bytes]], advance: Callable[[int], None]) -> str:
    root = hashlib.sha256(f"blockft tree {num_bytes} {CHUNK_BYTES} ".encode())
    for start, chunk in zip(range(0, num_bytes, CHUNK_BYTES), chunks, strict=True):
        root.update(chunk.result())
        advance(min(CHUNK_BYTES, num_bytes - start))
    return root.hexdigest()


# --- files


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Return size and digest of files of a folder, by name.

    Raises:
        DamagedFile: a file is missing, is no regular file, or cannot be read.
    """
    sizes = {name: _status(folder, name).st_size for name in names}
    digests = _digest({name: (size, partial(_digest_part, folder, name)) for name, size in sizes.items()})
    return {name: FileDigest(size, digests[name]) for name, size in sizes.items()}


def verify_files(folder: Path, expected: Mapping[str, FileDigest]) -> None:
    """Check that files of a folder are what was written; a check that takes time is reported on stderr.

    A file that this process has verified is read again only if it changed.

    Raises:
        DamagedFile: one of the files is missing or has another content. The first one is named.
    """
    start, keys = time.monotonic(), {}
    for name, file in expected.items():
        status = _status(folder, name)
        if status.st_size != file.num_bytes:
            raise DamagedFile(f"{name} has {status.st_size:,} bytes instead of {file.num_bytes:,}")
        path = os.path.realpath(folder / name)
        keys[name] = (path, status.st_ino, status.st_size, status.st_ctime_ns)
    unknown = [name for name, file in expected.items() if _verified.get(keys[name]) != file.digest]
    now = time.time_ns()
    for name, found in digest_files(folder, unknown).items():
        if found != expected[name]:
            raise DamagedFile(f"{name} has changed since it was written")
        if now - keys[name][-1] > _SETTLED_NS:
            _verified[keys[name]] = found.digest
    seconds = time.monotonic() - start
    if seconds > _REPORTED_S:
        num_bytes = sum(expected[name].num_bytes for name in unknown)
        notify(f"checked {format_bytes(num_bytes)} of {folder} in {seconds:.1f} s")


def check_no_other_files(names: Iterable[str], expected: Iterable[str]) -> None:
    """Check that a folder whose files are `names` holds no file that was not written with the others.

    Raises:
        AddedFile: a file is not expected. The first one is named.
    """
    if others := sorted(set(names) - set(expected)):
        raise AddedFile(f"{others[0]} was added after the folder was written")


def list_files(folder: Path) -> list[str]:
    """Return the names of all files below a folder, relative to it, sorted.

    Hidden files and folders are left out: locks, and files of systems and tools, which no library reads.
    """
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _status(folder: Path, name: str) -> os.stat_result:
    try:
        status = (folder / name).stat()
    except FileNotFoundError:
        raise DamagedFile(f"{name} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{name} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedFile(f"{name} is not a regular file")
    return status


def _digest_part(folder: Path, name: str, start: int, end: int) -> bytes:
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(_PIECE_BYTES, end - start)))
    try:
        with (folder / name).open("rb", buffering=0) as file:
            file.seek(start)
            while start < end:
                num_read = file.readinto(piece[: end - start])
                if not num_read:
                    raise DamagedFile(f"{name} became shorter while it was read")
                digest.update(piece[:num_read])
                start += num_read
    except OSError as error:
        raise DamagedFile(f"{name} cannot be read: {error.strerror}") from error
    return digest.digest()


# --- JSON files with digests


def files_to_record(files: Mapping[str, FileDigest]) -> dict[str, dict[str, Any]]:
    """Return digests of files as JSON values, in the order of the names."""
    return {name: {"bytes": files[name].num_bytes, DIGEST: files[name].digest} for name in sorted(files)}


def parse_files(record: Any) -> dict[str, FileDigest]:
    """Return the digests of files that `files_to_record` wrote.

    Raises:
        DamagedFile: the record has another form, or names a file outside of its folder.
    """
    try:
        files = {name: FileDigest(int(entry["bytes"]), str(entry[DIGEST])) for name, entry in record.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # OverflowError: Infinity
        raise DamagedFile("its list of files is malformed") from None
    for name in files:
        if not name or os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
            raise DamagedFile(f"its list of files names {name!r}, which is outside of the folder")
    return files


def dump_with_digest(record: Mapping[str, Any]) -> str:
    """Return a JSON object as the text of a file, with the digest of the object under the key `digest`."""
    read_back = json.loads(json.dumps(record))  # keys that are numbers become texts
    complete = {**read_back, DIGEST: digest_json(read_back)}
    text = json.dumps(complete, indent=2, ensure_ascii=False) + "\n"
    # a path that is not UTF-8 holds lone surrogates, which JSON can only escape
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_with_digest(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file that `dump_with_digest` gave, without the digest.

    Every byte of the file counts, also blanks.

    Raises:
        DamagedFile: the file is missing or is not what was written.
    """
    _status(path.parent, path.name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{path.name} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8")
        record = json.loads(text)
        if not isinstance(record, dict):
            raise DamagedFile(f"{path.name} is not a JSON object")
        if record.pop(DIGEST, None) is None:
            raise DamagedFile(f"{path.name} has no digest; an earlier version of blockft wrote none")
        is_unchanged = text == dump_with_digest(record)
    except (ValueError, RecursionError):  # the encoder cannot recurse as deeply as the decoder
        raise DamagedFile(f"{path.name} is not JSON") from None
    if not is_unchanged:
        raise DamagedFile(f"{path.name} has changed since it was written")
    return record


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value; the order of the keys of its objects does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_names(files: Mapping[str, FileDigest], names: Sequence[str]) -> str:
    """Return one digest of several files: of their names, in this order, and of their contents."""
    return digest_json([[name, files[name].digest] for name in names])
