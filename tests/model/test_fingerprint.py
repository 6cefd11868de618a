"""Fingerprints depend on weights and configuration, and not on names or paths."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

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


def test_swapped_weights_change_the_fingerprint() -> None:
    def swap(model: PreTrainedModel) -> None:
        first, second = (layer.mlp for layer in model.base_model.layers)
        first.up_proj, second.up_proj = second.up_proj, first.up_proj

    before = model_fingerprint(build_model("qwen3"))
    assert model_fingerprint(build_changed(swap)) != before


def test_strides_do_not_change_the_fingerprint() -> None:
    def transpose(model: PreTrainedModel) -> None:
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data = weight.data.t().contiguous().t()

    assert model_fingerprint(build_changed(transpose)) == model_fingerprint(build_model("qwen3"))


def test_a_fingerprint_contains_the_sha_256_of_the_bytes_of_every_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sum of the weights could be forged: another model with the same sum would be served its blocks."""
    hashed: list[Any] = []
    monkeypatch.setattr(fingerprint_module, "digest_json", hashed.append)
    model = build_model("qwen3")
    model_fingerprint(model, "tokenizer")
    (_, tokenizer, weights) = hashed[0]
    assert tokenizer == "tokenizer" and [name for name, *_ in weights] == list(dict(model.named_parameters()))
    for name, shape, dtype, digest in weights:
        content = model.get_parameter(name).detach().numpy().tobytes()
        assert dtype == "torch.float32" and len(content) == 4 * math.prod(shape)
        tree = b"blockft tree %d %d " % (len(content), 2**24) + hashlib.sha256(content).digest()
        assert digest == hashlib.sha256(tree).hexdigest()


@pytest.mark.gpu
def test_a_model_has_the_same_fingerprint_on_a_gpu() -> None:
    model = build_model("llama").to(torch.bfloat16)
    assert model_fingerprint(model) == model_fingerprint(model.to("cuda"))
