"""`blockft bench ttft`: the time to the first token of full prefill against cached blocks, side by side.

L tokens are a prompt: its context in blocks, and a question at the end.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from blockft.bench.target import open_target, target_config
from blockft.bench.timing import measure_copy_bandwidth, measurement_provenance
from blockft.bench.ttft_prompt import Prompt, derived_figures
from blockft.bench.ttft_report import draw, print_table, sentence
from blockft.bench.ttft_runs import (
    agreement,
    masked_by_backend,
    measure_bare_copy,
    measure_cached,
    measure_full_prefill,
)
from blockft.errors import UserError
from blockft.inference.runner import BlockRunner, CacheOptions, kv_shape
from blockft.outputs import check_writable, write_atomic
from blockft.progress import is_enabled, progress

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
"""Prompts that are measured unless others are asked for, as far as they fit the model."""

CHECK_LEN = 4096
"""The longest prompt that is compared with the masked forward, whose mask is dense."""


def bench_ttft(
    target: str,
    *,
    lengths: Sequence[int] | None,
    question_len: int,
    block_len: int,
    tiers: Sequence[str],
    warmups: int,
    runs: int,
    folder: Path | None,
    compile: bool,
    out: Path | None,
    png: Path | None,
) -> None:
    """Measure a model, or random weights of a shape, and print a table; JSON to `out`, a picture to `png`.

    Tiers: device, host, disk (a temporary folder in `folder`, or where such folders go) and none, which
    encodes every block. Before each run the tiers nearer than the one measured are emptied.

    Raises:
        UserError: no such model or shape, or one for which there is too little memory; lengths that do not
            hold the question or exceed the model; a file that cannot be written.
    """
    if {"none", "disk"} <= set(tiers):
        raise UserError("--tiers none encodes every block, which a disk would know: measure it without disk")
    if folder and not folder.is_dir():
        raise UserError(f"--folder {folder} is no folder")
    for file in (out, png):
        if file:
            check_writable(file)
    config = target_config(target)
    lengths = _fitting(lengths, question_len, config.max_position_embeddings)
    model = open_target(target, config)
    is_cuda = model.device.type == "cuda"
    bandwidth = measure_copy_bandwidth(model.device)
    stream = torch.randint(config.vocab_size, (lengths[-1],), generator=torch.Generator().manual_seed(0))
    prompts = [Prompt(stream[:length].numpy(), question_len, block_len) for length in lengths]
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="blockft-ttft-") as disk,
        progress("measure", (1 + len(tiers)) * sum(lengths)) as advance,
    ):
        room = lengths[-1] * kv_shape(model).token_bytes
        options = CacheOptions(
            folder=Path(disk) if "disk" in tiers else None, host_bytes=2 * room, device_bytes=room + 2**20
        )
        lines = [{"length": prompt.length, **derived_figures(prompt, model, bandwidth)} for prompt in prompts]
        # full prefill first: compiled layers and caches are none of its business
        for line, prompt in zip(lines, prompts, strict=True):
            line["full_ms"] = measure_full_prefill(model, prompt, warmups, runs)
            advance(prompt.length)
        short = [prompt for prompt in prompts if prompt.length <= CHECK_LEN][-1:]
        masked = [(prompt, masked_by_backend(model, prompt)) for prompt in short]
        runner = BlockRunner(model, name=target, cache=options, compile=compile and is_cuda)
        agreements = [agreement(runner, prompt, logits) for prompt, logits in masked]
        for line, prompt in zip(lines, prompts, strict=True):
            for tier in tiers:
                line[f"{tier}_ms"] = measure_cached(runner, prompt, tier, warmups, runs)
                advance(prompt.length)
            if is_cuda and "host" in tiers:
                line["bare_copy_ms"] = measure_bare_copy(runner, prompt, warmups, runs)
            _conclude(line)
            if not is_enabled():
                print(sentence(line), file=sys.stderr, flush=True)
        result = measurement_provenance() | {
            "model": target,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "block_len": block_len,
            "question_len": question_len,
            "warmups": warmups,
            "runs": runs,
            "compiled": compile and is_cuda,
            "copy_bandwidth_gb_s": bandwidth / 1e9,
            "agreement": agreements,
            "measured": lines,
        }
    print_table(target, lines)
    if out:
        write_atomic(out, json.dumps(result, indent=2) + "\n")
    if png:
        draw(target, lines, png)


def read_lengths(text: str) -> list[int] | None:
    """Lengths separated by commas; None if there is none.

    Raises:
        UserError: one is no number.
    """
    words = [word.strip() for word in text.split(",")] if text else []
    if bad := [word for word in words if not word.isdecimal()]:
        raise UserError(f"--lengths has {bad[0]!r}, it should be numbers separated by commas")
    return [int(word) for word in words] or None


def read_tiers(text: str) -> list[str]:
    """Tiers separated by commas; all that there are, if there is none.

    Raises:
        UserError: an unknown one, or the device where there is no GPU.
    """
    there = ["device", "host", "disk"] if torch.cuda.is_available() else ["host", "disk"]
    tiers = [word.strip() for word in text.split(",")] if text else there
    if unknown := [tier for tier in tiers if tier not in (*there, "none")]:
        raise UserError(f"--tiers has {unknown[0]!r}, here there are {', '.join(there)} and none")
    return tiers


def _fitting(lengths: Sequence[int] | None, question_len: int, limit: int) -> list[int]:
    """The lengths to measure, in order: all that are given, or else those of `LENGTHS` that fit."""
    if lengths is None:
        fitting = [length for length in LENGTHS if question_len < length <= limit]
        left_out = ", ".join(str(length) for length in LENGTHS if length not in fitting)
        reason = f"the model has {limit} positions, the question {question_len} tokens"
        if not fitting:
            raise UserError(f"{reason}, which none of {left_out} fits: set --lengths")
        if left_out:
            print(f"left out {left_out} tokens: {reason}", file=sys.stderr, flush=True)
        return fitting
    if min(lengths) <= question_len:
        raise UserError(
            f"--lengths has {min(lengths)}, which does not hold a question of {question_len} tokens"
        )
    if max(lengths) > limit:
        raise UserError(f"--lengths has {max(lengths)}, the model has {limit} positions")
    return sorted(set(lengths))


def _conclude(line: dict[str, Any]) -> None:
    nearest = line.get("device_ms") or line.get("host_ms")
    if nearest:
        line["ttft_saved_percent"] = 100 * (1 - nearest["median"] / line["full_ms"]["median"])
        line["ratio_to_floor"] = nearest["median"] / line["floor_ms"]
    if "bare_copy_ms" in line and "host_ms" in line:
        line["host_ratio_to_copy"] = line["host_ms"]["median"] / line["bare_copy_ms"]["median"]
