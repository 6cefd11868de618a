"""Stored weights must be exactly those that the model needs."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from blockft.errors import UserError
from blockft.model.load import load_full_attention_model, load_model
from tests.pointers import LFS_POINTER, WEB_PAGE
from tests.tiny import CONFIGS, SIZE, build_model

Weights = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def open_both(folder: Path) -> None:
    """Open a folder in both ways that read weights; the results are equal."""
    cached = load_model(str(folder), backend="cached", dtype=torch.float32)
    plain = load_full_attention_model(str(folder), None, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(cached.parameters(), plain.parameters(), strict=True))


def refusal(folder: Path) -> str:
    """Return the message with which both ways refuse a folder; it is one line."""
    messages = set()
    for load in (
        lambda: load_model(str(folder), backend="sdpa", dtype=torch.float32),
        lambda: load_full_attention_model(str(folder), None, torch.float32),
    ):
        with pytest.raises(UserError) as error:
            load()
        messages.add(str(error.value))
    (message,) = messages
    assert message.startswith(f"model '{folder}' cannot be opened: ") and "\n" not in message
    return message


def says(pattern: str, message: str) -> bool:
    return re.search(pattern, message) is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def change(folder: Path, change_weights: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change_weights(load_file(path)), path, metadata={"format": "pt"})


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


def renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: tensor}


@pytest.mark.parametrize(
    ("change_weights", "message"),
    [
        (without(UP), rf"1 of 21 weights are missing \({UP}\)"),
        (without(HEAD), rf"1 of 21 weights are missing \({HEAD}\)"),
        (lambda _: {"x": torch.zeros(1)}, "21 of 21 weights are missing .*, and 18 more"),
        (renamed("base_model.model."), r"every name starts with base_model\.model\.$"),
        (renamed("_orig_mod."), r"every name starts with _orig_mod\.$"),
        (renamed("module."), r"every name starts with module\.$"),
        (renamed("x"), "21 of 21 weights are missing"),
        (
            replaced("model.layers.2.mlp.up_proj.weight", torch.zeros(48, 32)),
            r"1 weights are unexpected \(mod",
        ),
        (replaced("lm_head.bias", torch.zeros(97)), r"1 weights are unexpected \(lm_head\.bias\)"),
        (replaced("evil\x1b[2J\nname", torch.zeros(1)), r"1 weights are unexpected \('evil\\x1b"),
        (replaced(UP, torch.zeros(48, 31)), rf"{UP} has \(48, 31\), it should have \(48, 32\)"),
        (replaced(UP, torch.zeros(32, 48)), "have another shape"),
        (replaced(EMBEDDING, torch.zeros(98, 32)), r"has \(98, 32\), it should have \(97, 32\)"),
        (replaced(UP, torch.zeros(48, 32, dtype=torch.int32)), "has type I32"),
        (replaced(UP, torch.zeros(48, 32).to(torch.float8_e4m3fn)), "has type F8_E4M3"),
    ],
)
def test_weights_that_the_model_does_not_need_or_lacks_are_refused_by_name(
    folder: Path, change_weights: Callable[[Weights], Weights], message: str
) -> None:
    change(folder, change_weights)
    assert says(message, refusal(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_every_family_are_opened(tmp_path: Path, name: str) -> None:
    build_model(name).save_pretrained(tmp_path)
    open_both(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pytorch_file_is_opened_and_checked(folder: Path, sharded: bool) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = [names[:10], names[10:]] if sharded else [names]
    files = [f"pytorch_model-{i}.bin" for i in range(len(parts))] if sharded else ["pytorch_model.bin"]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: weights[name] for name in part}, folder / file)
    if sharded:
        index = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        write_index(folder / "pytorch_model.bin.index.json", index)
    open_both(folder)
    torch.save({name: weights[name] for name in parts[0] if name != UP and name != HEAD}, folder / files[0])
    assert says("of 21 weights are missing", refusal(folder))


class Payload:
    """Unpickles as the creation of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_in_a_file_of_weights_is_never_run(folder: Path, legacy: bool) -> None:
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    evil, file = folder / "evil", folder / "pytorch_model.bin"
    torch.save(weights | {"extra": Payload(evil)}, file, _use_new_zipfile_serialization=not legacy)
    assert says("holds other objects than weights", refusal(folder))
    file.write_bytes(pickle.dumps(Payload(evil)))
    refusal(folder)
    torch.save(weights | {"step": 3}, file)
    assert says("'step' is not a tensor", refusal(folder))
    torch.save(list(weights.values()), file)
    assert says("should hold weights by name", refusal(folder))
    assert not evil.exists()


def write_index(path: Path, weight_map: Any) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    build_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    return tmp_path / "shards"


def test_sharded_weights_are_opened(shards: Path) -> None:
    open_both(shards)


