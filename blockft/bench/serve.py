"""`blockft bench serve`: vLLM with cached blocks compared with vLLM alone, under the same requests.

A server is warmed up first. Then requests are asked one at a time, and then at several rates. A rate holds if
no request fails and p95 of the time to first token (TTFT) is within the limit.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from blockft.bench.measurement import write_measurement
from blockft.bench.serve_client import LoadClient, Outcome, Target, is_within, summarize
from blockft.bench.serve_workload import ServePrompt, Workload
from blockft.console import PlainConsole
from blockft.errors import UserError, notify, warn
from blockft.outputs import plain_label, save_figure
from blockft.progress import progress

WARMUP_CLIENTS = 8
"""Requests of the warm-up that are asked at the same time."""

MAX_DOUBLINGS = 12
"""How often a search doubles or halves its first rate."""

LATE_SHARE = 0.05
"""Share of the limit by which the benchmark may send its requests too late without a warning."""

BUSY_SHARE = 0.25
"""Share of the cores that other work may use at the start without a warning."""

MIN_REQUESTS = 21
"""Fewest requests at a rate. The p95 of fewer requests is the slowest one, which one accident decides."""

MIN_RATE_SHARE = 0.25
"""The search ends at rates that give fewer than this share of `MIN_REQUESTS` in the time of a rate."""

LABELS = {"plain": ("vLLM alone", "tab:orange"), "blocks": ("vLLM with blocks", "tab:blue")}
"""Name and colour of each kind of server."""

METHOD = """
Open loop: requests arrive by a Poisson process and are sent at their times, however many have no answer.
Times count from the planned arrival. A failed request counts as slower than every other one.
A rate holds if no request fails and p95 of the time to first token is within the limit. The search doubles
the first rate until a rate does not hold (or halves it until one does). Then it tries the geometric mean of
the largest rate that holds and the smallest one that does not.
A rate with fewer than 21 requests in its time gets more time: p95 would be the slowest request.
At a rate both servers get the same prompts at the same times. No prompt is asked twice. The times of two
rates differ by a factor only.
Where a server holds slightly more than it can answer for ever, its queue stays within the limit for the
length of the measurement: a longer one gives a smaller rate.
"""

_STREAM_SINGLE, _STREAM_RATES = 1, 2


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """How servers are measured.

    rates           requests per second to measure; none searches for the largest rate that holds
    first_rate      where the search begins
    num_bisections  further rates between the largest that holds and the smallest that does not
    seconds         how long requests arrive at each rate; longer at rates with few requests
    ttft_limit_ms   limit for p95 of the TTFT
    num_warmups     requests before the measurement: first over the whole corpus, then by Zipf's law
    num_single      requests that are asked one at a time
    timeout_s       a request without a complete answer after this time has failed
    """

    rates: Sequence[float]
    first_rate: float
    num_bisections: int
    seconds: float
    ttft_limit_ms: float
    num_warmups: int
    num_single: int
    timeout_s: float


Server = tuple[Target, AbstractContextManager[float]]
"""A server, and the context in which it runs. The context gives the seconds that its start took."""


def bench_serve(
    model: str,
    workload: Workload,
    plan: ServePlan,
    servers: Sequence[Server],
    *,
    record: Mapping[str, Any],
    out: Path | None,
    png: Path | None,
) -> None:
    """Measure servers one after the other. Print tables, write the figures to `out` and a plot to `png`.

    record: further entries of the JSON.

    Raises:
        UserError: a server cannot be started or reached, or fails every request of the warm-up; a file cannot
            be written.
    """
    measured, load_average = [], _read_load()
    for target, running in servers:
        with running as start_s:
            figures = asyncio.run(_measure(target, workload, plan))
        measured.append({"kind": target.kind, "url": target.url, "start_s": start_s} | figures)
    summary = summarize_servers(measured, plan.ttft_limit_ms)
    print_tables(model, measured, summary, plan.ttft_limit_ms)
    write_measurement(
        out,
        {
            "model": model,
            **record,
            "method": " ".join(METHOD.split()),
            "workload": asdict(workload.options),
            "plan": asdict(plan),
            "load_average": load_average,
            "summary": summary,
            "servers": measured,
        },
    )
    if png:
        save_figure(draw_serve(model, measured, plan.ttft_limit_ms), png)


def _read_load() -> float:
    """Return the load average of the last minute, and warn if the machine is busy."""
    load, num_cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY_SHARE * num_cores:
        warn(
            f"the load average is {load:.1f} on {num_cores} cores before a server starts, so that the times "
            "are not those of the servers alone: end other work first"
        )
    return load


async def _measure(target: Target, workload: Workload, plan: ServePlan) -> dict[str, Any]:
    """Return the figures of one running server."""
    name = LABELS[target.kind][0]
    warmups = workload.warmup_prompts(plan.num_warmups)
    single = workload.prompts(plan.num_single, stream=_STREAM_SINGLE)
    async with LoadClient(target, workload.options.answer_len, plan.timeout_s) as client:
        with progress(f"warm up {name}", len(warmups), unit="request") as advance:
            warmup = summarize(await client.run_closed_loop(warmups, WARMUP_CLIENTS, advance))
        if warmup["num_failed"] == len(warmups) > 0:
            (reason, *_) = warmup["failures"]
            raise UserError(f"{name} failed all {len(warmups)} requests of the warm-up: {reason}")
        with progress(f"ask {name} one at a time", len(single), unit="request") as advance:
            alone = summarize(await client.run_closed_loop(single, 1, advance))

        async def measure_rate(rate: float) -> dict[str, Any]:
            times = workload.arrival_times(rate, plan.seconds, min_number=MIN_REQUESTS)
            # a prompt that was asked before would be a prefix that every server knows
            prompts = workload.prompts(len(times), stream=_STREAM_RATES + round(1e6 * rate))
            figures = await _measure_rate(client, name, rate, prompts, times)
            late_ms = figures["client_late_ms"]["p95"] or 0.0
            if late_ms > LATE_SHARE * plan.ttft_limit_ms:
                warn(
                    f"at {rate:.3g} requests/s the benchmark itself sent 5 % of its requests {late_ms:.0f} "
                    "ms too late, which counts in their times: leave a core to it, or measure lower rates"
                )
            return {"rate": rate} | figures

        rates = await _measure_rates(measure_rate, plan)
    for figures in rates:
        figures["is_within_limit"] = is_within(figures, plan.ttft_limit_ms)
    return {"warmup": warmup, "one_at_a_time": alone, "rates": rates}


async def _measure_rate(
    client: LoadClient, name: str, rate: float, prompts: Sequence[ServePrompt], times: Sequence[float]
) -> dict[str, Any]:
    with progress(f"ask {name} {rate:.3g} times a second", len(times), unit="request") as advance:
        outcomes: list[Outcome] = await client.run_open_loop(prompts, times, advance)
    figures = summarize(outcomes)
    notify(
        f"{name}, {rate:.3g} requests/s: TTFT p50 {_ms(figures['ttft_ms']['p50'])}, "
        f"p95 {_ms(figures['ttft_ms']['p95'])} ms; {figures['num_failed']} of {len(times)} failed"
    )
    return figures


async def _measure_rates(measure: Callable[[float], Any], plan: ServePlan) -> list[dict[str, Any]]:
    """Return the figures of all rates that are measured, in the order of the rates; see `METHOD`."""
    if plan.rates:
        return [await measure(rate) for rate in sorted(set(plan.rates))]
    found: dict[float, dict[str, Any]] = {}

    async def holds(rate: float) -> bool:
        found[rate] = await measure(rate)
        return is_within(found[rate], plan.ttft_limit_ms)

    rate = plan.first_rate
    first_holds = await holds(rate)
    factor = 2.0 if first_holds else 0.5
    for _ in range(MAX_DOUBLINGS):
        if rate * factor * plan.seconds < MIN_RATE_SHARE * MIN_REQUESTS:
            break
        if await holds(rate * factor) != first_holds:
            break
        rate *= factor
    if len({is_within(one, plan.ttft_limit_ms) for one in found.values()}) == 1:
        return [found[rate] for rate in sorted(found)]  # every rate holds, or none
    low, high = sorted((rate, rate * factor))
    for _ in range(plan.num_bisections):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if await holds(middle) else (low, middle)
    return [found[rate] for rate in sorted(found)]


# Results


def best_rate(figures: Mapping[str, Any]) -> float:
    """Return the largest measured rate up to which every measured rate holds; 0 if the smallest does not."""
    best = 0.0
    for one in figures["rates"]:
        if not one["is_within_limit"]:
            break
        best = one["rate"]
    return best


def summarize_servers(measured: Sequence[Mapping[str, Any]], ttft_limit_ms: float) -> dict[str, Any]:
    """Return the largest rate that holds and the TTFT without other requests, for each server, and ratios."""
    rates = {figures["kind"]: best_rate(figures) for figures in measured}
    single = {figures["kind"]: figures["one_at_a_time"]["ttft_ms"]["p50"] for figures in measured}
    is_search_open = {
        figures["kind"]: all(one["is_within_limit"] for one in figures["rates"]) for figures in measured
    }
    summary: dict[str, Any] = {
        "ttft_limit_ms": ttft_limit_ms,
        "largest_rate": rates,
        "holds_at_every_rate": is_search_open,
        "one_at_a_time_ttft_p50_ms": single,
    }
    if rates.keys() == {"plain", "blocks"}:
        if rates["plain"]:
            summary["rate_ratio"] = rates["blocks"] / rates["plain"]
        if single["plain"] and single["blocks"]:
            summary["ttft_share_percent"] = 100 * single["blocks"] / single["plain"]
    return summary


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
        name = LABELS[figures["kind"]][0]
        rows = [("one at a time", figures["one_at_a_time"])]
        rows += [(f"{one['rate']:.3g}", one) for one in figures["rates"]]
        for rate, one in rows:
            times = [" / ".join(map(_ms, one[kind].values())) for kind in ("ttft_ms", "end_to_end_ms")]
            counts = [str(one["num_requests"]), str(one["num_failed"])]
            table.add_row(name, rate, *counts, *times, f"{one['reused_percent']:.0f} %")
    console.print(table)
    for figures in measured:
        kind = figures["kind"]
        at_least = "at least " if summary["holds_at_every_rate"][kind] else ""
        console.print(
            f"{LABELS[kind][0]}: {at_least}{summary['largest_rate'][kind]:.3g} requests/s with p95 of the "
            f"TTFT within {ttft_limit_ms:g} ms; one request at a time: TTFT "
            f"{_ms(summary['one_at_a_time_ttft_p50_ms'][kind])} ms",
            soft_wrap=True,
        )
        for reason, number in _failures(figures).items():
            console.print(f"  {number} failed: {reason}", soft_wrap=True)


def _failures(figures: Mapping[str, Any]) -> dict[str, int]:
    """Return the reasons of failed requests of a server, in the warm-up too, and their numbers."""
    reasons: dict[str, int] = {}
    for one in (figures["warmup"], figures["one_at_a_time"], *figures["rates"]):
        for reason, number in one["failures"].items():
            reasons[reason] = reasons.get(reason, 0) + number
    return reasons


def draw_serve(model: str, measured: Sequence[Mapping[str, Any]], ttft_limit_ms: float) -> Any:
    """Return a figure of the TTFT over the rate for each server: p50 dashed, p95 solid."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

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
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="requests per second",
        ylabel="time to first token, ms",
        title=plain_label(f"Serving {model}"),
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper")
    return figure


def _ms(value: float | None) -> str:
    return "failed" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
