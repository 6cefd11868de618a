"""Measure run times and memory bandwidth, and record the provenance of each figure."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockft.outputs import write_atomic
from blockft.units import parse_bytes


def measurement_provenance() -> dict[str, Any]:
    """Return where and with what a figure was measured: command, device, versions, commit."""
    git = shutil.which("git")
    head = git and subprocess.run(
        [git, "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True
    )
    return {
        "command": " ".join(["blockft", *sys.argv[1:]]),
        "device": _device_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "commit": head.stdout.strip() or None if head else None,
    }


def write_measurement(out: Path | None, result: Mapping[str, Any]) -> None:
    """Write a benchmark's result and its provenance as JSON, unless `out` is None.

    Raises:
        UserError: the file cannot be written.
    """
    if out:
        write_atomic(out, json.dumps(measurement_provenance() | dict(result), indent=2) + "\n")


def measure_ms(
    run: Callable[[], Any], warmups: int, runs: int, before: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Measure `run`: {"median": milliseconds, "p95": milliseconds, "runs": number of measured runs}.

    `before` is called before each run and is not measured. The first `warmups` runs are not counted.
    """
    times_ms = []
    for _ in range(warmups + runs):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times_ms.append((time.perf_counter() - start) * 1000)
    return _summarize(times_ms[warmups:])


def measure_device_ms(run: Callable[[], Any], warmups: int, runs: int) -> dict[str, Any]:
    """Measure the time that the current GPU takes for what `run` queues: the figures of `measure_ms`.

    The GPU is busy with a run that is not measured while the host queues the measured one. Its time is
    therefore that of the GPU alone, if the host queues a run faster than the GPU runs it: a CUDA graph.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times_ms = []
    for _ in range(warmups + runs):
        run()
        start.record()
        run()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return _summarize(times_ms[warmups:])


def _summarize(times_ms: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(times_ms),
        "p95": float(np.percentile(times_ms, 95)),
        "runs": len(times_ms),
    }


def measure_copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a large copy on the device reads and writes together."""
    num_bytes = parse_bytes("2GiB" if device.type == "cuda" else "256MiB")
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * num_bytes / measure_ms(copy, 3, 10)["median"] * 1000


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
