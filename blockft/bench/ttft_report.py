"""What `blockft bench ttft` shows: a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blockft.outputs import save_figure


def columns_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The times that were measured."""
    return [name for name in ("full_ms", "device_ms", "host_ms", "disk_ms", "none_ms") if name in lines[0]]


def sentence(line: Mapping[str, Any]) -> str:
    """A length and its median times, in one line."""
    times = (f"{name.removesuffix('_ms')} {line[name]['median']:.1f} ms" for name in columns_of([line]))
    return f"{line['length']:,} tokens: {', '.join(times)}"


def print_table(target: str, lines: Sequence[dict[str, Any]]) -> None:
    """A line per length: median times, and what they save."""
    columns = columns_of(lines)
    names = [name.removesuffix("_ms") for name in columns]
    table = Table("tokens", *names, "saved", "floor", "FLOPs saved", title=f"{target}: ms to the first token")
    for line in lines:
        times = [f"{line[name]['median']:.1f}" for name in columns]
        saved = f"{line['ttft_saved_percent']:.1f} %" if "ttft_saved_percent" in line else ""
        flops = f"{line['flops_saved_percent']:.1f} %"
        table.add_row(f"{line['length']:,}", *times, saved, f"{line['floor_ms']:.1f}", flops)
    Console().print(table)


def draw(target: str, lines: Sequence[dict[str, Any]], png: Path) -> None:
    """Median times over lengths, both in logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lengths = [line["length"] for line in lines]
    for name in columns_of(lines):
        axes.plot(
            lengths, [line[name]["median"] for line in lines], marker="o", label=name.removesuffix("_ms")
        )
    axes.plot(lengths, [line["floor_ms"] for line in lines], linestyle="--", color="grey", label="floor")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of the prompt",
        ylabel="time to first token, ms",
        title=target,
    )
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
    axes.minorticks_off()
    axes.legend(frameon=False)
    save_figure(figure, png)
