"""Adapters are trained and read exactly, or refused before training."""

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

from blockft.errors import UserError
from blockft.model.load import build_meta_model, load_config, load_full_attention_model, load_model
from blockft.model.lora import OPTIONS, add_adapter, load_adapter, merge_adapter
from tests.pointers import LFS_POINTER, WEB_PAGE
from tests.tiny import SIZE

IDS = torch.arange(1, 60)[None]

EXACT: dict[str, dict[str, Any]] = {
    "default": {},
    "explicit defaults": {"fan_in_fan_out": False, "use_qalora": False, "task_type": "CAUSAL_LM"},
    "rank": {"r": 2, "lora_alpha": 64, "lora_dropout": 0.1},
    "targets": {"target_modules": ["q_proj", "down_proj"]},
    "regular expression": {"target_modules": r".*layers\.1.*(q|v)_proj"},
    "excluded": {"exclude_modules": ["q_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "patterns": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "whole modules": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
}
"""Options of an adapter that is exact on every model."""

TOKENS: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": [3, 4]},
    "tokens of the embedding": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
}
"""Options of an adapter that is read exactly on every model, but is not trained."""

TOKENS_IF_NOT_TIED: dict[str, dict[str, Any]] = {
    "tokens of the head": {"trainable_token_indices": {"lm_head": [3, 4]}},
    "other tokens of the head": {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
}
"""The same on models whose matrices are not tied."""

EXACT_IF_NOT_TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head by a regular expression": {"target_modules": ".*(q_proj|lm_head)"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens"]},
    "DoRA of the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}
