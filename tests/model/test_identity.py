"""Models are told apart by what they compute."""

import torch

from blockft.model.identity import model_fingerprint
from tests.tiny import build_model


def test_a_fingerprint_is_that_of_weights_and_shape() -> None:
    model, again = build_model("llama"), build_model("llama")
    again.config.name_or_path = "elsewhere"
    assert model_fingerprint(model) == model_fingerprint(again)
    assert model_fingerprint(model) != model_fingerprint(build_model("llama-yarn"))
    assert model_fingerprint(model) != model_fingerprint(model.to(torch.bfloat16))


def test_any_weight_that_is_trained_changes_it() -> None:
    before = model_fingerprint(build_model("qwen3"))
    for name, _ in build_model("qwen3").named_parameters():
        model = build_model("qwen3")
        with torch.no_grad():
            model.get_parameter(name).add_(1e-3)
        assert model_fingerprint(model) != before, name
