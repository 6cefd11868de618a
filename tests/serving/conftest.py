"""A model folder for the tests of the front end, and an environment with vLLM for those of real servers."""

from pathlib import Path

import pytest

from tests.run import save_model
from tests.serving.vllm_environment import vllm_python

LIMITS = (
    "block_sets.ARRIVAL_S",
    "device_record.COMPUTED_S",
    "front_end.FAILURE_TIMEOUT_S",
    "front_end.REPORT_TIMEOUT_S",
    "missing_blocks.KNOWN_S",
    "missing_blocks.REPORT_TIMEOUT_S",
    "report.SEND_TIMEOUT_S",
    "worker_half.IN_STEP_WAIT_S",
)
"""Limits of waits, in seconds."""


@pytest.fixture(autouse=True)
def long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server does not wait for, because an answer would be late, may take minutes in a test."""
    for limit in LIMITS:
        monkeypatch.setattr(f"blockft.serving.{limit}", 600)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model. Tests must not write there."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def vllm_environment() -> str:
    """The Python of an environment with vLLM. Tests without one are skipped, before a server starts."""
    return vllm_python()
