"""Recognise files that do not hold what their names say: Git LFS pointers, web pages and empty files."""

import re
from pathlib import Path

from blockft.errors import UserError

_LFS_POINTER = re.compile(
    rb"version https?://(git-lfs|hawser)\.github\.com/spec/|version http://git-media\.io/"
)
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body|\?xml)\b", re.IGNORECASE)

_HEAD_BYTES = 512
"""Bytes at the start of a file that are enough to recognise a pointer or a web page."""


def check_content(path: Path) -> None:
    """Refuse a file that is empty, a Git LFS pointer or a web page.

    Raises:
        UserError: the file stands in place of the content, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not head:
        raise UserError(f"{path} is empty: fetch the file again")
    if _LFS_POINTER.match(head):
        raise UserError(f"{path} is a Git LFS pointer: fetch the file with git lfs pull")
    if _WEB_PAGE.match(head):
        raise UserError(f"{path} is a web page, not the file that its name says: download the file itself")
