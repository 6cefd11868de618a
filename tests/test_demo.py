"""What the README claims of the demo, run for real. Minutes: `make test-slow`."""

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

pytestmark = pytest.mark.slow


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


def test_accuracy_is_lost_under_the_block_mask_and_won_back(demo: Path) -> None:
    before, after = scores(demo, "before"), scores(demo, "after")
    assert before["full"] >= 90
    loss = before["full"] - before["block"]
    assert loss >= 15
    assert after["block"] - before["block"] >= 0.8 * loss
    assert abs(after["full"] - before["full"]) <= 2
    assert (demo / "out" / "demo" / "demo.png").stat().st_size > 0


def test_the_readmes_python_answers(demo: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=demo, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["Brosuk 0", "Brosuk 4", ""], done.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if "bench" not in command])
def test_the_readmes_commands_run(demo: Path, command: str) -> None:
    """Where the demo has written a folder already, the command goes to another."""
    words = shlex.split(command)[1:]
    elsewhere = {
        "prepare": "data.output_dir=again/data",
        "train": "train.output_dir=again/run",
        "eval": "eval.output_dir=again/eval",
    }
    if words[0] in elsewhere:
        words.append(elsewhere[words[0]])
    words = [
        word.replace("out/demo/model", "again/model") if words[0] == "export" else word for word in words
    ]
    if words[0] == "train":
        words.append("train.max_steps=2")
    done = subprocess.run(
        [sys.executable, "-m", "blockft", *words],
        cwd=demo,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
