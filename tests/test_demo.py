"""The demo gives the scores that the README states, and the README's commands run, training included."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import PYTHON_PATH
from tests.readmes import MAIN, ROOT, code_blocks, shell_commands, write_own_data

pytestmark = pytest.mark.slow  # the demo takes more than a minute


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the demo has run."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "data").symlink_to(ROOT / "data")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "data/demo/demo.sh"], cwd=folder, check=True, env=os.environ | {"PATH": path})
    return folder


def scores(demo: Path, name: str) -> dict[str, float]:
    report: dict[str, Any] = json.loads((demo / "out" / "demo" / name / "report.json").read_text())
    assert all(mode["all"]["questions"] >= 1000 for mode in report["modes"].values())
    return {name: mode["all"]["substring_match"] for name, mode in report["modes"].items()}


def test_block_mode_loses_accuracy_and_fine_tuning_restores_it(demo: Path) -> None:
    before, after = scores(demo, "before"), scores(demo, "after")
    assert before["full"] >= 90
    loss = before["full"] - before["block"]
    assert loss >= 15
    assert after["block"] - before["block"] >= 0.8 * loss
    assert abs(after["full"] - before["full"]) <= 2
    assert (demo / "out" / "demo" / "demo.png").stat().st_size > 0


def test_the_python_code_of_the_readme_answers(demo: Path) -> None:
    done = run_python(code_blocks(MAIN, "python")[0], demo)
    assert done.stdout.split("\n") == ["Brosuk 0", "Brosuk 4", ""], done.stderr


@pytest.fixture(scope="module")
def mine(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the README's recipe and example records, and the results of the demo."""
    folder = tmp_path_factory.mktemp("mine")
    write_own_data(folder)
    (folder / "out").mkdir()
    (folder / "out" / "demo").symlink_to(demo / "out" / "demo")
    return folder


def test_the_commands_of_the_readme_run_in_their_order(mine: Path) -> None:
    """All commands of the main README but benchmarks, which need a GPU or minutes."""
    commands = [words for words in shell_commands(MAIN) if words[0] == "blockft" and words[1] != "bench"]
    commands = [words for words in commands if words[1:] != ["prepare", "hotpotqa"]]
    assert [words[1] for words in commands][:5] == ["prepare", "train", "export", "eval", "generate"]
    for words in commands:
        done = run_python("from blockft.cli import main; main()", mine, *words[1:])
        assert done.returncode == 0, (words, done.stderr)
    assert (mine / "out" / "mine" / "eval" / "report.json").is_file()


def test_the_training_example_in_python_runs(tmp_path: Path) -> None:
    write_own_data(tmp_path)
    done = run_python(code_blocks(MAIN, "python")[1], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mine" / "model" / "config.json").is_file()


def run_python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a folder."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": PYTHON_PATH},
    )
