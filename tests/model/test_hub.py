"""Pushing an export: what is checked first, what is sent, and what a failed upload leaves."""

import re
from pathlib import Path
from typing import Any

import pytest

from blockft.errors import UserError
from blockft.model import hub


class FakeHub:
    """Records calls in place of `HfApi`, and fails if it has an error."""

    error: Exception | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))
        if self.error:
            raise self.error


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    return fake


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_uploaded_to_a_repository_that_is_created(
    fake_hub: FakeHub, tmp_path: Path, private: bool
) -> None:
    assert hub.push_folder(tmp_path, "me/mine", private=private) == "https://huggingface.co/me/mine"
    (created, options), (uploaded, sent) = fake_hub.calls
    assert (created, uploaded) == ("create_repo", "upload_folder")
    assert options == {"repo_id": "me/mine", "private": private, "exist_ok": True}
    assert sent["repo_id"] == "me/mine" and sent["folder_path"] == tmp_path


@pytest.mark.parametrize(
    "error", [RuntimeError("no network"), OSError("no network"), ValueError("no network\nmore")]
)
def test_a_failed_upload_leaves_the_folder_and_says_how_to_repeat(
    fake_hub: FakeHub, tmp_path: Path, error: Exception
) -> None:
    fake_hub.error = error
    repeat = (
        f"not pushed to me/mine: no network; to repeat the upload alone, run `hf upload me/mine {tmp_path}"
    )
    with pytest.raises(UserError, match=re.escape(f"{repeat} --private`")):
        hub.push_folder(tmp_path, "me/mine")
    assert tmp_path.is_dir()


@pytest.mark.parametrize("repo_id", ["mine", "a/b/c", "me/mi ne", "me/-mine", ""])
def test_an_id_that_is_not_owner_and_name_is_refused(fake_hub: FakeHub, repo_id: str) -> None:
    with pytest.raises(UserError, match="write OWNER/NAME"):
        hub.check_push(repo_id)


def test_a_push_without_an_access_token_is_refused(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.check_push("me/mine")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        hub.check_push("me/mine")
