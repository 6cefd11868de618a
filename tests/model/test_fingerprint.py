"""Fingerprints depend on weights and configuration, and not on names or paths."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import blockft.model.fingerprint as fingerprint_module
from blockft.model.fingerprint import model_fingerprint
from tests.tiny import build_model


def build_changed(change: Callable[[PreTrainedModel], object]) -> PreTrainedModel:
    model = build_model("qwen3")
    with torch.no_grad():
        change(model)
    return model


def test_a_fingerprint_depends_on_weights_types_shapes_and_tokenizer() -> None:
    model, again = build_model("llama"), build_model("llama")
    again.config.name_or_path = "elsewhere"
    again.config.block_attention = {"version": 1}
    again.set_attn_implementation("block_cached")
    assert model_fingerprint(model) == model_fingerprint(again)
    assert model_fingerprint(model) != model_fingerprint(build_model("llama-yarn"))
    assert model_fingerprint(model) != model_fingerprint(model, "a tokenizer")
    assert model_fingerprint(model) != model_fingerprint(model.to(torch.bfloat16))


def test_every_weight_changes_the_fingerprint() -> None:
    before = model_fingerprint(build_model("qwen3"))
    for name, _ in build_model("qwen3").named_parameters():
        model = build_changed(lambda model, name=name: model.get_parameter(name).add_(1e-3))
        assert model_fingerprint(model) != before, name


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.neg_(),
        lambda weight: weight.copy_(weight.flip(0)),
        lambda weight: weight.copy_(weight.flip(1)),
        lambda weight: weight[0, :2].copy_(weight[0, :2].flip(0).clone()),
        lambda weight: weight[:2, 0].copy_(weight[:2, 0].flip(0).clone()),
        lambda weight: weight.view(torch.int32)[3, 5].bitwise_xor_(1),
    ],
    ids=["signs", "rows", "columns", "two in a row", "two in a column", "one bit"],
)
def test_every_number_and_its_index_change_the_fingerprint(change: Callable[[torch.Tensor], object]) -> None:
    before = model_fingerprint(build_model("qwen3"))
    model = build_changed(lambda model: change(model.get_parameter("model.layers.1.mlp.down_proj.weight")))
    assert model_fingerprint(model) != before


def test_swapped_weights_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(model: PreTrainedModel) -> None:
        first, second = (layer.mlp for layer in model.base_model.layers)
        first.up_proj, second.up_proj = second.up_proj, first.up_proj

    before = model_fingerprint(build_model("qwen3"))
    assert model_fingerprint(build_changed(swap)) != before
    monkeypatch.setattr(fingerprint_module, "_CHUNK_NUMBERS", 100)
    assert model_fingerprint(build_model("qwen3")) == before
