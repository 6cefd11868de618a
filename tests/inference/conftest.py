"""A model folder for all tests of inference."""

from pathlib import Path

import pytest

from tests.run import save_model


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that answers each prompt differently. Tests must not write there."""
    return save_model(tmp_path_factory.mktemp("model"), initializer_range=1.0)
