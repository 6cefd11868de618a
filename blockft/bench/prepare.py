"""`blockft bench prepare`: data preparation compared with the bare tokenizer, its memory and its growth."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table
from tokenizers import Tokenizer

from blockft.bench.measurement import write_measurement
from blockft.console import PlainConsole
from blockft.data.parallel import map_in_order
from blockft.data.prepared import MANIFEST
from blockft.errors import UserError, first_line
from blockft.outputs import check_writable
from blockft.progress import progress
from blockft.units import format_bytes, format_count

Prepare = Callable[[Path, int], object]
"""Prepares data: takes the folder to write and the number of worker processes."""

BATCH_SAMPLES = 64
"""Number of samples whose texts the bare tokenizer takes at a time."""

SAMPLING_S = 0.05
"""Time between two looks at the memory of the processes."""


def bench_prepare(
    prepare: Prepare,
    tokenizer: Tokenizer,
    *,
    warm_up: Prepare,
    rounds: int,
    out: Path | None,
    more: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Prepare data in temporary folders, print tables, and write the figures to `out`.

    The bare tokenizer encodes the texts of the prepared samples: their blocks and responses, without chat
    template. It does so in as many processes as `prepare`, with one string for each sample ("whole"), and
    with one string for each block ("blocks"). It is given the texts in memory, writes nothing and keeps
    nothing. The speed of both is the number of tokens of the texts by the time. The measurements alternate.

    warm_up: prepares a few samples first, so that imports and the file cache do not count.
    more: measures something else at the end; see `print_more`.

    Raises:
        UserError: `out` cannot be written; see `prepare`.
        RuntimeError: the number of processes changed the prepared data.
    """
    if out:
        check_writable(out)
    num_cores = len(os.sched_getaffinity(0))
    texts = _read_texts(warm_up, prepare)
    processes = sorted({1, num_cores})
    with progress("measure", rounds * len(processes) * 3, unit="run") as advance:
        measured = [_measure(prepare, tokenizer, texts, n, rounds, advance) for n in processes]
    for figures in measured:
        figures["speedup"] = measured[0]["seconds"] / figures["seconds"]
    _print_speeds(measured)
    if len({figures["content_hash"] for figures in measured}) > 1:
        raise RuntimeError(f"the number of processes changed the prepared data: {measured}")
    others = more()
    print_more(others)
    write_measurement(out, {"rounds": rounds, "measured": measured, **others})


def print_more(figures: dict[str, Any]) -> None:
    """Print what `measure_memory`, `measure_growth` and `bench.planning.measure_planning` have measured."""
    console = PlainConsole()
    for entry in figures.get("memory", ()):
        console.print(
            f"{format_count(entry['samples'], 'sample')}: peak memory of all processes "
            f"{format_bytes(entry['peak_bytes'])}, {entry['seconds']:.0f} s",
            soft_wrap=True,
        )
    if growth := figures.get("growth"):
        console.print(
            f"one more source: {growth['seconds']:.1f} s after {growth['first_seconds']:.1f} s for the first "
            f"one, {growth['alone_seconds']:.1f} s alone; {growth['shards_encoded']} of {growth['shards']} "
            "shards encoded",
            soft_wrap=True,
        )
    if planning := figures.get("planning"):
        console.print(
            f"planning {format_count(planning['examples'], 'example')}: {planning['seconds']:.2f} s, "
            f"checking their files {planning['digest_seconds']:.2f} s",
            soft_wrap=True,
        )


def measure_memory(command: Sequence[str], num_samples: int) -> dict[str, Any]:
    """Run a command, and measure the peak of the resident memory of its processes together.

    Raises:
        UserError: the command failed.
    """
    start = time.perf_counter()
    peak_bytes = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _resident_bytes(process.pid))
            time.sleep(SAMPLING_S)
        errors.seek(0)
        if process.returncode:
            raise UserError(f"prepare failed in the benchmark: {first_line(Exception(errors.read()))}")
    return {"samples": num_samples, "peak_bytes": peak_bytes, "seconds": time.perf_counter() - start}


def measure_growth(prepare_first: Prepare, prepare_added: Prepare, prepare_both: Prepare) -> dict[str, Any]:
    """Measure what one more source costs after the first one is prepared.

    prepare_first, prepare_added, prepare_both: prepare the first source, the other one, and both; they use
        all cores if the number of processes is 0.
    """
    with tempfile.TemporaryDirectory(prefix="blockft-growth-") as temporary:
        folder = Path(temporary) / "data"
        first_seconds = _time(prepare_first, folder)
        alone_seconds = _time(prepare_added, Path(temporary) / "alone")
        seconds = _time(prepare_both, folder)
        log = folder.with_name(f"{folder.name}.log").read_text(encoding="utf-8").splitlines()
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {
        "first_seconds": first_seconds,
        "alone_seconds": alone_seconds,
        "seconds": seconds,
        "shards_encoded": json.loads(log[-1])["shards_encoded"],
        "shards": sum(source["shards"] for source in manifest["sources"]),
    }


