"""Files and texts that users name: check paths, and read small files of text and JSON."""

import difflib
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from blockft.errors import UserError

MAX_NAME_BYTES = 255
"""Longest name of a file that Linux file systems take."""

MAX_PATH_BYTES = 4095
"""Longest path that Linux takes."""

MAX_TEXT_BYTES = 1 << 28
"""Largest file that is read as a whole."""

MAX_SIMILAR = 2000
"""Largest number of files of a folder among which a similar name is looked for: more would take seconds."""

_STEP_NAME, _STEP_BRACKETS = r"(?:\\.|[^\\.\[\]])+", r"(?:\[[0-9]{0,9}\])*"

COLUMN_STEP = re.compile(f"(?P<name>{_STEP_NAME})(?P<brackets>{_STEP_BRACKETS})", re.DOTALL)
"""One name of a path to a value inside a record, and the brackets after it."""

_COLUMN_PATH = re.compile(rf"{_STEP_NAME}{_STEP_BRACKETS}(?:\.{_STEP_NAME}{_STEP_BRACKETS})*", re.DOTALL)


def path_problem(path: str) -> str | None:
    """Return why no file can have this path, or None. The file itself is not looked up."""
    if not path.strip():
        return "is empty: name a file or a folder"
    if problem := text_problem(path):
        return problem
    if path == "~" or path.startswith("~/"):
        return "starts with ~, which only a shell replaces: write the whole path"
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return f"is not text in the encoding {sys.getfilesystemencoding()} of this locale: use one with UTF-8"
    if len(encoded) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes: choose a shorter path"
    if max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        return f"has a name of more than {MAX_NAME_BYTES} bytes: choose a shorter name"
    return None


def column_path_problem(path: str) -> str | None:
    """Return why a text is no path to a value inside a record, such as `answer.value`, or None."""
    if not path.strip():
        return "is empty: name a field of the records"
    if problem := text_problem(path):
        return problem
    if not _COLUMN_PATH.fullmatch(path):
        return (
            "is not a path: write the names of fields with dots between them, as in passages.passage_text; a "
            "backslash stands before a dot, a bracket or a backslash that belongs to a name"
        )
    stars = re.sub(r"\\.", "", path, flags=re.DOTALL).count("*")
    return None if stars < 2 else "has several stars: one star stands for the numbers of fields"


def text_problem(text: str) -> str | None:
    """Return why a text cannot be part of a recipe, a path or a file in UTF-8, or None."""
    if "\0" in text:
        return "contains a NUL character: remove it"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8: remove the bytes that are not"
    return None


def check_path(path: str | Path, name: str) -> None:
    """Check that a file can have this path. `name` says in messages where the path comes from.

    Raises:
        UserError: see `path_problem`.
    """
    if problem := path_problem(str(path)):
        raise UserError(f"{name} {shorten(str(path))!r} {problem}")


def check_folder(path: Path, name: str) -> None:
    """Check that a path is a folder, or that one can be made there.

    Raises:
        UserError: the path is a file, a symbolic link that leads nowhere, or no path at all.
    """
    check_path(path, name)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        is_folder = not path.is_symlink()
    except OSError as error:
        raise UserError(f"{name} {path} cannot be used: {error.strerror}") from error
    if not is_folder:
        raise UserError(f"{name} {path} cannot be used: it is not a folder")


def nearest_file(name: str, files: Iterable[str]) -> str | None:
    """Return the most similar of names of files, or None if none is similar before its ending."""
    stem = PurePosixPath(name).stem.casefold()
    close = [file for file in files if difflib.get_close_matches(stem, [PurePosixPath(file).stem.casefold()])]
    return next(iter(difflib.get_close_matches(name, close, n=1, cutoff=0)), None)


def missing_path(path: str | Path, message: str) -> str:
    """Return a message that ends in the question whether a similar file beside `path` is meant, if any is."""
    place, name = os.path.split(path)
    try:
        with os.scandir(place or ".") as entries:
            files = [entry.name for entry in islice(entries, MAX_SIMILAR + 1)]
    except (OSError, ValueError):
        return message
    if len(files) > MAX_SIMILAR:
        return message
    files = [file for file in files if not file.startswith(".") and file != name]
    close = nearest_file(name[: MAX_NAME_BYTES + 1], files)
    return f"{message}; did you mean {os.path.join(place, close)}?" if close else message


