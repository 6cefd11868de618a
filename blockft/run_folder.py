"""The files of a run's folder: its recipe, its data's manifest, its metrics and its loss plot."""

import json
from pathlib import Path
from typing import Any

from blockft.outputs import write_atomic

RECIPE = "recipe.yaml"
"""The run's recipe with every setting."""

DATA = "data.json"
"""The manifest of the prepared data that the run reads."""

METRICS = "metrics.jsonl"
"""One JSON object per logged step or evaluation."""

LOSS_PLOT = "loss.png"
"""A plot of the losses in `metrics.jsonl`."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; a last line that an interruption left incomplete is ignored."""
    with (run / METRICS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_metrics(run: Path, last_step: int, *, eval_due: bool) -> None:
    """Remove the lines that a run resumed at `last_step` logs again.

    These are the lines after `last_step`, an incomplete last line, and the evaluation at `last_step` if that
    evaluation is still due.
    """
    kept = [
        line
        for line in read_metrics(run)
        if line["step"] < last_step or (line["step"] == last_step and ("loss" in line or not eval_due))
    ]
    write_atomic(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
