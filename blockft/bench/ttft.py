"""`blockft bench ttft`: the time to first token (TTFT) of full prefill and of cached blocks.

Each prompt has a given number of tokens: blocks of context, then a question.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from blockft.attention.layout import Layout
from blockft.bench.benchmark_model import load_benchmark_config, load_benchmark_model
from blockft.bench.measurement import measure_copy_bandwidth, measure_ms, write_measurement
from blockft.bench.reencoding import LABELS as REENCODING_LABELS
from blockft.bench.reencoding import describe_reencoding_times, measure_reencoding
from blockft.console import PlainConsole
from blockft.errors import UserError, list_allowed
from blockft.inference.block_key import BlockKey
from blockft.inference.runner import BlockRunner, CacheOptions, kv_shape
from blockft.inputs import shorten
from blockft.model.masked_forward import masked_logits
from blockft.model.supported import local_sees_first
from blockft.outputs import check_writable, plain_label, save_figure
from blockft.printable import print_text
from blockft.progress import is_enabled, progress

DEFAULT_LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
"""Prompt lengths measured by default, if the model has so many positions."""

MAX_AGREEMENT_LEN = 4096
"""The longest prompt compared with the masked forward pass, which builds a dense mask."""

FULL_KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "default": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""PyTorch's kernels of full attention. On a GPU the faster of flash and cudnn is reported."""

SERIES = {
    "full_ms": ("full prefill", "tab:orange"),
    "device_ms": ("blocks on the device", "tab:blue"),
    "host_ms": ("blocks on the host", "tab:green"),
    "disk_ms": ("blocks on the disk", "tab:purple"),
    "none_ms": ("no cached blocks", "tab:red"),
}
"""Label and colour of each measured time, in the order of the table's columns."""


class Prompt:
    """The token ids of a prompt on the host: blocks of at most `block_len` tokens, then the question."""

    def __init__(self, ids: np.ndarray, question_len: int, block_len: int) -> None:
        self.ids, self.length, self.question = ids, len(ids), ids[len(ids) - question_len :].tolist()
        context = ids[: len(ids) - question_len].astype("<i4")
        self.blocks = [context[i : i + block_len] for i in range(0, len(context), block_len)]

    def keys(self, runner: BlockRunner) -> list[BlockKey]:
        return runner.context_keys(self.blocks)

    @property
    def layout(self) -> Layout:
        return Layout((*map(len, self.blocks), len(self.question)))


def bench_ttft(
    model_or_shape: str,
    *,
    lengths: Sequence[int] | None,
    question_len: int,
    block_len: int,
    tiers: Sequence[str],
    warmups: int,
    runs: int,
    folder: Path | None,
    compile: bool,
    reencoding: bool,
    out: Path | None,
    png: Path | None,
) -> None:
    """Measure the TTFT of a model, or of random weights of a shape, over prompts of several lengths.

    Prints a table, writes the figures to `out` and a plot to `png`.

    lengths: tokens of each prompt, the question included; None measures `DEFAULT_LENGTHS`.
    tiers: where the blocks are cached: device, host, disk, or none (every block is computed). The tiers
        nearer to the device than the measured one are emptied before each run.
    folder: where the temporary folder of the disk tier is created; None is the system's default.
    compile: compile the layers that read cached blocks (GPU only).
    reencoding: also measure what it costs to move blocks to their positions (`reencoding_passes`).

    Raises:
        UserError: no model or shape has that name, or there is too little memory for it; a length is not
            above `question_len` or exceeds the model's positions; a file cannot be written.
    """
    _check_arguments(tiers, folder, out, png)
    config = load_benchmark_config(model_or_shape)
    lengths = _choose_lengths(lengths, question_len, config.max_position_embeddings)
    model = load_benchmark_model(model_or_shape, config)
    compile = compile and model.device.type == "cuda"
    bandwidth = measure_copy_bandwidth(model.device)
    ids = torch.randint(config.vocab_size, (lengths[-1],), generator=torch.Generator().manual_seed(0))
    prompts = [Prompt(ids[:length].numpy(), question_len, block_len) for length in lengths]
    measured = [{"length": prompt.length, **derived_figures(prompt, model, bandwidth)} for prompt in prompts]
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="blockft-ttft-") as disk,
        progress("measure", (1 + reencoding + len(tiers)) * sum(lengths), unit="token") as advance,
    ):
        # full prefill first, while no layer is compiled and no cache is filled
        for figures, prompt in zip(measured, prompts, strict=True):
            figures["full_ms"] = measure_full_prefill(model, prompt, warmups, runs)
            advance(prompt.length)
        short = [prompt for prompt in prompts if prompt.length <= MAX_AGREEMENT_LEN][-1:]
        masked = [(prompt, masked_logits_by_backend(model, prompt)) for prompt in short]
        cache_bytes = lengths[-1] * kv_shape(model).token_bytes
        options = CacheOptions(
            folder=Path(disk) if "disk" in tiers else None,
            host_bytes=2 * cache_bytes,
            device_bytes=cache_bytes + 2**20,
        )
        runner = BlockRunner(model, name=model_or_shape, cache=options, compile=compile)
        agreement = [measure_agreement(runner, prompt, logits) for prompt, logits in masked]
        for figures, prompt in zip(measured, prompts, strict=True):
            _add_cached_times(figures, runner, prompt, tiers, warmups, runs, advance)
            if reencoding:
                figures["reencoding"] = measure_reencoding(
                    model, prompt.keys(runner), prompt.question, warmups, runs, is_compiled=compile
                )
                advance(prompt.length)
            if not is_enabled():
                print_text(_summary_line(figures), file=sys.stderr, flush=True)
    print_table(model_or_shape, measured)
    if reencoding:
        print_reencoding_table(model_or_shape, measured, model.device)
    write_measurement(
        out,
        {
            "model": model_or_shape,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "block_len": block_len,
            "question_len": question_len,
            "local_sees_first": local_sees_first(config),
            "warmups": warmups,
            "runs": runs,
            "compiled": compile,
            "copy_bandwidth_gb_s": bandwidth / 1e9,
            "agreement": agreement,
            **({"reencoding": describe_reencoding_times(model.device)} if reencoding else {}),
            "measured": measured,
        },
    )
    if png:
        save_figure(draw_ttft(model_or_shape, measured), png)