def test_a_missing_shard_is_named(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    first.unlink()
    assert says(rf"1 of \d files with weights are missing \({first.name}\)", refusal(shards))
    first.symlink_to(shards / "nowhere")
    assert says("cannot be read", refusal(shards))
    first.unlink()
    shutil.copy(second, first)
    assert says(r"weights are also in another file \(model\.", refusal(shards))


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {"a": "model-00001-of-00004.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": 1}}',
        '{"metadata": {}, "weight_map": {"a": "../other/model.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": "/dev/zero"}}',
        '{"metadata": {}, "weight_map": {"a": ".."}}',
        '{"metadata": {}, "weight_map": {}}',
        "[" * 100_000,
    ],
)
def test_a_malformed_index_is_refused(shards: Path, index: str) -> None:
    (shards / "model.safetensors.index.json").write_text(index)
    refusal(shards)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "Git LFS pointer: fetch the file with git lfs pull"),
        (WEB_PAGE, "web page"),
        (b"", "empty"),
    ],
)
def test_a_file_in_place_of_weights_is_named(shards: Path, content: bytes, message: str) -> None:
    index, weights = shards / "model.safetensors.index.json", sorted(shards.glob("*.safetensors"))[1]
    original = index.read_bytes()
    index.write_bytes(content)
    assert says(f"{index.name} is .*{message}", refusal(shards))
    index.write_bytes(original)
    weights.write_bytes(content)
    assert says(f"{weights.name} is .*{message}", refusal(shards))
    for file in shards.glob("model*"):
        file.unlink()
    (shards / "pytorch_model.bin").write_bytes(content)
    assert says(f"pytorch_model.bin is .*{message}", refusal(shards))
    (shards / "pytorch_model.bin").unlink()
    assert says("it holds no weights", refusal(shards))


def test_tied_weights_may_be_stored_once_under_either_name(tied: Path) -> None:
    assert HEAD not in load_file(tied / "model.safetensors")
    open_both(tied)
    change(tied, lambda weights: without(EMBEDDING)(weights | {HEAD: weights[EMBEDDING]}))
    open_both(tied)
    change(tied, lambda weights: weights | {EMBEDDING: weights[HEAD].clone()})
    open_both(tied)
    change(tied, lambda weights: weights | {HEAD: weights[HEAD] + 1})
    assert says("ties lm_head.weight to model.embed_tokens.weight, but the stored", refusal(tied))
    change(tied, without(HEAD, EMBEDDING))
    assert says("2 of 21 weights are missing", refusal(tied))


def test_weights_without_the_prefix_of_the_language_model_are_opened(tied: Path) -> None:
    change(tied, lambda weights: {n.removeprefix("model."): w for n, w in weights.items()})
    open_both(tied)
    change(tied, without("layers.0.mlp.up_proj.weight"))
    assert says("1 of 21 weights are missing", refusal(tied))


def test_rotary_buffers_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    buffer, original = torch.ones(4), load_file(folder / "model.safetensors")
    # the last one is that of a model that was saved without its head
    for name in ("model.layers.0.self_attn.", "model.", "layers.0.self_attn."):
        change(folder, lambda _, name=name: original | {f"{name}rotary_emb.inv_freq": buffer})
        open_both(folder)
    change(folder, replaced("model.layers.0.self_attn.rotary_emb.inv_freq.x", buffer))
    assert says("unexpected", refusal(folder))


def test_an_adapter_of_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4})
    )
    with pytest.raises(UserError, match=r"its base model .* is itself an adapter"):
        load_model(str(folder), backend="sdpa", dtype=torch.float32)


# --- the cache of the Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_on_hub(cache: Path, folder: Path) -> tuple[str, Path]:
    """Lay a folder out as a download from the Hub; return its Hub id and the folder of the download."""
    repository = cache / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return "owner/tiny", snapshot


def test_a_download_of_the_hub_is_opened_and_checked(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_id, snapshot = cache_on_hub(tmp_path, shards)
    opened = load_model(hub_id, backend="sdpa", dtype=torch.float32)
    assert torch.equal(opened.lm_head.weight, build_model("llama").lm_head.weight)
    path = sorted(snapshot.glob("*.safetensors"))[1]
    weights = load_file(path)
    name = next(iter(weights))
    save_file({key: tensor for key, tensor in weights.items() if key != name}, path)
    with pytest.raises(UserError, match=rf"^model 'owner/tiny' cannot be opened.* missing \({name}\)$"):
        load_model(hub_id, backend="sdpa", dtype=torch.float32)
    path.unlink()
    with pytest.raises(UserError, match="^model 'owner/tiny' cannot be opened") as error:
        load_model(hub_id, backend="sdpa", dtype=torch.float32)
    assert "\n" not in str(error.value)
    (snapshot / "config.json").write_text('{"model_type": "phi3", "rope_scaling": {"type": "su"}}')
    with pytest.raises(UserError, match="^owner/tiny: RoPE type 'longrope' is not supported"):
        load_model(hub_id, backend="sdpa", dtype=torch.float32)
