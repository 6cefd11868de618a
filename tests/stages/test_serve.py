"""`blockft serve` up to the start of vLLM: the description of a model, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.mistral import MistralConfig, MistralForCausalLM

from blockft.inference.engine import Engine
from blockft.inference.runner import CacheOptions
from blockft.serving.served_model import ServedModel
from blockft.stages import serve as stage
from blockft.stages.serve import describe_model
from tests.commands import blockft
from tests.inference.engines import load_engine, options
from tests.run import save_model, save_tokenizer
from tests.tiny import SIZE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def describe(model: Path, cache: Path, dtype: torch.dtype = torch.float32) -> ServedModel:
    return describe_model(str(model), CacheOptions(folder=cache, host_bytes=1), dtype, socket_folder="/tmp")


def test_a_server_finds_the_blocks_that_an_engine_stored(model: Path, tmp_path: Path) -> None:
    with load_engine(model, cache=options(tmp_path)) as engine:
        engine.generate(documents=["a", "b"], question="?", max_new_tokens=1)
    by_blockft, by_vllm = describe(model, tmp_path).open_disk_tiers()
    assert len(by_blockft.digests()) == 4 and not by_vllm.digests()


def test_the_description_has_the_rotations_of_the_model(model: Path, tmp_path: Path) -> None:
    served = describe(model, tmp_path)
    with Engine.load(model, device="cpu") as engine:
        expected = engine.runner._rotaries
    assert len(served.rotaries) == len(expected) == served.shape.num_layers
    for found, rotary in zip(served.rotaries, expected, strict=True):
        assert torch.equal(found.inv_freq, rotary.inv_freq)


def test_another_type_has_other_blocks(model: Path, tmp_path: Path) -> None:
    half = describe(model, tmp_path, torch.bfloat16)
    assert half.shape.dtype == "bfloat16"
    assert half.fingerprint != describe(model, tmp_path).fingerprint


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Accept the version of vLLM; record the options of a server instead of starting it."""
    started: list[list[str]] = []
    monkeypatch.setattr(stage, "check_version", lambda: None)
    monkeypatch.setattr(stage, "run_server", lambda served, folder, options: started.append(options) or 5)
    return started


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--page-writer", "triton"], {}, "--page-writer triton needs a GPU, and there is none here"),
        ([], {"BLOCKFT_PAGE_WRITER": "triton"}, "--page-writer triton needs a GPU, and there is none here"),
        ([], {"BLOCKFT_PAGE_WRITER": "cuda"}, "BLOCKFT_PAGE_WRITER is 'cuda' (allowed: auto, torch, triton)"),
        (["--page-writer", "torch"], {"BLOCKFT_PAGE_WRITER": "triton"}, "vLLM is not installed here"),
    ],
)
def test_a_page_writer_that_cannot_be_used_ends_the_start(
    model: Path, tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    ended = blockft("serve", model, "--cache", tmp_path / "cache", *arguments, **environment)
    assert ended.returncode == 2 and message in " ".join(ended.stderr.split())
    assert not (tmp_path / "cache").exists()


def test_vllm_must_be_installed(model: Path, tmp_path: Path) -> None:
    ended = blockft("serve", model, "--cache", tmp_path / "cache")
    assert ended.returncode == 2 and "vLLM is not installed here" in ended.stderr
    assert not (tmp_path / "cache").exists()


def test_options_of_vllm_are_passed_on(without_vllm: list[list[str]], model: Path, tmp_path: Path) -> None:
    ended = blockft(
        "serve", model, "--cache", tmp_path, "--port", "80", "--host-bytes", "1MB", "--max-num-seqs=3"
    )
    assert ended.returncode == 5, "the exit code is that of vLLM"
    assert without_vllm == [["--port", "80", "--max-num-seqs=3"]]
    assert "0 blocks by blockft" in ended.stderr


def test_a_reserved_option_is_refused_at_once(
    without_vllm: list[list[str]], model: Path, tmp_path: Path
) -> None:
    ended = blockft("serve", model, "--cache", tmp_path / "cache", "--enable-lora")
    assert ended.returncode == 2 and "--enable-lora is not allowed" in ended.stderr
    assert not without_vllm and not (tmp_path / "cache").exists()


def test_a_model_with_local_positions_is_refused(
    without_vllm: list[list[str]], model: Path, tmp_path: Path
) -> None:
    local = save_model(tmp_path / "local")
    config = json.loads((local / "config.json").read_text())
    config["block_attention"] = {"version": 1, "position_scheme": "local"}
    (local / "config.json").write_text(json.dumps(config))
    ended = blockft("serve", local, "--cache", tmp_path / "cache")
    assert ended.returncode == 2 and "position_scheme local" in ended.stderr
    assert not without_vllm and not (tmp_path / "cache").exists()


def test_a_model_whose_layers_all_have_a_window_is_refused(
    without_vllm: list[list[str]], tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path / "model")
    size = SIZE | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = MistralConfig(**size, sliding_window=9, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    ended = blockft("serve", tmp_path / "model", "--cache", tmp_path / "cache")
    assert ended.returncode == 2 and "sliding window" in ended.stderr
    assert not without_vllm and not (tmp_path / "cache").exists()