# Arguments


def parse_lengths(text: str) -> list[int] | None:
    """Return the lengths of a comma-separated text; None if the text is empty.

    Raises:
        UserError: an entry is not a number.
    """
    entries = [entry.strip() for entry in text.split(",")] if text else []
    if wrong := [entry for entry in entries if not re.fullmatch("[1-9][0-9]{0,7}", entry)]:
        raise UserError(f"--lengths has {shorten(wrong[0])!r}: write whole numbers separated by commas")
    return [int(entry) for entry in entries] or None


def parse_tiers(text: str) -> list[str]:
    """Return the tiers of a comma-separated text; all tiers of this machine if the text is empty.

    Raises:
        UserError: a tier is unknown, or is the device on a machine without a GPU.
    """
    available = ["device", "host", "disk"] if torch.cuda.is_available() else ["host", "disk"]
    tiers = [entry.strip() for entry in text.split(",")] if text else available
    if unknown := [tier for tier in tiers if tier not in (*available, "none")]:
        allowed = list_allowed(unknown[0], (*available, "none"))
        raise UserError(f"--tiers has {unknown[0]!r} (on this machine {allowed})")
    return tiers


def _check_arguments(tiers: Sequence[str], folder: Path | None, out: Path | None, png: Path | None) -> None:
    if {"none", "disk"} <= set(tiers):
        raise UserError(
            "--tiers has none and disk, but the disk tier would find the blocks that none computes: "
            "measure them separately"
        )
    if folder and not folder.is_dir():
        raise UserError(f"--folder {folder} is not a folder")
    for file in (out, png):
        if file:
            check_writable(file)


def _choose_lengths(lengths: Sequence[int] | None, question_len: int, num_positions: int) -> list[int]:
    """Return the lengths to measure, sorted: the given ones, or the `DEFAULT_LENGTHS` that fit the model."""
    if lengths is None:
        fitting = [length for length in DEFAULT_LENGTHS if question_len < length <= num_positions]
        left_out = ", ".join(str(length) for length in DEFAULT_LENGTHS if length not in fitting)
        reason = f"the model has {num_positions} positions and the question {question_len} tokens"
        if not fitting:
            raise UserError(f"none of the lengths {left_out} can be measured, {reason}: set --lengths")
        if left_out:
            print_text(f"not measured: {left_out} tokens ({reason})", file=sys.stderr, flush=True)
        return fitting
    if min(lengths) <= question_len:
        raise UserError(
            f"--lengths has {min(lengths)}, too short for a question of {question_len} tokens and a context"
        )
    if max(lengths) > num_positions:
        raise UserError(f"--lengths has {max(lengths)}, but the model has only {num_positions} positions")
    return sorted(set(lengths))


# Figures


