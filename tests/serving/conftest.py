"""A model folder for the tests of the front end, and an environment with vLLM for those of real servers."""

from pathlib import Path

import pytest

from tests.run import save_model
from tests.serving.vllm_environment import vllm_python


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model. Tests must not write there."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def vllm_environment() -> str:
    """The Python of an environment with vLLM. Tests without one are skipped, before a server starts."""
    return vllm_python()
