"""Times of runs, the speed of memory, and where and with what a figure was measured."""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from blockft.units import parse_bytes


def measurement_provenance() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    git = shutil.which("git")
    head = git and subprocess.run(
        [git, "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True
    )
    return {
        "command": " ".join(["blockft", *sys.argv[1:]]),
        "device": _device(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "commit": head.stdout.strip() or None if head else None,
    }


def measure_ms(
    run: Callable[[], Any], warmups: int, runs: int, before: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Milliseconds that `run` takes, each time after `before`: the median and the 95th percentile."""
    times = []
    for _ in range(warmups + runs):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    times = times[warmups:]
    return {"median": statistics.median(times), "p95": float(np.percentile(times, 95)), "runs": len(times)}


def measure_copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written each second by a large copy on the device."""
    size = parse_bytes("2GiB" if device.type == "cuda" else "256MiB")
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * size / measure_ms(copy, 3, 10)["median"] * 1000


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