def derived_figures(prompt: Prompt, model: PreTrainedModel, bandwidth: float) -> dict[str, Any]:
    """Return what follows from the numbers of tokens and parameters alone (Ma et al. 2025, table 2).

    floor_ms: the time to read the weights and the cached keys and values once at `bandwidth` bytes/s.
    """
    length, question_len, config = prompt.length, len(prompt.question), model.config
    # an input embedding is read row by row, unless the output shares its weights and reads them all
    num_read = model.num_parameters(exclude_embeddings=not config.tie_word_embeddings)
    weight_bytes = num_read * model.dtype.itemsize
    cache_bytes = (length - question_len) * kv_shape(model).token_bytes
    # per pair of tokens, head and dimension: one multiplication and one addition, for QK and for PV
    flops_per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * kv_shape(model).head_size
    num_full_pairs = length * (length + 1) / 2
    num_question_pairs = question_len * (length - question_len) + question_len * (question_len + 1) / 2
    full_flops = 2 * model.num_parameters() * length + flops_per_pair * num_full_pairs
    block_flops = 2 * model.num_parameters() * question_len + flops_per_pair * num_question_pairs
    return {
        "num_blocks": len(prompt.blocks),
        "flops_saved_percent": 100 * (1 - question_len / length),
        "flops_saved_with_attention_percent": 100 * (1 - block_flops / full_flops),
        "bytes_moved": weight_bytes + cache_bytes,
        "floor_ms": (weight_bytes + cache_bytes) / bandwidth * 1000,
    }


def measure_full_prefill(model: PreTrainedModel, prompt: Prompt, warmups: int, runs: int) -> dict[str, Any]:
    """Measure full prefill with the kernel that is fastest in a few trial runs."""

    def prefill() -> int:
        ids = torch.from_numpy(prompt.ids)[None].to(model.device)
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def measure(kernel: str, warmups: int, runs: int) -> dict[str, Any]:
        with torch.inference_mode(), sdpa_kernel(FULL_KERNELS[kernel]):
            return measure_ms(prefill, warmups, runs)

    model.set_attn_implementation("sdpa")
    kernels = [name for name in FULL_KERNELS if (name == "default") == (model.device.type != "cuda")]
    trials = {name: measure(name, 2, 3)["median"] for name in kernels}
    kernel = min(trials, key=trials.__getitem__)
    times = measure(kernel, warmups, runs)
    model.set_attn_implementation("block_cached")
    return times | {"kernel": kernel, "kernels_tried": trials}


def measure_cached(runner: BlockRunner, prompt: Prompt, tier: str, warmups: int, runs: int) -> dict[str, Any]:
    """Measure the prefill over blocks that are cached in one tier; they are inserted before."""
    cache = runner.block_cache

    def prefill() -> int:
        result = runner.prefill([prompt.keys(runner)], [prompt.question], 1)
        tiers = [hit.tier.value for hit in result.hits.values()]
        assert tiers == ([] if tier == "none" else [tier] * len(set(prompt.keys(runner)))), tiers
        return int(result.logits[0].argmax())

    def clear_nearer_tiers() -> None:
        if cache.device is not None and tier != "device":
            cache.device.clear()
        if tier in ("disk", "none"):
            cache.host.clear()

    clear_nearer_tiers()
    if tier != "none":
        runner.prefill_blocks(prompt.keys(runner))
        cache.flush()
        # a lookup moves blocks that are on the disk alone into the nearer tiers
        runner.prefill([prompt.keys(runner)], [prompt.question], 1)
    return measure_ms(prefill, warmups, runs, before=clear_nearer_tiers)


def measure_bare_copy(runner: BlockRunner, prompt: Prompt, warmups: int, runs: int) -> dict[str, Any]:
    """Measure the copy of the host tier's blocks to the device, one copy per block, and nothing else."""
    cache = runner.block_cache
    runner.prefill_blocks(prompt.keys(runner))
    cache.load({})  # waits for the copies to the host
    blocks = [cache.on_host(key) for key in dict.fromkeys(prompt.keys(runner))]
    num_values = sum(map(torch.Tensor.numel, blocks))
    target = torch.empty(num_values, dtype=blocks[0].dtype, device=runner.model.device)

    def copy() -> None:
        start = 0
        for block in blocks:
            target[start : start + block.numel()].copy_(block.view(-1), non_blocking=True)
            start += block.numel()
        torch.cuda.synchronize()

    return measure_ms(copy, warmups, runs)


