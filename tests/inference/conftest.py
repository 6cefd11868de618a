"""A model with its tokenizer, in a folder."""

from pathlib import Path

import pytest

from tests.run import save_model


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that answers each prompt differently; nobody writes there."""
    return save_model(tmp_path_factory.mktemp("model"), initializer_range=1.0)