def _time(prepare: Prepare, folder: Path) -> float:
    start = time.perf_counter()
    prepare(folder, 0)
    return time.perf_counter() - start


def _resident_bytes(process_id: int) -> int:
    """Return the resident memory of a process and its children."""
    total = 0
    try:
        parent = psutil.Process(process_id)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:  # a process has just ended
        pass
    return total


def _read_texts(warm_up: Prepare, prepare: Prepare) -> list[list[str]]:
    """Return the texts of each prepared sample: its blocks and its response."""
    with tempfile.TemporaryDirectory(prefix="blockft-prepare-") as temporary:
        warm_up(Path(temporary) / "few", 1)
        prepare(Path(temporary) / "data", 0)
        samples = (
            json.loads(line)
            for path in sorted((Path(temporary) / "data").glob("samples-*.jsonl"))
            for line in path.open(encoding="utf-8")
        )
        return [
            [
                *(text for message in sample.get("messages", ()) for text in message["content"]),
                *sample.get("blocks", ()),
                sample["response"],
            ]
            for sample in samples
        ]


def _measure(
    prepare: Prepare,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[str]],
    num_workers: int,
    rounds: int,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Measure `prepare` and the bare tokenizer in turn; the times are medians in seconds."""
    whole = _batches(["".join(blocks)] for blocks in texts)
    by_block = _batches(texts)
    times: dict[str, list[float]] = {"prepare": [], "whole": [], "blocks": []}
    for _ in range(rounds):
        seconds, _ = _time_tokenizer(tokenizer, whole, num_workers)
        times["whole"].append(seconds)
        advance()
        seconds, figures = _time_prepare(prepare, num_workers)
        times["prepare"].append(seconds)
        advance()
        seconds, num_tokens = _time_tokenizer(tokenizer, by_block, num_workers)
        times["blocks"].append(seconds)
        advance()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "processes": num_workers,
        **figures,
        "text_tokens": num_tokens,
        "seconds": medians["prepare"],
        "tokenizer_seconds": medians["whole"],
        "tokenizer_blocks_seconds": medians["blocks"],
        "all_seconds": times,
        "share": medians["whole"] / medians["prepare"],
        "share_blocks": medians["blocks"] / medians["prepare"],
    }


def _batches(texts: Any) -> list[list[str]]:
    """Return the texts of `BATCH_SAMPLES` samples at a time."""
    samples = iter(texts)
    batches = []
    while chunk := list(islice(samples, BATCH_SAMPLES)):
        batches.append([text for sample in chunk for text in sample])
    return batches


def _time_tokenizer(
    tokenizer: Tokenizer, batches: Sequence[list[str]], num_workers: int
) -> tuple[float, int]:
    """Return the time in which the tokenizer encodes all texts, and the number of tokens."""

    def count_tokens(index: int) -> int:
        encodings = tokenizer.encode_batch_fast(batches[index], add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encodings)

    start = time.perf_counter()
    num_tokens = sum(map_in_order(count_tokens, range(len(batches)), num_workers))
    return time.perf_counter() - start, num_tokens


def _time_prepare(prepare: Prepare, num_workers: int) -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="blockft-prepare-") as temporary:
        folder = Path(temporary) / "data"
        start = time.perf_counter()
        prepare(folder, num_workers)
        seconds = time.perf_counter() - start
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return seconds, {
        "examples": manifest["num_examples"],
        "tokens": manifest["num_tokens"],
        "content_hash": manifest["content_hash"],
    }


def _print_speeds(measured: Sequence[dict[str, Any]]) -> None:
    table = Table(
        *("processes", "seconds", "tokens/s", "of the tokenizer", "block by block", "speedup"),
        title="Speed of blockft prepare",
    )
    for figures in measured:
        table.add_row(
            str(figures["processes"]),
            f"{figures['seconds']:.1f}",
            f"{figures['text_tokens'] / figures['seconds']:,.0f}",
            f"{figures['share']:.0%}",
            f"{figures['share_blocks']:.0%}",
            f"{figures['speedup']:.2f}",
        )
    PlainConsole().print(table)


def prepare_command(recipe: Path) -> list[str]:
    """Return the command that prepares a recipe in a process of its own."""
    return [sys.executable, "-m", "blockft", "prepare", str(recipe)]
