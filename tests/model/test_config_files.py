"""Configurations, tokenizers and code in model folders: used as meant, or refused in one line."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from blockft.errors import UserError
from blockft.model.load import load_config, load_full_attention_model, load_model, load_tokenizer
from blockft.model.supported import check_token_ids
from tests import commands
from tests.pointers import LFS_POINTER, WEB_PAGE
from tests.run import save_model, save_tokenizer, toy_recipe
from tests.tiny import CONFIGS, LLAMA3, SIZE, YARN, build_model

LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
FROM_LENGTH = "its frequencies depend on the prompt's length"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer, whose files may be changed."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, entries: dict[str, Any], file: str = "config.json") -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(folder: Path) -> str:
    """Return the message with which every reader of a config refuses a folder; it is one line."""
    messages = set()
    for load in (
        load_config,
        load_tokenizer,
        lambda path: load_model(path, backend="sdpa", dtype=torch.float32),
        lambda path: load_model(path, backend="sdpa", dtype=torch.float32, random_seed=0),
        lambda path: load_full_attention_model(path, None, torch.float32),
    ):
        with pytest.raises(UserError) as error:
            load(str(folder))
        messages.add(str(error.value))
    (message,) = messages
    assert str(folder) in message and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "su", **LONGROPE}, f"RoPE type 'longrope' is not supported ({FROM_LENGTH})"),
        ({"rope_type": "su"}, "RoPE type 'longrope' is not supported"),
        ({"rope_type": "longrope", **LONGROPE}, f"RoPE type 'longrope' is not supported ({FROM_LENGTH})"),
        ({"type": "dynamic", "factor": 2.0}, f"RoPE type 'dynamic' is not supported ({FROM_LENGTH})"),
        ({"type": "mrope", "mrope_section": [1, 1, 2]}, "RoPE type 'mrope' is not supported; supported: def"),
        ({"type": "proportional"}, "RoPE type 'proportional' is not supported; supported"),
        ({"type": 3}, "RoPE type 3 is not supported"),
        ({"type": None}, "RoPE type None is not supported"),
        ({"type": ["yarn"]}, "RoPE type ['yarn'] is not supported"),
        ("su", "has rope_scaling 'su', it should be an object"),
        ([1.0, 2.0], "has rope_scaling [1.0, 2.0], it should be an object"),
        ({"type": "linear"}, ""),
        ({"type": "linear", "factor": "8"}, "rope_scaling.factor '8', it should be a number greater than 0"),
        ({"type": "linear", "factor": 0}, "rope_scaling.factor 0"),
        ({"type": "linear", "factor": -2.0}, "rope_scaling.factor -2.0"),
        ({"type": "linear", "factor": [2.0, 2.0]}, "rope_scaling.factor [2.0, 2.0]"),
        ({"type": "linear", "factor": float("inf")}, "rope_scaling.factor inf"),
        ({"type": "linear", "factor": float("nan")}, "rope_scaling.factor nan"),
        ({"type": "linear", "factor": True}, "rope_scaling.factor True"),
        ({k: v for k, v in LLAMA3.items() if k != "factor"}, ""),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor 1.0, it should be less than high_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": "512"}, "original_max_position_embeddings '512'"),
        (YARN | {"beta_fast": 1, "beta_slow": 32}, "beta_slow 32, it should be less than beta_fast 1"),
        ({"sliding_attention": {"rope_type": "su"}, "full_attention": {}}, "RoPE type 'longrope'"),
    ],
)
def test_rope_parameters_that_cannot_be_used_are_refused(folder: Path, rope: Any, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported; supported: llama"),
        ({"model_type": "no-such-model"}, ""),
        ({"model_type": None}, "has model_type None; supported: llama"),
        ({"model_type": ["llama"]}, "has model_type ['llama']"),
        ({"hidden_size": None}, "has hidden_size None, it should be a number from 1 to 2147483648"),
        ({"hidden_size": -32}, "has hidden_size -32"),
        ({"hidden_size": 0}, "has hidden_size 0"),
        ({"hidden_size": 32.0}, "has hidden_size 32.0"),
        ({"hidden_size": "32"}, "has hidden_size '32'"),
        ({"hidden_size": 10**400}, "has hidden_size 1000"),
        ({"hidden_size": 33}, ""),
        ({"num_attention_heads": 3}, ""),
        ({"num_attention_heads": 2**60}, "has num_attention_heads 1152921504606846976"),
        ({"num_key_value_heads": 3}, "it should be a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "has num_key_value_heads 0"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000"),
        ({"num_hidden_layers": True}, "has num_hidden_layers True"),
        ({"vocab_size": -1}, "has vocab_size -1"),
        ({"vocab_size": []}, "has vocab_size []"),
        ({"max_position_embeddings": 1e400}, "has max_position_embeddings inf"),
        ({"rms_norm_eps": "x"}, "has rms_norm_eps 'x'"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps nan"),
        ({"rope_theta": 0}, "has rope_theta 0"),
        ({"hidden_act": "no-such-function"}, ""),
        ({"hidden_act": 3}, ""),
        ({"attention_bias": "x" * 10_000}, ""),
        (
            {"pad_token_id": 9999},
            "has pad_token_id 9999, but the model's vocab_size is 261: ids are 0",
        ),
        ({"pad_token_id": -1}, "has pad_token_id -1"),
        ({"eos_token_id": 261}, "has eos_token_id 261"),
        ({"eos_token_id": [1, 9999]}, "has eos_token_id [1, 9999]"),
        ({"eos_token_id": [None]}, ""),
        ({"bos_token_id": "1"}, ""),
        ({"bos_token_id": 1.5}, ""),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "describes quantised weights"),
        ({"quantization_config": {}}, "describes quantised weights"),
        ({"torch_dtype": "auto"}, "has torch_dtype 'auto', it should be the name of a type such as bfloat16"),
        ({"dtype": 16}, "has dtype 16"),
        ({"dtype": "load"}, "has dtype 'load'"),
        ({"transformers_weights": "other.safetensors"}, "names other weights (transformers_weights)"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    folder: Path, entries: dict[str, Any], message: str
) -> None:
    change(folder, entries)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b'{"model_type": "llama"', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "is [], it should be an object"),
        (b"null", "is None, it should be an object"),
        (b'"llama"', "is 'llama', it should be an object"),
        (b"{}", "has model_type None"),
        (LFS_POINTER, "config.json is a Git LFS pointer: fetch the file with git lfs pull"),
        (WEB_PAGE, "config.json is a web page"),
    ],
)
def test_a_config_that_is_no_object_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256, "finetuned": True},
        YARN | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0, "attention_factor": None},
        {"type": "default", "mrope_section": [1, 1, 2]},
        {},
    ],
)
def test_rope_parameters_of_published_models_are_read(folder: Path, rope: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": rope, "rope_theta": 10000.0}))
    load_model(str(folder), backend="sdpa", dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_every_family_are_opened(tmp_path: Path, name: str) -> None:
    build_model(name).save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).model_type == CONFIGS[name]().model_type


@pytest.mark.parametrize(
    "entries",
    [{"eos_token_id": 9999}, {"eos_token_id": [1, -1]}, {"pad_token_id": 261}, {"bos_token_id": 300}],
)
def test_special_tokens_of_a_generation_config_are_tokens(folder: Path, entries: dict[str, Any]) -> None:
    change(folder, entries, "generation_config.json")
    with pytest.raises(UserError, match=r"its generation_config\.json has (eos|pad|bos)_token_id"):
        load_model(str(folder), backend="sdpa", dtype=torch.float32)


# --- code in a model folder

EVIL = "import pathlib\npathlib.Path(__file__).with_name('evil').mkdir()\n"
AUTO_MAP = {
    "AutoConfig": "evil_code.Config",
    "AutoModelForCausalLM": "evil_code.Model",
    "AutoTokenizer": ["evil_code.Tokenizer", None],
}


@pytest.mark.parametrize("model_type", ["llama", "llama_with_code"])
def test_code_in_a_model_folder_never_runs_and_nobody_is_asked(folder: Path, model_type: str) -> None:
    """On a terminal as well. A family that transformers knows is opened without the code."""
    (folder / "evil_code.py").write_text(EVIL)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL)
    change(folder, {"auto_map": AUTO_MAP, "model_type": model_type, "_attn_implementation": "a/b"})
    change(folder, {"auto_map": AUTO_MAP}, "tokenizer_config.json")
    request = json.dumps({"documents": ["a=1"], "question": "a?"})
    (folder / "request.jsonl").write_text(request + "\n")
    words = ["generate", folder, "--input", folder / "request.jsonl", "--max-new-tokens", "2"]
    controller, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "blockft", *map(str, words)],
        cwd=commands.ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        text=True,
        timeout=commands.TIMEOUT_S,
    )
    os.close(terminal)
    os.close(controller)
    assert done.returncode == (0 if model_type == "llama" else 2), done.stderr
    assert "[y/N]" not in done.stderr and "Traceback" not in done.stderr
    if model_type != "llama":
        assert "it needs code of its own (auto_map), and blockft never runs code" in done.stderr
    assert not list(folder.rglob("evil"))


# --- tokenizers


def lengthen(folder: Path, *tokens: str, special: bool = False) -> PreTrainedTokenizerBase:
    """Add tokens to the tokenizer of a folder, whose model has no embedding for them."""
    tokenizer = save_tokenizer(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused_by_every_command(
    tmp_path: Path, special: bool
) -> None:
    toy_recipe(tmp_path)
    recipe, model = tmp_path / "recipe.yaml", tmp_path / "model"
    assert commands.blockft("prepare", recipe).returncode == 0
    lengthen(model, "<extra>", "<more>", special=special)
    (tmp_path / "request.jsonl").write_text(json.dumps({"documents": ["a=1"], "question": "a?"}) + "\n")
    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": "a=1"}) + "\n")
    for words in (
        ["prepare", recipe, f"data.output_dir={tmp_path}/data2"],
        ["train", recipe, "--dry-run"],
        ["train", recipe],
        ["generate", model, "--input", tmp_path / "request.jsonl"],
        ["eval", model, recipe],
        ["cache", "build", model, tmp_path / "documents.jsonl", "--cache", tmp_path / "blocks"],
    ):
        done = commands.blockft(*words)
        assert done.returncode == 2, (words, done.stderr)
        assert (
            "its tokenizer has 2 tokens that the model has no embedding for (the first is '<extra>' with"
            in (done.stderr)
        )
    assert {path.name for path in tmp_path.iterdir()} == {
        *(
            "data",
            "data.cache",
            "data.log",
            "documents.jsonl",
            "heldout.jsonl",
            "model",
            "recipe.yaml",
            "request.jsonl",
            "train.jsonl",
        )
    }


def test_tokens_of_media_may_lack_an_embedding_until_they_occur(folder: Path) -> None:
    """Gemma 3 for text alone has the tokenizer of the models that read images."""
    tokenizer = lengthen(folder, "<image_soft_token>", special=True)
    change(folder, {"image_token": "<image_soft_token>"}, "tokenizer_config.json")
    opened = load_tokenizer(str(folder))
    assert len(opened) == len(tokenizer) == load_config(str(folder)).vocab_size + 1
    ids = opened.encode("a<image_soft_token>b")
    with pytest.raises(UserError, match=f"a prompt has token id {len(tokenizer) - 1}, but the model has emb"):
        check_token_ids(ids, load_config(str(folder)).vocab_size, "a prompt")
    done = commands.blockft("generate", folder, "--input", write_blocks(folder, "a<image_soft_token>b"))
    assert done.returncode == 2 and "a prompt has token id" in done.stderr


def write_blocks(folder: Path, text: str) -> Path:
    path = folder / "request.jsonl"
    path.write_text(json.dumps({"blocks": [text, "question"]}) + "\n")
    return path


def test_prepared_ids_without_an_embedding_are_refused(tmp_path: Path) -> None:
    """Of a tokenizer that lists its long end as tokens of media."""
    toy_recipe(tmp_path)
    recipe, small = tmp_path / "recipe.yaml", tmp_path / "small"
    assert commands.blockft("prepare", recipe).returncode == 0
    tokenizer = save_tokenizer(small)
    markup = {"image_token": "<|assistant|>", "video_token": "<|user|>", "audio_token": "<|system|>"}
    size = len(tokenizer) - 3
    assert min(tokenizer.convert_tokens_to_ids(list(markup.values()))) == size
    LlamaForCausalLM(LlamaConfig(**(SIZE | {"vocab_size": size}))).save_pretrained(small)
    change(small, markup, "tokenizer_config.json")
    done = commands.blockft("train", recipe, f"model.path={small}", "--dry-run")
    assert done.returncode == 2 and f"an example of {tmp_path}/data has token id" in done.stderr


def test_a_vocabulary_that_is_not_read_may_be_a_pointer(folder: Path) -> None:
    for name in ("tokenizer.model", "vocab.json", "merges.txt"):
        (folder / name).write_bytes(LFS_POINTER)
    load_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model is a Git LFS pointer"):
        load_tokenizer(str(folder))


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer \(tokenizer\.json\)"):
        load_tokenizer(str(folder))


def test_an_adapter_without_a_tokenizer_has_that_of_its_base_model(original: Path, tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(original)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    found, expected = load_tokenizer(str(tmp_path)), load_tokenizer(str(original))
    assert found.get_vocab() == expected.get_vocab() and found.chat_template == expected.chat_template


@pytest.mark.parametrize("content", [LFS_POINTER, WEB_PAGE, b"", b"{", b"\xff"])
def test_a_damaged_generation_config_is_refused(folder: Path, content: bytes) -> None:
    """transformers would go on without it, and stop at other tokens."""
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"generation_config\.json is (a Git|a web|empty|not JSON)"):
        load_model(str(folder), backend="sdpa", dtype=torch.float32)


@pytest.mark.parametrize("content", [LFS_POINTER, WEB_PAGE, b""])
def test_a_file_in_place_of_a_chat_template_is_refused(folder: Path, content: bytes) -> None:
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(UserError, match=r"chat_template\.jinja is (a Git|a web|empty)"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "is a Git LFS pointer: fetch the file with git lfs pull"),
        (WEB_PAGE, "is a web page"),
        (b"", "is empty"),
        (b"{", ""),
        (b"[]", ""),
        (b"null", ""),
    ],
)
def test_a_damaged_tokenizer_is_refused(folder: Path, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value)