def existing_parent(path: Path) -> Path:
    """Return a path if it exists, otherwise the closest of its parents that exists; absolute.

    Raises:
        UserError: it is, or is below, a link to something that does not exist, such as a disk that is not
            mounted.
    """
    existing = path.absolute()
    while not existing.exists():
        if existing.is_symlink():
            raise UserError(
                f"{existing} is a link to {existing.readlink()}, which does not exist: mount its disk, or "
                "correct the link"
            )
        existing = existing.parent
    return existing


def check_readable(path: Path, name: str, *, allow_named_pipe: bool = False) -> None:
    """Check that a path is a file, or a pipe or terminal that this process has open.

    `allow_named_pipe` is for large inputs that another program writes; reading waits for that program.

    Raises:
        UserError: the path is a folder, a device or a named pipe, or nothing is there.
    """
    check_path(path, name)
    try:
        mode = path.stat().st_mode
        target = os.path.realpath(path)
        is_named_pipe = stat.S_ISFIFO(mode) and os.path.exists(target)
    except OSError as error:
        message = f"{name} {path} cannot be read: {error.strerror}"
        raise UserError(missing_path(path, message)) from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{name} {path} cannot be read: it is a folder, not a file")
    if is_named_pipe and not allow_named_pipe:
        raise UserError(f"{name} {path} cannot be read: it is a named pipe; give its content as a file")
    is_terminal = stat.S_ISCHR(mode) and "/pts/" in target or "/tty" in target
    if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not is_terminal):
        raise UserError(f"{name} {path} cannot be read: it is a device, not a file")


def read_text(path: Path, name: str, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file in UTF-8, without its byte order mark.

    Raises:
        UserError: the file cannot be read, is larger than `max_bytes`, or is not UTF-8. The message begins
            with `name`, which says what the file is for.
    """
    check_readable(path, name)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{name} {path} cannot be read: {error.strerror}") from error
    return decode_text(data, f"{name} {path}", max_bytes=max_bytes)


def read_stdin(name: str) -> str:
    """Return the text of standard input in UTF-8, whatever the encoding of the terminal.

    Raises:
        UserError: see `read_text`; standard input is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UserError(f"{name} - cannot be read: standard input is closed")
    if not hasattr(sys.stdin, "buffer"):  # a stream of text that a caller put in its place
        return sys.stdin.read().removeprefix("\ufeff")
    try:
        data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UserError(f"{name} - cannot be read: {error.strerror}") from error
    return decode_text(data, f"{name} -", max_bytes=MAX_TEXT_BYTES)


def decode_text(data: bytes, name: str, *, max_bytes: int) -> str:
    """Decode the content of a file in UTF-8, without its byte order mark.

    Raises:
        UserError: the data are longer than `max_bytes`, are not UTF-8 or contain a NUL character.
    """
    if len(data) > max_bytes:
        raise UserError(f"{name} is larger than {max_bytes:,} bytes: name another file, or divide it")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name} cannot be read: it is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} cannot be read: byte {error.start + 1} is not UTF-8; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{name} cannot be read: it contains a NUL character")
    return text


def read_json(path: Path, name: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: see `read_text`; the file is not JSON.
    """
    return parse_json(read_text(path, name), f"{name} {path}")


def parse_json(text: str, name: str) -> Any:
    """Decode JSON.

    Raises:
        UserError: the text is not JSON, repeats a key, or is nested too deeply. The message begins with
            `name`.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except RecursionError as error:
        raise UserError(f"{name} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from error


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (repeated := find_repeated_key(pairs)) is not None:
        raise ValueError(f"the key {shorten(repeated)!r} occurs twice in one object")
    return dict(pairs)


def find_repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """Return the first key that occurs again among the keys and values of a JSON object, or None."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def shorten(text: str, max_len: int = 200) -> str:
    """Return the text, or its start and end if it is longer than `max_len` characters."""
    if len(text) <= max_len:
        return text
    half = max_len // 2
    return f"{text[:half]} ... {text[-half:]} ({len(text):,} characters)"


def shorten_paths(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths: as few as tell different paths apart."""
    parts = [PurePosixPath(path).parts or (path,) for path in paths]
    num_parts = 1
    while True:
        names = ["/".join(path_parts[-num_parts:]).replace("//", "/") for path_parts in parts]
        if len({*names}) == len({*paths}) or num_parts >= max(map(len, parts)):
            return names
        num_parts += 1


def find_home() -> Path | None:
    """Return the home folder of this user, or None if the system knows none."""
    try:
        return Path.home()
    except RuntimeError:
        return None
