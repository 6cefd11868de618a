"""`blockft bench prepare`: how fast a recipe's data are prepared, by one process and by one per core."""

import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blockft.bench.timing import measurement_provenance
from blockft.config.settings import Recipe
from blockft.data.prepared import MANIFEST
from blockft.outputs import check_writable, write_atomic
from blockft.stages.prepare import TASK_SAMPLES, prepare


def bench_prepare(recipe: Recipe, *, out: Path | None) -> None:
    """Prepare the recipe's data in temporary folders; `data.output_dir` is left alone.

    A few samples of each source are prepared before, and not counted: imports and files are then at hand.

    Raises:
        UserError: see `prepare`; a file that cannot be written.
        RuntimeError: the processes made something else of the data (law 12).
    """
    if out:
        check_writable(out)
    cores = len(os.sched_getaffinity(0))
    few = [source.model_copy(update={"max_samples": TASK_SAMPLES}) for source in recipe.data.sources]
    _measure(_with_data(recipe, sources=few), 1)
    lines = [_measure(recipe, workers) for workers in sorted({1, cores})]
    table = Table("processes", "seconds", "examples/s", "tokens/s", "ratio", title="prepare")
    for line in lines:
        line["ratio"] = lines[0]["seconds"] / line["seconds"]
        rates = (line[name] / line["seconds"] for name in ("examples", "tokens"))
        table.add_row(
            str(line["processes"]),
            f"{line['seconds']:.1f}",
            *(f"{rate:,.0f}" for rate in rates),
            f"{line['ratio']:.2f}",
        )
    Console().print(table)
    if out:
        write_atomic(out, json.dumps(measurement_provenance() | {"measured": lines}, indent=2) + "\n")
    if len({line["content_hash"] for line in lines}) > 1:
        raise RuntimeError(f"the number of processes changed the data: {lines}")


def _with_data(recipe: Recipe, **settings: Any) -> Recipe:
    """Return a copy of the recipe with other settings of `data`."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=settings)})


def _measure(recipe: Recipe, num_workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="blockft-prepare-") as folder:
        made = Path(folder) / "data"
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(_with_data(recipe, output_dir=str(made), num_workers=num_workers))
        seconds = time.perf_counter() - start
        manifest = json.loads((made / MANIFEST).read_text(encoding="utf-8"))
    return {
        "processes": num_workers,
        "seconds": seconds,
        "examples": manifest["num_examples"],
        "tokens": manifest["num_tokens"],
        "content_hash": manifest["content_hash"],
    }