"""Options of an adapter that changes one of two tied matrices, or both in different ways."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices is not supported"),
    "replicated layers": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is not supported"),
    "bias of the adapter": ({"lora_bias": True}, "lora_bias is not supported"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters is not supported"),
    "aLoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is not supported"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config is not supported"),
    "tying": ({"ensure_weight_tying": True}, "ensure_weight_tying is not supported"),
    "QALoRA": ({"use_qalora": True}, "use_qalora is not supported"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "arrow_config is not supported"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
    "inference": ({"inference_mode": True}, "inference_mode is not supported"),
    "other task": ({"task_type": "SEQ_CLS"}, "task_type is not supported"),
    "other kind": ({"peft_type": "IA3"}, "peft_type is not supported"),
    "other base": ({"base_model_name_or_path": "x"}, "base_model_name_or_path is not supported"),
    "unknown option": ({"foo": 1}, "foo is not supported"),
    "unknown option without value": ({"foo": None}, "foo is not supported"),
    "no space": ({"r:8": None}, "'r:8' has no value: YAML needs a space after the colon"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq' .allowed: True, False, gau"),
    "EVA": ({"init_lora_weights": "eva"}, "init_lora_weights is 'eva'"),
    "random PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    "rank 0": ({"r": 0}, "r is 0, it should be a whole number of at least 1"),
    "rank text": ({"r": "8"}, "r is '8'"),
    "rank fraction": ({"r": 4.5}, r"r is 4\.5"),
    "rank pattern": ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\.q_proj is 0"),
    "rank list": ({"rank_pattern": [8]}, r"rank_pattern is \[8\], it should map names"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0, it should be a number greater than 0"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\.q_proj is 'x'"),
    "target": ({"target_modules": ["nope"]}, "nope"),
    "one of two targets": ({"target_modules": ["q_proj", "nope"]}, "target_modules names 'nope', but"),
    "module to save": ({"modules_to_save": ["nope"]}, "modules_to_save names 'nope', but"),
    "layer": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 9]}, "layers_to_transform names lay"),
    "unsupported module": ({"target_modules": ["norm"]}, "LlamaRMSNorm|Qwen2RMSNorm"),
    "bias": ({"bias": "some"}, ""),
    "dropout": ({"lora_dropout": 2}, ""),
}
"""Options that cannot be trained exactly, and a part of the error about each."""


@pytest.fixture(scope="module", params=["llama", "tied llama", "qwen2 with biases"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    if "llama" in request.param:
        config = LlamaConfig(**SIZE, tie_word_embeddings="tied" in request.param)
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=False))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        model.save_pretrained(folder)
    return str(folder)


def open_base(base: str) -> PreTrainedModel:
    return load_full_attention_model(base, None, torch.float32)


def is_tied(base: str) -> bool:
    return bool(json.loads((Path(base) / "config.json").read_text())["tie_word_embeddings"])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@torch.no_grad()
def train(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def save(
    model: PeftModel, folder: Path, base: str, *, with_embeddings: bool | Literal["auto"] = "auto"
) -> Path:
    # peft would also save adapted embeddings of the base model
    model.save_pretrained(str(folder), save_embedding_layers=with_embeddings)
    change_config(folder, {"base_model_name_or_path": base})
    return folder


def change_config(folder: Path, entries: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("name", [*EXACT, *EXACT_IF_NOT_TIED])
def test_an_adapter_is_read_back_exactly_or_refused_before_training(
    base: str, tmp_path: Path, name: str
) -> None:
    options = {"r": 4} | (EXACT | EXACT_IF_NOT_TIED)[name]
    if is_tied(base) and name in EXACT_IF_NOT_TIED:
        with pytest.raises(UserError, match=r"^train\.lora cannot be used: it adapts (lm_head|model\.embed)"):
            add_adapter(open_base(base), options, seed=0)
        return
    add_adapter(build_meta_model(load_config(base)), options, seed=0)  # as before a run
    model = add_adapter(open_base(base), options, seed=0)
    train(model)
    expected = logits(model)
    assert (expected - logits(open_base(base))).norm() > 1e-2 * expected.norm()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    folder = save(model, tmp_path / "adapter", base)
    loaded = load_adapter(open_base(base), folder, weights)
    assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert_close(logits(merge_adapter(open_base(base), folder)), expected, rtol=1e-4, atol=1e-5)
    without_base = load_adapter(build_meta_model(load_config(base)), folder, weights)
    alone = save(without_base, tmp_path / "alone", base, with_embeddings=False)
    assert_close(logits(merge_adapter(open_base(base), alone)), expected, rtol=1e-4, atol=1e-5)
    loaded.merge_and_unload().save_pretrained(tmp_path / "export")
    assert_close(logits(open_base(str(tmp_path / "export"))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_trained_exactly_are_refused_before_training(base: str, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=f"^train\\.lora cannot be used: .*{message}") as error:
        add_adapter(open_base(base), options, seed=0)
    assert "\n" not in str(error.value)


def test_every_option_is_tested_or_refused() -> None:
    tested = {name for options in EXACT.values() for name in options}
    refused = {name for options, _ in REFUSED.values() for name in options}
    assert set(OPTIONS) <= tested
    assert refused - set(OPTIONS) <= set(LoraConfig.__dataclass_fields__) | {"foo", "r:8"}


@pytest.mark.parametrize("name", TOKENS)
def test_an_adapter_of_peft_with_single_tokens_is_read_exactly(base: str, tmp_path: Path, name: str) -> None:
    model = get_peft_model(open_base(base), LoraConfig(task_type="CAUSAL_LM", **TOKENS[name]))
    train(model)
    expected = logits(model)
    folder = save(model, tmp_path, base)
    assert_close(logits(merge_adapter(open_base(base), folder)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*EXACT_IF_NOT_TIED, *TOKENS_IF_NOT_TIED])
def test_an_adapter_of_peft_on_tied_weights_is_refused(
    base: str, tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    options = {"r": 4, "target_modules": ["q_proj"]} | (EXACT_IF_NOT_TIED | TOKENS_IF_NOT_TIED)[name]
    model = get_peft_model(open_base(base), LoraConfig(task_type="CAUSAL_LM", **options))
    train(model)
    expected = logits(model)
    folder = save(model, tmp_path, base)
    if is_tied(base):
        recwarn.clear()
        warnings.simplefilter("always")
        with pytest.raises(UserError, match=r"it adapts (lm_head|model\.embed_tokens), but the model ties"):
            load_model(str(folder), backend="sdpa", dtype=torch.float32)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with pytest.raises(UserError, match="but the model ties"):
            load_adapter(open_base(base), folder, weights)
        assert not [warning for warning in recwarn if "tie_word_embeddings" in str(warning.message)]
    else:
        assert_close(logits(merge_adapter(open_base(base), folder)), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> Path:
    model = add_adapter(open_base(base), {"r": 4, "target_modules": ["q_proj", "up_proj"]}, seed=0)
    train(model)
    return save(model, tmp_path / "adapter", base)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def refusal(adapter: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(str(adapter), backend="sdpa", dtype=torch.float32)
    assert str(adapter) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if n != FIRST}, f"1 of 8 weights are missing ({FIRST})"),
        (lambda w: {n.removeprefix("base_model."): t for n, t in w.items()}, "8 of 8 weights are missing"),
        (lambda w: {f"module.{n}": t for n, t in w.items()}, "every name starts with module."),
        (lambda w: w | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, "1 weights are unexp"),
        (lambda w: w | {FIRST: torch.zeros(8, 32)}, "has (8, 32), it should have (4, 32)"),
        (lambda w: w | {FIRST: torch.zeros(4, 32, dtype=torch.int64)}, "has type I64"),
    ],
)
def test_tensors_that_an_adapter_lacks_or_does_not_need_are_refused(
    adapter: Path, change: Any, message: str
) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    assert message in refusal(adapter)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": 8}, "have another shape"),
        ({"rank_pattern": {"q_proj": 2}}, "have another shape"),
        ({"target_modules": ["q_proj"]}, "4 weights are unexpected"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "4 of 12 weights are missing"),
        ({"modules_to_save": ["norm"]}, "are missing"),
        ({"use_dora": True}, "4 of 12 weights are missing"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA is supported"),
        ({"peft_type": None}, "peft_type is None"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is not supported"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"option_of_the_future": True}, "option_of_the_future is not supported"),
        ({"r": -1}, "r is -1"),
        ({"use_rslora": "false"}, "use_rslora is 'false', it should be true or false"),
        ({"use_dora": 1}, "use_dora is 1, it should be true or false"),
        ({"bias": "some"}, "bias is 'some' (allowed: none, all, lora_only)"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1', it should be a number of at least 0"),
        ({"lora_dropout": 2}, "lora_dropout is 2"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1', it should be the number of a layer"),
        ({"layers_to_transform": [0, -1]}, "layers_to_transform is [0, -1]"),
        ({"target_modules": 3}, ""),
        ({"base_model_name_or_path": 3}, "it should name its base model"),
        ({"base_model_name_or_path": ""}, "it should name its base model"),
        ({"revision": 3}, "it should name its base model"),
    ],
)
def test_a_configuration_that_does_not_fit_the_adapter_is_refused(
    adapter: Path, entries: dict[str, Any], message: str
) -> None:
    change_config(adapter, entries)
    assert message in refusal(adapter)


def test_adapters_of_other_versions_of_peft_are_opened(base: str, adapter: Path) -> None:
    """Their files hold options that this version does not know, which are off."""
    expected = logits(merge_adapter(open_base(base), adapter))
    change_config(adapter, {"enable_lora": None, "merge_weights": False, "option_of_the_future": {}})
    assert torch.equal(logits(merge_adapter(open_base(base), adapter)), expected)


def test_an_adapter_of_another_base_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    for name, size in {"wide": {"hidden_size": 64}, "deep": {"num_hidden_layers": 3}}.items():
        LlamaForCausalLM(LlamaConfig(**(SIZE | size))).save_pretrained(tmp_path / name)
        change_config(adapter, {"base_model_name_or_path": str(tmp_path / name)})
        assert "have another shape" in refusal(adapter) or "are missing" in refusal(adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [(LFS_POINTER, "is a Git LFS pointer"), (WEB_PAGE, "is a web page"), (b"", "is empty"), (b"{", "")],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_in_place_of_an_adapter_is_named(
    adapter: Path, file: str, content: bytes, message: str
) -> None:
    (adapter / file).write_bytes(content)
    assert message in refusal(adapter)


def test_an_adapter_without_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert "it holds no weights (adapter_model.safetensors or adapter_model.bin)" in refusal(adapter)


def test_an_adapter_of_another_kind_is_refused(base: str, tmp_path: Path) -> None:
    model = get_peft_model(open_base(base), IA3Config(task_type="CAUSAL_LM"))
    assert "peft_type is 'IA3', only LORA is supported" in refusal(save(model, tmp_path, base))
