"""Compiled code is kept under the user's cache folder, unless the user's variable names another."""

import os
import pwd
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from blockft.training.compile_cache import INDUCTOR_CACHE, use_compile_cache


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(INDUCTOR_CACHE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("before", ["", default_cache_dir()], ids=["unset", "set by PyTorch itself"])
def test_the_folder_is_in_the_cache_of_the_user(
    cache_home: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INDUCTOR_CACHE, before)
    use_compile_cache()
    use_compile_cache()
    assert os.environ[INDUCTOR_CACHE] == cache_dir() == str(cache_home / "blockft/inductor")
    assert (cache_home / "blockft/inductor").is_dir()


def test_without_xdg_cache_home_it_is_in_the_home_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compile_cache()
    assert os.environ[INDUCTOR_CACHE] == str(tmp_path / ".cache/blockft/inductor")


def test_a_folder_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INDUCTOR_CACHE, str(tmp_path / "mine"))
    use_compile_cache()
    assert os.environ[INDUCTOR_CACHE] == str(tmp_path / "mine")


def test_a_folder_that_cannot_be_written_is_reported(
    cache_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache_home / "blockft").write_text("")
    use_compile_cache()
    assert os.environ[INDUCTOR_CACHE] == ""
    error = capsys.readouterr().err
    assert "compiled layers are not kept for later runs" in error and error.count("\n") == 1


def test_a_user_without_a_home_folder_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may run as a user that is not in its list of users."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def find_no_user(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", find_no_user)
    use_compile_cache()
    assert os.environ[INDUCTOR_CACHE] == ""
    assert "(the user has no home folder): set" in capsys.readouterr().err
