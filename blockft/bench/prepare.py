"""`blockft bench prepare`: the speed of data preparation with one process and with one process per core."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from blockft.bench.measurement import write_measurement
from blockft.console import PlainConsole
from blockft.data.prepared import MANIFEST
from blockft.outputs import check_writable

Prepare = Callable[[Path, int], object]
"""Prepares data: takes the folder to write and the number of worker processes."""


def bench_prepare(prepare: Prepare, *, warm_up: Prepare, out: Path | None) -> None:
    """Prepare data in temporary folders, print a table of speeds, and write the figures to `out`.

    warm_up: prepares a few samples first, so that imports and the file cache do not count.

    Raises:
        UserError: `out` cannot be written; see `prepare`.
        RuntimeError: the number of processes changed the prepared data.
    """
    if out:
        check_writable(out)
    num_cores = len(os.sched_getaffinity(0))
    _measure(warm_up, 1)
    measured = [_measure(prepare, num_workers) for num_workers in sorted({1, num_cores})]
    for figures in measured:
        figures["ratio"] = measured[0]["seconds"] / figures["seconds"]
    _print_table(measured)
    write_measurement(out, {"measured": measured})
    if len({figures["content_hash"] for figures in measured}) > 1:
        raise RuntimeError(f"the number of processes changed the prepared data: {measured}")


def _measure(prepare: Prepare, num_workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="blockft-prepare-") as temporary:
        folder = Path(temporary) / "data"
        start = time.perf_counter()
        prepare(folder, num_workers)
        seconds = time.perf_counter() - start
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {
        "processes": num_workers,
        "seconds": seconds,
        "examples": manifest["num_examples"],
        "tokens": manifest["num_tokens"],
        "content_hash": manifest["content_hash"],
    }


def _print_table(measured: list[dict[str, Any]]) -> None:
    table = Table("processes", "seconds", "examples/s", "tokens/s", "ratio", title="Speed of blockft prepare")
    for figures in measured:
        table.add_row(
            str(figures["processes"]),
            f"{figures['seconds']:.1f}",
            f"{figures['examples'] / figures['seconds']:,.0f}",
            f"{figures['tokens'] / figures['seconds']:,.0f}",
            f"{figures['ratio']:.2f}",
        )
    PlainConsole().print(table)
