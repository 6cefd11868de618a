"""Commands that read prepared data keep `prepare --overwrite` away, and are refused beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockft import folder_lock
from blockft.data import prepared
from blockft.errors import UserError
from blockft.folder_lock import FolderInUse, lock_folder
from blockft.stages import doctor
from blockft.stages.prepare import prepare
from tests.commands import blockft
from tests.run import toy_recipe

Read = Callable[[Path], None]


def command(*arguments: str) -> Read:
    """Return a function that runs a command on the toy in a folder; it must succeed."""

    def read(folder: Path) -> None:
        done = blockft(*(word.format(folder) for word in arguments))
        if done.returncode:
            raise UserError(done.stderr)

    return read


READERS: dict[str, Read] = {
    "blockft inspect": command("inspect", "{}/data"),
    "blockft train": command("train", "{}/recipe.yaml", "--dry-run", "--gpu-memory", "80GB"),
    "blockft prepare": command("prepare", "{}/recipe.yaml", "--overwrite"),  # prints a summary at its end
    "blockft doctor": lambda folder: print(doctor._check_recipe(toy_recipe(folder), 1)),
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    prepare(toy_recipe(tmp_path))
    return tmp_path


def let_prepare_try(folder: Path, place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `prepare --overwrite` try to replace the data before each call of a function; list its errors."""
    work, errors = getattr(place, name), []

    def try_and_work(*arguments: Any, **options: Any) -> Any:
        try:
            prepare(toy_recipe(folder, "data.sources.0.max_samples=5"), overwrite=True)
        except FolderInUse as error:
            errors.append(str(error))
        return work(*arguments, **options)

    monkeypatch.setattr(place, name, try_and_work)
    return errors


@pytest.mark.parametrize("action", READERS)
def test_data_are_not_replaced_while_they_are_read(
    action: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = let_prepare_try(toy, prepared, "verify_files", monkeypatch)
    READERS[action](toy)
    assert len(errors) == 1 and f"({action.replace('doctor', 'train')}): wait for it" in errors[0]


def test_data_are_not_replaced_before_the_samples_of_a_page_are_read(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = let_prepare_try(toy, prepared.PreparedData, "read_samples", monkeypatch)
    command("inspect", "{}/data", "--html", "{}/page.html")(toy)
    assert errors and "(blockft inspect): wait for it" in errors[0]


@pytest.mark.parametrize("action", READERS)
def test_data_that_are_being_replaced_are_not_read(
    action: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_HOLDER_S", 0)
    with (
        lock_folder(toy / "data", "blockft prepare"),
        pytest.raises(UserError, match=r"data is being written by process .* \(blockft prepare\): wait"),
    ):
        READERS[action](toy)
