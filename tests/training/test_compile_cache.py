"""Compiled code is kept under the user's cache folder, unless the user's variables name another."""

import os
from pathlib import Path

import pytest

from blockft.training.compile_cache import INDUCTOR_CACHE, TRITON_CACHE, use_compile_cache


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    # set and deleted, so that monkeypatch restores the variables after the test
    for name in (INDUCTOR_CACHE, TRITON_CACHE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_folder_is_in_the_cache_of_the_user(cache_home: Path) -> None:
    use_compile_cache()
    use_compile_cache()
    assert os.environ[INDUCTOR_CACHE] == str(cache_home / "blockft/inductor")
    assert os.environ[TRITON_CACHE] == str(cache_home / "blockft/triton")
    assert (cache_home / "blockft/inductor").is_dir()


def test_variables_of_the_user_stay(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INDUCTOR_CACHE, "/somewhere")
    use_compile_cache()
    assert os.environ[INDUCTOR_CACHE] == "/somewhere"
    assert os.environ[TRITON_CACHE] == str(cache_home / "blockft/triton")


def test_a_folder_that_cannot_be_written_is_reported(
    cache_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache_home / "blockft").write_text("")
    use_compile_cache()
    assert INDUCTOR_CACHE not in os.environ
    assert "compiled layers are not kept for later runs" in capsys.readouterr().err
