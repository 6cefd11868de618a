"""The script that measures training on many GPUs: its result at a toy size, on two processes of the CPU."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, TIMEOUT_S
from tests.run import save_samples, save_tokenizer

SCRIPT = ROOT / "data" / "results" / "code" / "many_gpus.py"

TOY = (
    *("--large", "tiny", "--small", "tiny", "--num-gpus", "2", "--steps", "6", "--warmups", "2"),
    *("--compared-steps", "2", "data.row_len=256", "train.batch_rows=4"),
)


def measure(folder: Path, *options: str) -> dict[str, Any]:
    """Run the script in the folder of earlier calls, and return the result that it wrote."""
    if not (folder / "tokenizer").exists():
        save_tokenizer(folder / "tokenizer")
        source = {"format": "samples", "path": str(save_samples(folder / "train.jsonl", 100))}
        (folder / "sources.json").write_text(json.dumps([source]))
    files = {"tokenizer": "tokenizer", "sources": "sources.json", "work": "work", "out": "out.json"}
    arguments = [text for name, file in files.items() for text in (f"--{name}", str(folder / file))]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments, *TOY, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=4 * TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return result


@pytest.mark.slow  # two ranks are launched, and three more interpreters start
def test_a_run_is_measured_and_a_later_call_continues_with_the_other_parts(tmp_path: Path) -> None:
    result = measure(tmp_path, "--parts", "zero3,export")
    assert {"command", "devices", "versions", "commit", "recipe", "setup"} <= result.keys()
    assert result["setup"]["data"]["num_examples"] == 100 and not result["not_run"]
    zero3, export = result["parts"]["zero3"], result["parts"]["export"]
    assert [line["step"] for line in zero3["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert zero3["median_tokens_per_s_a_gpu"] > 0 and zero3["peak_memory_gib"] > 0
    assert zero3["checkpoint"]["bytes"] > 0 and zero3["after_checkpoint"]
    assert zero3["dry_run"]["expected_peak"] and zero3["dry_run"]["gradient_checkpointing"] == "none"
    killed = zero3["killed_rank"]
    assert killed["exit_code"] == 2 and killed["seconds"] is not None
    assert any("rank 1" in sentence and "was killed" in sentence for sentence in killed["sentences"])
    assert export["exit_code"] == 0 and "its logits differ" in export["line"]

    later = measure(tmp_path, "--limit-s", "0")
    assert later["parts"] == result["parts"] and len(later["calls"]) == 2
    assert later["not_run"].keys() == {"scaling", "resume", "zero2", "zero1", "zero3-eager"}
    assert set(later["not_run"].values()) == {"0 s were left"}


def test_runs_that_fit_side_by_side_are_in_one_group() -> None:
    group_sizes = runpy.run_path(str(SCRIPT))["group_sizes"]
    assert group_sizes([8, 4, 2, 1], 8) == [[8], [4, 2, 1]]
    assert group_sizes([6, 4, 2, 1], 6) == [[6], [4, 2], [1]]
    assert group_sizes([1], 1) == [[1]]
