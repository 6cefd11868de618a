"""A hostfile for tests of launches."""

from pathlib import Path

import pytest


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    """A hostfile of two hosts, both of which are this machine."""
    path = tmp_path / "hosts"
    path.write_text("here slots=1\nthere slots=1\n")
    return path
