"""A model folder for the tests of the front end."""

from pathlib import Path

import pytest

from tests.run import save_model


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model. Tests must not write there."""
    return save_model(tmp_path_factory.mktemp("model"))
