"""Models, adapters, types and devices that can be opened, and the errors for the others."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.config.choices import DType
from blockft.errors import UserError
from blockft.model.decoder_layers import (
    attention_windows,
    compile_layers,
    list_layers,
    restore_frequencies,
    rotary_embeddings,
)
from blockft.model.load import load_config, load_model, load_tokenizer, parse_device, parse_dtype
from blockft.model.lora import add_adapter
from blockft.model.supported import block_attention_config, check_supported, uses_reencoded_positions
from tests.tiny import CONFIGS, SIZE, build_model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tested_family_is_supported(name: str) -> None:
    check_supported(CONFIGS[name]())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "gpt2"),
        (
            LlamaConfig(**SIZE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "dynamic",
        ),
        (Gemma3TextConfig(**SIZE, attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (Gemma3TextConfig(**SIZE, use_bidirectional_attention=True), "use_bidirectional_attention"),
    ],
)
def test_untested_families_and_settings_are_refused(config: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_supported(config)


def test_gemma3_has_two_rotary_embeddings() -> None:
    local, full = rotary_embeddings(build_model("gemma3"))
    assert not torch.equal(local.inv_freq, full.inv_freq)


def test_a_saved_model_is_opened_with_its_weights(tmp_path: Path) -> None:
    model = build_model("llama")
    model.save_pretrained(tmp_path)
    opened = load_model(str(tmp_path), backend="sdpa", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), opened.parameters(), strict=True))
    drawn = load_model(str(tmp_path), backend="sdpa", dtype=torch.float32, random_seed=1)
    assert not torch.equal(drawn.lm_head.weight, opened.lm_head.weight)


@pytest.mark.parametrize("path", ["no/such/folder/here", "./missing", "/missing", "owner/not-cached"])
def test_the_error_about_a_missing_model_is_one_line(path: str) -> None:
    for load in (load_tokenizer, lambda p: load_model(p, backend="sdpa", dtype=torch.float32)):
        with pytest.raises(UserError) as error:
            load(path)
        assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("num_bytes", [-1, 5000, 4, 0])
def test_the_error_about_truncated_weights_is_one_line(tmp_path: Path, num_bytes: int) -> None:
    model = build_model("llama")
    model.save_pretrained(tmp_path / "model")
    add_adapter(model, {}, seed=0).save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(settings.read_text()) | {"base_model_name_or_path": str(tmp_path / "model")}
    settings.write_text(json.dumps(config))
    for weights in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        path = tmp_path / weights
        os.truncate(path, num_bytes % path.stat().st_size)
        with pytest.raises(UserError, match=f"{path.parent}' cannot be opened: ") as error:
            load_model(str(path.parent), backend="sdpa", dtype=torch.float32)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 1}'])
def test_an_adapter_that_names_no_base_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json is not the configuration of an adapter"):
        load_config(str(tmp_path))


WORDING = {"instruction": "Read.", "document": "{text}", "question": "{question}"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"version": 9}, r"has version 9 \(allowed: 1\)"),
        ({"version": "1"}, "has version '1'"),
        ({"sink_tokens": 4}, r"has sink_tokens 4 \(allowed: 0\)"),
        ({"local_sees_first": "yes"}, r"has local_sees_first 'yes' \(allowed: False, True\)"),
        ({"position_scheme": "sideways"}, "has position_scheme 'sideways'"),
        (
            {"position_scheme": "local", "local_sees_first": True},
            "has local_sees_first true with position_scheme local",
        ),
        ({"documents_in": "tool"}, r"has documents_in 'tool' \(allowed: system, user\)"),
        ({"order": ["given"]}, "has order"),
        ({"prompt": "{question}"}, "has a prompt that does not have exactly the texts instruction"),
        ({"prompt": WORDING | {"question": None}}, "has a prompt that"),
        ({"prompt": WORDING | {"answer": ""}}, "has a prompt that"),
        ({"prompt": WORDING, "order": "given"}, "has a prompt, but no documents_in"),
        ("yes", "its block_attention is 'yes'"),
        ([], r"its block_attention is \[\]"),
    ],
)
def test_an_export_of_another_version_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    model = build_model("llama")
    model.config.block_attention = entry
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{message}"):
        load_config(str(tmp_path))
    with pytest.raises(UserError, match=message):
        uses_reencoded_positions(model.config)


@pytest.mark.parametrize(
    ("text", "message"), [('{"version": 2}', "has version 2"), ('{"vers', "is not JSON")]
)
def test_an_error_about_the_file_of_an_adapter_names_the_adapter(
    tmp_path: Path, text: str, message: str
) -> None:
    model = build_model("llama")
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "adapter"
    add_adapter(model, {}, seed=0).save_pretrained(folder)
    settings = folder / "adapter_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(tmp_path / "model")})
    )
    (folder / "block_attention.json").write_text(text)
    with pytest.raises(UserError, match=f"^{folder}.* {message}"):
        load_config(str(folder))


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"position_scheme": "local"},
        {"version": 1, "sink_tokens": 0, "local_sees_first": False, "documents_in": "user", "order": "given"},
        {"prompt": WORDING, "documents_in": "system", "order": "ascending", "note": "mine"},
    ],
)
def test_the_entry_of_an_export_is_read(entry: dict[str, Any]) -> None:
    config = build_model("llama").config
    assert block_attention_config(config) == {}
    config.block_attention = entry
    assert block_attention_config(config) == entry


@pytest.mark.parametrize("name", CONFIGS)
def test_the_windows_of_a_model_are_those_of_its_layers(name: str) -> None:
    windows = []

    class RecordingMasks(AttentionMasks):
        def dense(self, window: int | None, num_queries: int) -> torch.Tensor:
            windows.append(window)
            return super().dense(window, num_queries)

    model, metadata = build_model(name), build_metadata([Layout((3, 4))])
    model(
        input_ids=torch.ones(1, 7, dtype=torch.int64), block_masks=RecordingMasks(metadata), use_cache=False
    )
    assert set(windows) == set(attention_windows(model.config))


@pytest.mark.parametrize("without_hooks", [False, True])
def test_compiled_layers_give_the_same_logits(without_hooks: bool) -> None:
    model, metadata = build_model("mistral-window"), build_metadata([Layout((3, 4)), Layout((5,))])
    model_inputs = {
        "input_ids": torch.arange(1, 13)[None],
        "position_ids": metadata.position_ids,
        "use_cache": False,
    }
    masks = [AttentionMasks(metadata).build("block_sdpa", attention_windows(model.config)) for _ in range(2)]
    with torch.no_grad():
        expected = model(**model_inputs, block_masks=masks[0]).logits
        compile_layers(model, without_hooks=without_hooks)
        assert_close(model(**model_inputs, block_masks=masks[1]).logits, expected, rtol=1e-5, atol=1e-5)


def test_hooks_of_layers_can_stay_outside_of_their_compiled_code() -> None:
    """As those of ZeRO-3 do, which gather the weights of a layer."""
    model, metadata = build_model("llama"), build_metadata([Layout((3, 4))])
    calls: list[bool] = []
    for layer in list_layers(model):
        layer.register_forward_pre_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    compile_layers(model, without_hooks=True)
    counters.clear()
    masks = AttentionMasks(metadata).build("block_sdpa", attention_windows(model.config))
    with torch.no_grad():
        ids_BT = torch.arange(1, 8)[None]
        model(ids_BT, position_ids=metadata.position_ids, block_masks=masks, use_cache=False)
    assert calls == [False] * model.config.num_hidden_layers
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_names_of_types_and_devices_are_parsed() -> None:
    assert parse_dtype("bfloat16", None) is torch.bfloat16 and parse_dtype("auto", None) is None
    assert parse_dtype(DType.auto, torch.float32) is torch.float32
    for name in ("float33", "int8", "load"):
        with pytest.raises(UserError, match=f"dtype is '{name}' .allowed: auto, float32, bfloat16"):
            parse_dtype(name, None)
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"there is no device '{name}': "):
            parse_device(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_gets_the_frequencies_of_its_configuration_in_float32(name: str) -> None:
    """Libraries may have rounded them to 16 bits."""
    model, expected = build_model(name), build_model(name)
    rotary = model.base_model.rotary_emb.to(torch.bfloat16)
    assert any(buffer.dtype is torch.bfloat16 for buffer in rotary.buffers())
    restore_frequencies(model)
    for buffer_name, buffer in expected.base_model.rotary_emb.named_buffers():
        restored = rotary.get_buffer(buffer_name)
        assert restored.dtype is torch.float32 and torch.equal(restored, buffer)
