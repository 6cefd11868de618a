"""A checkpoint holds 12 bytes per trained parameter and small files; a run resumes from it exactly."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from blockft.model.checkpoint import REFERENCE_LOGITS, complete_checkpoints, find_checkpoint
from blockft.model.load import load_config, load_model
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from blockft.training.library_internals import only_weights_loaded, read_tag
from tests.commands import all_logged, logged, train
from tests.run import toy_recipe

ADAPTER = "adapter_model.safetensors"
LORA = "train.lora={r: 8, lora_alpha: 16}"

FILES = {
    *("complete.json", "latest", "trainer_state.json", "scheduler.pt", "rng_state.pth"),
    *("config.json", "generation_config.json", REFERENCE_LOGITS),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "block_attention.json", "README.md"}


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for inner in value.values() for tensor in tensors_of(inner))
    elif isinstance(value, list | tuple):
        yield from (tensor for inner in value for tensor in tensors_of(inner))


def shard_bytes(checkpoint: Path) -> int:
    """Return the bytes of all tensors in DeepSpeed's files. Tensors that share memory count once per file."""
    num_bytes = 0
    for path in (checkpoint / read_tag(checkpoint)).iterdir():
        with only_weights_loaded():
            storages = [tensor.untyped_storage() for tensor in tensors_of(torch.load(path))]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        num_bytes += sum(sizes.values())
        # the pickle, and an entry per tensor in the archive
        assert path.stat().st_size - sum(sizes.values()) < 10_000 + 800 * len(sizes)
    return num_bytes


def count_trained(checkpoint: Path, model: Path) -> int:
    adapter = checkpoint / "adapter_model.safetensors"
    if adapter.exists():
        return sum(weight.numel() for weight in load_file(adapter).values())
    parameters = load_model(str(model), backend="sdpa", dtype=torch.float32).parameters()
    return sum(weight.numel() for weight in parameters)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    prepare(toy_recipe(folder))
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoint_of_bfloat16_weights(toy: Path, stage: int, adapter: bool) -> None:
    """Without ZeRO the 16-bit weights are stored, too, because DeepSpeed does not restore them.

    A resumed run that did not restore the weights would train on those of the base model.
    """
    run = toy / f"run-{stage}-{adapter}"
    settings = [f"train.deepspeed=zero{stage}", "model.dtype=bfloat16", "train.max_steps=4"]
    settings += ["train.save_steps=2", "train.num_eval_examples=4", *([LORA] if adapter else [])]
    train(toy / "recipe.yaml", run, *settings)
    checkpoint = find_checkpoint(run)
    names = {path.name for path in checkpoint.iterdir() if path.is_file()}
    assert names == (FILES | ADAPTER_FILES if adapter else FILES)
    num_trained = count_trained(checkpoint, toy / "model")
    assert 0 <= shard_bytes(checkpoint) - (12 if stage else 14) * num_trained < 1000
    vocab_size = load_config(str(checkpoint)).vocab_size
    assert load_file(checkpoint / REFERENCE_LOGITS)["logits"].shape == (16, vocab_size)

    uninterrupted = all_logged(run)
    shutil.rmtree(run / "checkpoint-4")
    train(toy / "recipe.yaml", run, *settings, "--resume")
    assert all_logged(run) == uninterrupted
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    export(run, toy / f"export-{stage}-{adapter}")
    if adapter:
        export(run, toy / f"adapter-{stage}", adapter_only=True)


def test_an_adapter_of_bfloat16_weights_with_saved_modules(toy: Path) -> None:
    """Under ZeRO-3 the weights that peft makes must have the type of those that it copies."""
    lora = "train.lora={r: 4, target_modules: [q_proj], modules_to_save: [norm]}"
    runs = [
        (toy / f"saved-{stage}-{num_ranks}", stage, num_ranks)
        for stage, num_ranks in ((2, 1), (3, 1), (3, 2))
    ]
    for run, stage, num_ranks in runs:
        settings = [f"train.deepspeed=zero{stage}", "model.dtype=bfloat16", "train.max_steps=4", lora]
        train(toy / "recipe.yaml", run, *settings, num_ranks=num_ranks)
        assert_close(logged(run), logged(runs[0][0]), rtol=1e-3, atol=0)
        adapter = load_file(export(run, toy / f"{run.name}-export", adapter_only=True) / ADAPTER)
        assert any("norm" in name for name in adapter)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoint_of_float32_weights_without_zero(toy: Path, adapter: bool) -> None:
    """The weights are the module's, and tied weights are stored once. `test_zero.py` has the other stages."""
    run = toy / f"float32-{adapter}"
    train(
        toy / "recipe.yaml", run, "train.deepspeed=zero0", "train.max_steps=1", *([LORA] if adapter else [])
    )
    checkpoint = find_checkpoint(run)
    num_trained = count_trained(checkpoint, toy / "model")
    assert 0 <= shard_bytes(checkpoint) - 12 * num_trained < 1000
