"""Files that were fetched: refuse Git LFS pointers, web pages and empty files, and read JSON of models."""

import json
import re
from pathlib import Path
from typing import Any

from blockft.errors import UserError, first_line

_LFS_POINTER = re.compile(
    rb"version https?://(git-lfs|hawser)\.github\.com/spec/|version http://git-media\.io/"
)
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body|\?xml)\b", re.IGNORECASE)

HEAD_BYTES = 512
"""Number of bytes at the start of a file that are enough to recognise a pointer or a web page."""


def content_problem(head: bytes) -> str | None:
    """Return that a file whose first bytes are `head` holds a pointer or a web page, or None."""
    if _LFS_POINTER.match(head):
        return "is a Git LFS pointer: fetch the file with git lfs pull"
    if _WEB_PAGE.match(head):
        return "is a web page, not the file that its name says: download the file itself"
    return None


def check_content(path: Path) -> None:
    """Refuse a file that is empty, a Git LFS pointer or a web page.

    Raises:
        UserError: the file stands in place of the content, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not head:
        raise UserError(f"{path} is empty: fetch the file again")
    if problem := content_problem(head):
        raise UserError(f"{path} {problem}")


def load_json(path: Path) -> Any:
    """Return the content of a JSON file that came with a model.

    Raises:
        UserError: see `check_content`; the file is not JSON.
    """
    check_content(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from error
