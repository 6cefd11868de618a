"""The figures of `blockft bench serve`: kept as soon as they are measured, with what is missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Column, Table

from blockft.bench.measurement import write_measurement
from blockft.bench.serve_client import ServerKind
from blockft.bench.serve_workload import DocumentOrder
from blockft.console import PlainConsole
from blockft.outputs import plain_label, save_figure

LABELS: Mapping[ServerKind, tuple[str, str]] = {
    "plain": ("vLLM alone", "tab:orange"),
    "blocks": ("vLLM with blocks", "tab:blue"),
}
"""Name and colour of each kind of server."""

ORDER_LABELS: Mapping[DocumentOrder, str] = {
    "new": "new",
    "same_order": "same order",
    "other_order": "other order",
}

Part = Literal["reuse", "warmup", "one_at_a_time", "rates"]
"""A part of the measurement of a server, in this order."""

PART_LABELS: Mapping[Part, str] = {
    "reuse": "prompts over new and known documents",
    "warmup": "warm-up",
    "one_at_a_time": "one request at a time",
    "rates": "rates",
}

NOT_YET = "not measured yet"


class ServeReport:
    """Keeps the figures of servers, and writes the JSON file again with each new figure.

    servers  figures of a server by their names, by its kind
    missing  the reason why a part is missing or incomplete, by kind and part
    record   further entries of the JSON
    """

    def __init__(
        self,
        model: str,
        kinds: Sequence[ServerKind],
        parts: Sequence[Part],
        ttft_limit_ms: float,
        *,
        record: Mapping[str, Any],
        out: Path | None = None,
    ) -> None:
        self.model, self.ttft_limit_ms = model, ttft_limit_ms
        self.servers: dict[ServerKind, dict[str, Any]] = {kind: {"kind": kind} for kind in kinds}
        self.missing: dict[ServerKind, dict[Part, str]] = {
            kind: dict.fromkeys(parts, NOT_YET) for kind in kinds
        }
        self._record, self.out, self.is_written = record, out, False

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The figures of servers that have any."""
        return [
            figures
            for figures in self.servers.values()
            if figures.keys() & {"reuse", "one_at_a_time"} or figures.get("rates")
        ]

    def keep(self, kind: ServerKind, part: Part, figures: Any, *, is_complete: bool = True) -> None:
        """Keep the figures of a part, and write the file."""
        self.servers[kind][part] = figures
        if is_complete:
            self.missing[kind].pop(part, None)
        self.write()

    def end(self, kind: ServerKind, reason: str) -> None:
        """Say why all parts of a server that have no reason yet are missing."""
        missing = self.missing[kind]
        missing.update({part: reason for part, found in missing.items() if found == NOT_YET})

    def write(self) -> None:
        """Write the JSON file, if there is a figure."""
        if not self.measured:
            return
        write_measurement(
            self.out,
            {
                "model": self.model,
                **self._record,
                "missing": {kind: parts for kind, parts in self.missing.items() if parts},
                "summary": self.summary(),
                "servers": self.measured,
            },
        )
        self.is_written = self.out is not None

    def summary(self) -> dict[str, Any]:
        """Return what follows from the figures; a ratio of rates only if both searches are complete."""
        is_complete = not any("rates" in parts for parts in self.missing.values())
        return summarize_servers(self.measured, self.ttft_limit_ms, has_all_rates=is_complete)

    def print(self) -> None:
        """Print the tables, and what is missing."""
        if not self.measured:
            return
        summary = self.summary()
        print_reuse(self.model, self.measured, summary)
        print_tables(self.model, self.measured, summary, self.ttft_limit_ms)
        console = PlainConsole()
        for kind, parts in self.missing.items():
            for reason in dict.fromkeys(parts.values()):
                names = ", ".join(PART_LABELS[part] for part in parts if parts[part] == reason)
                console.print(f"missing: {LABELS[kind][0]}, {names}: {reason}", soft_wrap=True)

    def draw(self, png: Path) -> None:
        """Draw the rates, if there is any figure."""
        if self.measured:
            drawn = [figures for figures in self.measured if figures.get("rates")]
            save_figure(draw_serve(self.model, drawn, self.ttft_limit_ms), png)


def best_rate(figures: Mapping[str, Any]) -> float | None:
    """Return the largest measured rate up to which all measured rates hold; None if the smallest does not."""
    best = None
    for one in figures.get("rates", ()):
        if not one["is_within_limit"]:
            break
        best = float(one["rate"])
    return best


def summarize_servers(
    measured: Sequence[Mapping[str, Any]], ttft_limit_ms: float, *, has_all_rates: bool = True
) -> dict[str, Any]:
    """Return the largest rate that holds and the TTFT without other requests, for each server, and ratios.

    The TTFT of each order of documents is also a share of what new documents take vLLM alone, in percent.
    """
    rates = {figures["kind"]: best_rate(figures) for figures in measured}
    single = {
        figures["kind"]: figures["one_at_a_time"]["ttft_ms"]["p50"]
        for figures in measured
        if "one_at_a_time" in figures
    }
    reuse = {
        figures["kind"]: {order: one["ttft_ms"]["p50"] for order, one in figures["reuse"].items()}
        for figures in measured
        if "reuse" in figures
    }
    summary: dict[str, Any] = {
        "ttft_limit_ms": ttft_limit_ms,
        "largest_rate": rates,
        "holds_at_every_rate": {
            figures["kind"]: all(one["is_within_limit"] for one in figures["rates"])
            for figures in measured
            if figures.get("rates")
        },
        "one_at_a_time_ttft_p50_ms": single,
        "reuse_ttft_p50_ms": reuse,
    }
    if new := reuse.get("plain", {}).get("new"):
        summary["reuse_percent_of_plain_new"] = {
            kind: {order: ttft and 100 * ttft / new for order, ttft in orders.items()}
            for kind, orders in reuse.items()
        }
    plain, blocks = rates.get("plain"), rates.get("blocks")
    if has_all_rates and plain and blocks:
        summary["rate_ratio"] = blocks / plain
    if single.get("plain") and single.get("blocks"):
        summary["ttft_share_percent"] = 100 * single["blocks"] / single["plain"]
    return summary