@torch.inference_mode()
def masked_logits_by_backend(model: PreTrainedModel, prompt: Prompt) -> dict[str, torch.Tensor]:
    """Return the logits (vocabulary,) after the prompt under the block mask, for each training backend."""
    logits = {}
    for backend in ("sdpa", "flex") if model.device.type == "cuda" else ("sdpa",):
        model.set_attn_implementation(f"block_{backend}")
        logits[backend] = masked_logits(model, torch.from_numpy(prompt.ids), [prompt.layout], 1)[0].float()
    model.set_attn_implementation("block_cached")
    return logits


def measure_agreement(
    runner: BlockRunner, prompt: Prompt, masked: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return relative errors of the logits against the masked forward pass of the reference backend.

    The error of the masked forward pass of another backend shows how much of it is rounding.
    """
    expected = masked["sdpa"]
    others = {"cached": runner.prefill([prompt.keys(runner)], [prompt.question], 1).logits[0].float()}
    others |= {f"masked_{name}": logits for name, logits in masked.items() if name != "sdpa"}
    errors = {
        f"{name}_to_masked_sdpa": float((logits - expected).norm() / expected.norm())
        for name, logits in others.items()
    }
    return {"length": prompt.length, **errors}


def _add_cached_times(
    figures: dict[str, Any],
    runner: BlockRunner,
    prompt: Prompt,
    tiers: Sequence[str],
    warmups: int,
    runs: int,
    advance: Callable[[float], None],
) -> None:
    """Measure a prompt over every tier and add the times, and the ratios that follow, to its figures."""
    for tier in tiers:
        figures[f"{tier}_ms"] = measure_cached(runner, prompt, tier, warmups, runs)
        advance(prompt.length)
    if runner.model.device.type == "cuda" and "host" in tiers:
        figures["bare_copy_ms"] = measure_bare_copy(runner, prompt, warmups, runs)
        figures["host_ratio_to_copy"] = figures["host_ms"]["median"] / figures["bare_copy_ms"]["median"]
    if nearest := figures.get("device_ms") or figures.get("host_ms"):
        figures["ttft_saved_percent"] = 100 * (1 - nearest["median"] / figures["full_ms"]["median"])
        figures["ratio_to_floor"] = nearest["median"] / figures["floor_ms"]


# Results


def print_table(model_or_shape: str, measured: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per prompt length: median times in milliseconds, and what cached blocks save."""
    names = _measured_times(measured)
    columns = [name.removesuffix("_ms") for name in names]
    table = Table(
        "tokens",
        *columns,
        "saved",
        "floor",
        "FLOPs saved",
        title=f"{model_or_shape}: time to first token, ms",
        caption="floor: the time to read weights and cached blocks once",
    )
    for figures in measured:
        times = [f"{figures[name]['median']:.1f}" for name in names]
        saved = f"{figures['ttft_saved_percent']:.1f} %" if "ttft_saved_percent" in figures else ""
        flops_saved = f"{figures['flops_saved_percent']:.1f} %"
        table.add_row(f"{figures['length']:,}", *times, saved, f"{figures['floor_ms']:.1f}", flops_saved)
    PlainConsole().print(table)


def print_reencoding_table(
    model_or_shape: str, measured: Sequence[Mapping[str, Any]], device: torch.device
) -> None:
    """Print one row per prompt length: median times in milliseconds, by the way in which blocks move."""
    table = Table(
        "tokens",
        *REENCODING_LABELS.values(),
        title=f"{model_or_shape}: re-encoding, ms",
        caption=describe_reencoding_times(device),
    )
    for figures in measured:
        times = [f"{figures['reencoding'][name]['median']:.1f}" for name in REENCODING_LABELS]
        table.add_row(f"{figures['length']:,}", *times)
    PlainConsole().print(table)


def draw_ttft(model_or_shape: str, measured: Sequence[Mapping[str, Any]]) -> Any:
    """Return a figure of median times over prompt lengths, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lengths = [figures["length"] for figures in measured]
    lines = [
        (*SERIES[name], "-", [figures[name]["median"] for figures in measured])
        for name in _measured_times(measured)
    ]
    lines.append(("memory floor", "grey", "--", [figures["floor_ms"] for figures in measured]))
    for label, colour, style, times_ms in lines:
        marker = "o" if style == "-" else "."
        axes.plot(lengths, times_ms, marker=marker, linestyle=style, color=colour, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="prompt length, tokens",
        ylabel="median time to first token, ms",
        title=plain_label(f"Time to first token of {model_or_shape}"),
    )
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure


def _measured_times(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in SERIES if name in measured[0]]


def _summary_line(figures: Mapping[str, Any]) -> str:
    times = (
        f"{name.removesuffix('_ms')} {figures[name]['median']:.1f} ms" for name in _measured_times([figures])
    )
    return f"{figures['length']:,} tokens: {', '.join(times)}"
