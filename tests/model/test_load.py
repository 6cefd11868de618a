"""Which models are opened, and what is said to those that are not."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig

from blockft.attention.backends import BlockMasks
from blockft.attention.layout import Layout, lay_out
from blockft.config import Precision
from blockft.errors import UserError
from blockft.model.load import (
    attention_windows,
    check_supported,
    compile_layers,
    device_of,
    dtype_of,
    load_model,
    load_tokenizer,
    rotations,
)
from tests.tiny import CONFIGS, SIZE, build_model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_of_law_4_is_supported(name: str) -> None:
    check_supported(CONFIGS[name]())


@pytest.mark.parametrize(
    ("config", "named"),
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
def test_what_no_law_covers_is_refused(config: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_supported(config)


def test_gemma3_has_two_rotations() -> None:
    local, globally = rotations(build_model("gemma3"))
    assert not torch.equal(local.inv_freq, globally.inv_freq)


def test_a_saved_model_is_opened_with_its_weights(tmp_path: Path) -> None:
    model = build_model("llama")
    model.save_pretrained(tmp_path)
    opened = load_model(str(tmp_path), backend="sdpa", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), opened.parameters(), strict=True))
    drawn = load_model(str(tmp_path), backend="sdpa", dtype=torch.float32, random_seed=1)
    assert not torch.equal(drawn.lm_head.weight, opened.lm_head.weight)


@pytest.mark.parametrize("path", ["no/such/folder/here", "./missing", "/missing", "owner/not-cached"])
def test_a_missing_model_is_one_sentence(path: str) -> None:
    for load in (load_tokenizer, lambda p: load_model(p, backend="sdpa", dtype=torch.float32)):
        with pytest.raises(UserError) as error:
            load(path)
        assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_windows_of_a_model_are_those_its_layers_ask_for(name: str) -> None:
    asked = []

    class Asked(BlockMasks):
        def dense(self, window: int | None, num_queries: int) -> torch.Tensor:
            asked.append(window)
            return super().dense(window, num_queries)

    model, vectors = build_model(name), lay_out([Layout((3, 4))])
    model(input_ids=torch.ones(1, 7, dtype=torch.int64), block_masks=Asked(vectors), use_cache=False)
    assert set(asked) == set(attention_windows(model.config))


def test_compiled_layers_give_the_same_logits() -> None:
    model, vectors = build_model("mistral-window"), lay_out([Layout((3, 4)), Layout((5,))])
    words = {"input_ids": torch.arange(1, 13)[None], "position_ids": vectors.position_ids, "use_cache": False}
    masks = [BlockMasks(vectors).build("block_sdpa", attention_windows(model.config)) for _ in range(2)]
    with torch.no_grad():
        plain = model(**words, block_masks=masks[0]).logits
        compile_layers(model)
        assert_close(model(**words, block_masks=masks[1]).logits, plain, rtol=1e-5, atol=1e-5)


def test_types_and_devices_have_names() -> None:
    assert dtype_of("bfloat16", None) is torch.bfloat16 and dtype_of("auto", None) is None
    assert dtype_of(Precision.auto, torch.float32) is torch.float32
    for name in ("float33", "int8", "load"):
        with pytest.raises(UserError, match=f"dtype is '{name}', allowed are auto, float32, bfloat16"):
            dtype_of(name, None)
    assert device_of("cpu") == torch.device("cpu")
    assert device_of(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"there is no device '{name}': "):
            device_of(name)