def print_reuse(model: str, measured: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Print a row for each server and order of documents."""
    table = Table(
        "server",
        Column("documents", no_wrap=True),
        *("requests", "failed", "TTFT", "of new", "reused"),
        title=f"{model}: one request at a time, p50 / p95 / p99 in ms",
        caption="of new: p50 as a share of what new documents take vLLM alone",
    )
    shares = summary.get("reuse_percent_of_plain_new", {})
    for figures in measured:
        for order, one in figures.get("reuse", {}).items():
            share = shares.get(figures["kind"], {}).get(order)
            table.add_row(
                LABELS[figures["kind"]][0],
                ORDER_LABELS[order],
                str(one["num_requests"]),
                str(one["num_failed"]),
                " / ".join(map(format_ms, one["ttft_ms"].values())),
                "" if share is None else f"{share:.0f} %",
                f"{one['reused_percent']:.0f} % {', '.join(one['block_sources'])}",
            )
    if table.row_count:
        PlainConsole().print(table)


def print_tables(
    model: str, measured: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], ttft_limit_ms: float
) -> None:
    """Print a row for each server and rate, and a row of what follows for each server."""
    console = PlainConsole()
    table = Table(
        *("server", "requests/s", "requests", "failed", "TTFT", "whole answer", "reused"),
        title=f"{model}: p50 / p95 / p99 in ms",
        caption="times from the planned arrival to the first token, and to the end of the answer; p95 of up "
        "to 20 requests and p99 of up to 100 are the slowest request",
    )
    for figures in measured:
        rows = [("one at a time", figures["one_at_a_time"])] if "one_at_a_time" in figures else []
        rows += [(f"{one['rate']:.3g}", one) for one in figures.get("rates", [])]
        for rate, one in rows:
            times = [" / ".join(map(format_ms, one[name].values())) for name in ("ttft_ms", "end_to_end_ms")]
            counts = [str(one["num_requests"]), str(one["num_failed"])]
            table.add_row(LABELS[figures["kind"]][0], rate, *counts, *times, f"{one['reused_percent']:.0f} %")
    if table.row_count:
        console.print(table)
    for figures in measured:
        console.print(_conclusion(figures, summary, ttft_limit_ms), soft_wrap=True)
        for reason, number in _failures(figures).items():
            console.print(f"  {number} failed: {reason}", soft_wrap=True)


def _conclusion(figures: Mapping[str, Any], summary: Mapping[str, Any], ttft_limit_ms: float) -> str:
    """Return what follows for a server."""
    kind: ServerKind = figures["kind"]
    rate, single = summary["largest_rate"][kind], summary["one_at_a_time_ttft_p50_ms"]
    texts, limit = [], f"with p95 of the TTFT within {ttft_limit_ms:g} ms"
    if rate is not None:
        at_least = "at least " if summary["holds_at_every_rate"][kind] else ""
        texts.append(f"{at_least}{rate:.3g} requests/s {limit}")
    elif rates := figures.get("rates"):
        texts.append(f"no rate was measured {limit}, the smallest was {rates[0]['rate']:.3g} requests/s")
    if kind in single:
        texts.append(f"one request at a time: TTFT {format_ms(single[kind])} ms")
    return f"{LABELS[kind][0]}: {'; '.join(texts) or 'no rate was measured'}"


def _failures(figures: Mapping[str, Any]) -> dict[str, int]:
    """Return the reasons of failed requests of a server, in the warm-up too, and their numbers."""
    reasons: dict[str, int] = {}
    single = [figures[part] for part in ("warmup", "one_at_a_time") if part in figures]
    for one in (*figures.get("reuse", {}).values(), *single, *figures.get("rates", [])):
        for reason, number in one["failures"].items():
            reasons[reason] = reasons.get(reason, 0) + number
    return reasons


def draw_serve(model: str, measured: Sequence[Mapping[str, Any]], ttft_limit_ms: float) -> Any:
    """Return a figure of the TTFT over the rate for each server: p50 dashed, p95 solid."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for figures in measured:
        label, colour = LABELS[figures["kind"]]
        for percentile, style in (("p95", "-"), ("p50", "--")):
            points = [(one["rate"], one["ttft_ms"][percentile]) for one in figures["rates"]]
            drawn = [(rate, ttft) for rate, ttft in points if ttft is not None]
            axes.plot(
                [rate for rate, _ in drawn],
                [ttft for _, ttft in drawn],
                marker="o",
                linestyle=style,
                color=colour,
                label=f"{label}, {percentile}",
            )
    axes.axhline(ttft_limit_ms, color="grey", linestyle=":", label="limit for p95")
    axes.set_xscale("log", base=2)
    axes.set(
        yscale="log",
        xlabel="requests per second",
        ylabel="time to first token, ms",
        title=plain_label(f"Serving {model}"),
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper")
    return figure


def format_ms(value: float | None) -> str:
    """Return milliseconds with three figures, or that the request of this percentile has failed."""
    return "failed" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
