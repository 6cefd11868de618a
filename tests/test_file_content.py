"""Files that stand in place of the content that their names promise are refused."""

from pathlib import Path

import pytest

from blockft.errors import UserError
from blockft.file_content import check_content
from tests.pointers import LFS_POINTER, WEB_PAGE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: fetch the file again"),
        (LFS_POINTER, "is a Git LFS pointer: fetch the file with git lfs pull"),
        (LFS_POINTER.replace(b"https://git-lfs", b"https://hawser"), "is a Git LFS pointer"),
        (WEB_PAGE, "is a web page"),
        (b"\xef\xbb\xbf\n<HTML><title>404</title>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    ],
)
def test_a_file_that_stands_in_place_of_content_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} {message}"):
        check_content(path)


@pytest.mark.parametrize("content", [b"{}", b"version", b"<", b"<|endoftext|>", b"<\x00\x00\x00{}", b"\n"])
def test_other_files_are_accepted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    check_content(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        check_content(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        check_content(tmp_path)
