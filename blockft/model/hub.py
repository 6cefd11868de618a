"""The Hugging Face Hub: read the metadata of a base model's card, and push an exported folder."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.repocard import metadata_load

from blockft.errors import UserError, first_line

_CARD_ENTRIES = ("license", "license_name", "license_link", "language")
"""Entries of a model card's metadata that also hold for a fine-tuned model."""

_REPO_ID = re.compile(r"[A-Za-z0-9]([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
"""OWNER/NAME, as the Hub allows them."""


@dataclass(frozen=True)
class BaseModel:
    """The model that was fine-tuned, as far as its card and folder describe it.

    `name` is its Hub id, or the name of its folder; `hub_id` is None if it has none. `metadata` holds licence
    and languages as in the metadata of its model card.
    """

    name: str
    hub_id: str | None
    metadata: dict[str, Any]


def describe_base_model(path: str, revision: str | None = None) -> BaseModel:
    """Return the Hub id, licence and languages of a model folder or Hub id, as far as they are known.

    A card that cannot be downloaded or read is ignored.
    """
    folder = Path(path)
    if folder.is_dir():
        # the Hub's cache names its folders models--OWNER--NAME/snapshots/COMMIT
        cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{folder.resolve()}/")
        hub_id = f"{cached[1]}/{cached[2]}" if cached else None
    else:
        hub_id = path
    try:
        card = (
            folder / "README.md" if folder.is_dir() else hf_hub_download(path, "README.md", revision=revision)
        )
        metadata = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        metadata = {}
    known = {name: metadata[name] for name in _CARD_ENTRIES if metadata.get(name)}
    return BaseModel(hub_id or folder.resolve().name, hub_id, known)


def check_push(repo_id: str) -> None:
    """Check before long work that a folder can be pushed to a repository of the Hub.

    Raises:
        UserError: the id is not OWNER/NAME, or no access token is stored.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise UserError(f"--push is {repo_id!r}: write OWNER/NAME, the id of a repository on the Hub")
    if get_token() is None:
        raise UserError("--push needs an access token for the Hub: run `hf auth login`, or set HF_TOKEN")


def push_folder(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a model folder to a repository of the Hub and return the repository's URL.

    The repository is created if it does not exist; an existing one keeps its visibility.

    Raises:
        UserError: the Hub cannot be reached or rejects the upload; the local folder is unchanged.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a blockft export")
    # huggingface_hub raises errors of httpx or httpx2, depending on its version
    except Exception as error:
        reason = first_line(error)
        visibility = " --private" if private else ""
        raise UserError(
            f"{folder} is written, but it was not pushed to {repo_id}: {reason}; "
            f"to repeat the upload alone, run `hf upload {repo_id} {folder}{visibility}`"
        ) from error
    return str(url)
