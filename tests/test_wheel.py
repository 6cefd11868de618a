"""The package works from an installed wheel, outside of the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.readmes import DEMO_MODEL, ROOT, write_own_data

pytestmark = pytest.mark.slow  # builds the wheel in an environment of its own and starts several interpreters


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. Skips where pip cannot get the build backend, for example because a network fails."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], capture_output=True, text=True
    )
    if done.returncode and "build dependencies" in done.stderr:
        pytest.skip("the build backend hatchling cannot be installed")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("blockft-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; its dependencies are those of this interpreter."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder, wheel], check=True)
    return folder


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    """Run `blockft ARGUMENTS` of the installed wheel in a folder and return what it prints."""
    code = "import sys, blockft.cli; assert blockft.__file__.startswith(sys.argv.pop(1)); blockft.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_ships_types_recipes_and_schema(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {
        f"blockft/recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.*")
    }
    assert recipes | {"blockft/py.typed", "blockft/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "data/"))]


def test_commands_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert "prepare" in run(installed, tmp_path, "--help")
    assert "own-data" in run(installed, tmp_path, "recipes")
    assert "data.row_len" in run(installed, tmp_path, "config")
    assert "row_len: 512" in run(installed, tmp_path, "config", "demo")
    assert "zero3" in run(installed, tmp_path, "config", "own-data", "train.deepspeed=zero3")


def test_data_are_prepared_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """With a recipe that ships, over files of the reader."""
    write_own_data(tmp_path)
    run(installed, tmp_path, "prepare", "own-data", f"model.path={DEMO_MODEL}")
    assert (tmp_path / "out" / "mine" / "data" / "manifest.json").is_file()
