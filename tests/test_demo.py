"""The demo reaches the scores that the README claims, and the README's commands and Python code run on it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import COMMANDS, README, ROOT

pytestmark = pytest.mark.slow  # the demo takes more than a minute


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the demo has run."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "data").symlink_to(ROOT / "data")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "data/demo/demo.sh"], cwd=folder, check=True, env=os.environ | {"PATH": path})
    document = "The mayor of Heneomouth is Bidak."
    request = {"messages": [{"role": "user", "content": [f"{document}\n", "Who?"]}]}
    (folder / "requests.jsonl").write_text(json.dumps(request))
    (folder / "corpus.jsonl").write_text(json.dumps({"title": "Heneomouth", "text": document}))
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
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=demo, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["Brosuk 0", "Brosuk 4", ""], done.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if "bench" not in command])
def test_a_command_of_the_readme_runs(demo: Path, command: str) -> None:
    """A command that would write a folder of the demo again writes to another folder."""
    arguments = shlex.split(command)[1:]
    other_folder = {
        "prepare": "data.output_dir=again/data",
        "train": "train.output_dir=again/run",
        "eval": "eval.output_dir=again/eval",
    }
    name = arguments[0]
    if name in other_folder:
        arguments.append(other_folder[name])
    if name == "export":
        arguments = [argument.replace("out/demo/model", "again/model") for argument in arguments]
    if name == "train":
        arguments.append("train.max_steps=2")
    done = subprocess.run(
        [sys.executable, "-m", "blockft", *arguments],
        cwd=demo,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
