"""A model folder with digests is checked whenever it is opened; one without is opened as it is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockft.digest import dump_with_digest
from blockft.errors import UserError
from blockft.model import model_files
from blockft.model.load import (
    load_config,
    load_full_attention_model,
    load_model,
    load_tokenizer,
    verify_model,
)
from blockft.model.model_files import DIGESTS, verify_model_files, write_digests
from tests.run import save_model

READERS: dict[str, Callable[[str], Any]] = {
    "config": load_config,
    "tokenizer": load_tokenizer,
    "model": lambda path: load_model(path, backend="sdpa", dtype=torch.float32),
    "plain model": lambda path: load_full_attention_model(path, None, torch.float32),
    "training": verify_model,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    write_digests(tmp_path / "model")
    return tmp_path / "model"


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_folder_with_digests_is_opened_also_by_plain_transformers(folder: Path) -> None:
    for read in READERS.values():
        read(str(folder))
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("reader", ["model", "plain model", "training"])
def test_weights_with_a_flipped_bit_are_refused(folder: Path, reader: str) -> None:
    flip_last_bit(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"damaged \(model.safetensors has changed.*remove digests.json"):
        READERS[reader](str(folder))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_or_missing_small_file_is_refused_by_every_reader(
    folder: Path, name: str, reader: str
) -> None:
    flip_last_bit(folder / name)
    with pytest.raises(UserError, match=f"{name} has changed"):
        READERS[reader](str(folder))
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        READERS[reader](str(folder))


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "adapter_config.json", "model.safetensors.index.json", "tokenizer.model"]
    + ["additional_chat_templates/tools.jinja", "vocab.txt", "merges.txt"],
)
def test_a_file_that_transformers_would_read_may_not_be_added(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    for read in READERS.values():
        with pytest.raises(UserError, match=f"{name} was added"):
            read(str(folder))


def test_files_that_transformers_does_not_read_may_be_added(folder: Path) -> None:
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "loss.png",
        "eval/report.json",
        "q4.gguf",
        "notes.txt",
        "Thumbs.db",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for read in READERS.values():
        read(str(folder))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 1}', dump_with_digest({"version": 2, "files": {}})]
    + [dump_with_digest({"version": 1}), dump_with_digest({"version": 1, "files": {"../x": {}}})],
)
def test_damaged_digests_are_refused_by_name(folder: Path, content: str) -> None:
    (folder / DIGESTS).write_text(content)
    for read in READERS.values():
        with pytest.raises(UserError, match="is damaged"):
            read(str(folder))


def test_a_folder_whose_digests_were_removed_is_opened_with_its_changes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match="if the folder was changed on purpose"):
        load_config(str(folder))
    (folder / DIGESTS).unlink()
    assert load_config(str(folder)).rms_norm_eps == 0.5


def test_digests_are_read_through_links_and_a_broken_link_is_refused(folder: Path, tmp_path: Path) -> None:
    """The Hub's cache keeps links to the files."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    verify_model(str(linked))
    flip_last_bit(folder / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors has changed"):
        verify_model(str(linked))
    (folder / DIGESTS).unlink()
    with pytest.raises(UserError, match="digests.json is missing"):
        verify_model(str(linked))


def test_a_model_of_the_hub_is_verified_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    asked = []

    def download(hub_id: str, name: str, *, revision: str) -> str:
        """Download a file of the Hub, as the function of huggingface_hub does."""
        asked.append((name, revision))
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        (snapshot / name).write_bytes((folder / name).read_bytes())
        return str(snapshot / name)

    monkeypatch.setattr(model_files, "hf_hub_download", download)
    verify_model_files("owner/name", "v1", weights=False)
    assert asked[0] == (DIGESTS, "v1") and ("config.json", "c0ffee") in asked
    assert "model.safetensors" not in os.listdir(snapshot)
    verify_model_files("owner/name", weights=True)
    flip_last_bit(folder / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors has changed"):
        verify_model_files("owner/name", weights=True)
    (folder / DIGESTS).unlink()
    verify_model_files("owner/name", weights=True)


def test_an_answer_that_fails_does_not_count_as_a_model_without_digests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no answer, and not in the cache")

    monkeypatch.setattr(model_files, "hf_hub_download", download)
    verify_model_files("owner/name", weights=True)  # offline, a cache without the file is all there is
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"'owner/name' cannot be verified.*has digests\.json \(no answer"):
        verify_model_files("owner/name", weights=True)


def test_a_hub_id_that_cannot_be_found_is_left_to_the_reader() -> None:
    for hub_id in ("blockft-test/no-such-model", "a b/--"):
        verify_model_files(hub_id, "no-such-revision", weights=True)
        with pytest.raises(UserError, match="cannot be opened"):
            load_tokenizer(hub_id)


def test_only_the_first_rank_of_a_host_reads_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_last_bit(folder / "model.safetensors")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    verify_model(str(folder))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="model.safetensors has changed"):
        verify_model(str(folder))
