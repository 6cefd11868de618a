"""`blockft bench serve`: vLLM with cached blocks compared with vLLM alone, under the same requests.

A server is asked for new documents, for the same ones, and for the same ones in another order, one request
at a time. Then it is warmed up, and asked for documents of a corpus, one request at a time and at several
rates. A rate holds if no request fails and p95 of the time to first token (TTFT) is within the limit.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from blockft.bench.serve_client import LoadClient, Outcome, Target, is_within, summarize
from blockft.bench.serve_report import LABELS, Part, ServeReport, format_ms
from blockft.bench.serve_workload import DocumentOrder, ServePrompt, Workload
from blockft.bench.server_process import ServerProcess, wait_for_servers
from blockft.bench.time_limit import OutOfTime, TimeLimit
from blockft.errors import UserError, notify, warn
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

STOP_S = 3.0
"""How long a server may take to end after its share of the time."""

GRACE_S = 10.0
"""How long a server that no longer answers may take to end, so that its exit code can be named."""

KNOWN_PERCENT = 5.0
"""Share of tokens of new documents that a server may reuse without a warning."""

METHOD = """
Open loop: requests arrive by a Poisson process and are sent at their times, however many have no answer.
Times count from the planned arrival. A failed request counts as slower than every other one.
A rate holds if no request fails and p95 of the time to first token is within the limit. The search doubles
the first rate until a rate does not hold. If the first does not hold, the search goes down until one does, to
the rate at which the server has answered or to half the rate, before it doubles. Then it tries the geometric
mean of the largest rate that holds and the smallest one that does not.
A rate with fewer than 21 requests in its time gets more time: p95 would be the slowest request.
At a rate both servers get the same prompts at the same times. No prompt is asked twice. The times of two
rates differ by a factor only.
Where a server holds slightly more than it can answer for ever, its queue stays within the limit for the
length of the measurement: a longer one gives a smaller rate.
Prompts over new documents are asked one at a time, each followed by a prompt over the same documents in the
same order, and by one in another order with another first document. Each has a new question. The first three
prompts warm up.
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
    num_reuse       prompts over new documents, over the same ones, and over the same ones in another order
    num_warmups     requests before the measurement: first over the whole corpus, then by Zipf's law
    num_single      requests over the corpus that are asked one at a time
    timeout_s       a request without a complete answer after this time has failed
    """

    rates: Sequence[float]
    first_rate: float
    num_bisections: int
    seconds: float
    ttft_limit_ms: float
    num_reuse: int
    num_warmups: int
    num_single: int
    timeout_s: float

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the measurement of a server."""
        parts: tuple[Part, ...] = get_args(Part)
        return parts if self.num_reuse else parts[1:]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that is measured. Without a process it runs already."""

    target: Target
    process: ServerProcess | None = None

    @property
    def name(self) -> str:
        return LABELS[self.target.kind][0]


def bench_serve(
    workload: Workload,
    plan: ServePlan,
    servers: Sequence[Server],
    report: ServeReport,
    *,
    limit: TimeLimit,
    start_timeout_s: float,
    png: Path | None,
) -> None:
    """Measure servers one after the other. Print tables, write the report, and draw a plot into `png`.

    Processes that are begun already are measured when all of them answer, and run until the end. The others
    run one after the other. A server that fails does not end the measurement of the next one.

    Raises:
        UserError: a server cannot be started or reached, ends, or fails all first requests; a file cannot be
            written. The figures that were measured are written.
    """
    errors: dict[str, UserError] = {}
    try:
        together = [server for server in servers if server.process and server.process.is_begun]
        errors |= _wait(together, start_timeout_s, limit.share_end(1), report)
        for index, server in enumerate(servers):
            if server.name in errors:
                continue
            try:
                until = limit.share_end(len(servers) - index)
                _measure_server(server, workload, plan, report, until, start_timeout_s)
            except UserError as error:
                errors[server.name] = error
                report.end(server.target.kind, str(error))
    finally:
        for server in servers:
            report.end(server.target.kind, "the benchmark was stopped")
            if server.process:
                server.process.terminate()
        report.write()
    report.print()
    if png:
        report.draw(png)
    if errors:
        reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
        written = f"; the figures that were measured are in {report.out}" if report.is_written else ""
        raise UserError(reasons + written)


def _wait(
    servers: Sequence[Server], timeout_s: float, end: float, report: ServeReport
) -> dict[str, UserError]:
    """Wait until servers answer, and return the errors of those that failed."""
    of_process = {server.process: server for server in servers if server.process}
    errors = {}
    for process, error in wait_for_servers(list(of_process), timeout_s, end):
        server = of_process[process]
        if error:
            errors[server.name] = error
            report.end(server.target.kind, str(error))
        else:
            report.servers[server.target.kind]["start_s"] = process.start_s
            notify(f"{server.name} answers after {process.start_s:.0f} s")
    return errors


def _measure_server(
    server: Server, workload: Workload, plan: ServePlan, report: ServeReport, until: float, timeout_s: float
) -> None:
    """Start a server if it is not begun, measure it until the time `until`, and end it if it was started."""
    process = server.process
    is_started_here = process is not None and not process.is_begun
    try:
        if process and is_started_here:
            notify(f"starting {server.name}")
            process.begin()
            for error in _wait([server], timeout_s, until, report).values():
                raise error
        asyncio.run(_measure_in_time(server, workload, plan, report, until))
    finally:
        if process and is_started_here:
            process.stop(until + STOP_S)


async def _measure_in_time(
    server: Server, workload: Workload, plan: ServePlan, report: ServeReport, until: float
) -> None:
    kind, reason = server.target.kind, "the time limit left no time"
    try:
        async with asyncio.timeout(None if until == math.inf else until - time.monotonic()):
            async with LoadClient(server.target, workload.options.answer_len, plan.timeout_s) as client:
                await _Measurement(server, client, workload, plan, report, until).run()
            return
    except OutOfTime as found:
        reason = str(found)
    except TimeoutError:
        pass
    warn(f"{server.name}: {reason}")
    report.end(kind, reason)


class _Measurement:
    """The measurement of a running server. The report gets every figure as soon as it is measured."""

    def __init__(
        self,
        server: Server,
        client: LoadClient,
        workload: Workload,
        plan: ServePlan,
        report: ServeReport,
        until: float,
    ) -> None:
        self._server, self._client, self._until = server, client, until
        self._workload, self._plan, self._report = workload, plan, report
        self._kind, self._name = server.target.kind, server.name

    async def run(self) -> None:
        if self._plan.num_reuse:
            await self._measure_reuse()
        await self._warm_up()
        single = self._workload.prompts(self._plan.num_single, stream=_STREAM_SINGLE)
        figures = await self._ask_in_turn(f"ask {self._name} one at a time", single, 1)
        self._report.keep(self._kind, "one_at_a_time", figures)
        self._report.servers[self._kind]["rates"] = []
        await _measure_rates(self._measure_rate, self._plan)
        self._report.keep(self._kind, "rates", self._report.servers[self._kind]["rates"])

    async def _measure_reuse(self) -> None:
        outcomes: dict[DocumentOrder, list[Outcome]] = {}
        number = self._plan.num_reuse
        with progress(f"ask {self._name} for new documents", number + 1, unit="group") as advance:
            for index, group in enumerate(self._workload.reuse_prompts(number + 1)):
                found = {
                    order: await self._client.run_closed_loop([prompt], 1, _nothing)
                    for order, prompt in group.items()
                }
                advance()
                answers = [outcome for (outcome,) in found.values()]
                if index == 0:  # this group warms up
                    await self._check(answers, "the first prompts")
                    continue
                await self._check(answers)
                for order, (outcome,) in found.items():
                    outcomes.setdefault(order, []).append(outcome)
                figures = {order: _summarize_reuse(one) for order, one in outcomes.items()}
                self._report.keep(self._kind, "reuse", figures, is_complete=index == number)
        if _is_known(figures["new"]):
            warn(
                f"{self._name} knew the new documents before, so that the time of new documents is that of "
                "known ones: set another --seed, or start the server with an empty cache"
            )

    async def _warm_up(self) -> None:
        warmups = self._workload.warmup_prompts(self._plan.num_warmups)
        figures = await self._ask_in_turn(f"warm up {self._name}", warmups, WARMUP_CLIENTS, "the warm-up")
        self._report.keep(self._kind, "warmup", figures)

    async def _ask_in_turn(
        self, label: str, prompts: Sequence[ServePrompt], num_clients: int, what: str = ""
    ) -> dict[str, Any]:
        with progress(label, len(prompts), unit="request") as advance:
            outcomes = await self._client.run_closed_loop(prompts, num_clients, advance)
        await self._check(outcomes, what)
        return summarize(outcomes)

    async def _measure_rate(self, rate: float) -> dict[str, Any]:
        times = self._workload.arrival_times(rate, self._plan.seconds, min_number=MIN_REQUESTS)
        # a prompt that was asked before would be a prefix that every server knows
        prompts = self._workload.prompts(len(times), stream=_STREAM_RATES + round(1e6 * rate))
        longest_s, left_s = times[-1] + self._plan.timeout_s, self._until - time.monotonic()
        if longest_s > left_s:
            raise OutOfTime(
                f"{rate:.3g} requests/s would take up to {longest_s:.0f} s with --timeout "
                f"{self._plan.timeout_s:g}, and the time limit left {max(left_s, 0):.0f} s"
            )
        with progress(f"ask {self._name} {rate:.3g} times a second", len(times), unit="request") as advance:
            outcomes = await self._client.run_open_loop(prompts, times, advance)
        await self._check(outcomes)
        figures = {"rate": rate} | summarize(outcomes)
        figures["is_within_limit"] = is_within(figures, self._plan.ttft_limit_ms)
        self._describe_rate(figures)
        rates = [*self._report.servers[self._kind]["rates"], figures]
        rates.sort(key=lambda one: float(one["rate"]))
        self._report.keep(self._kind, "rates", rates, is_complete=False)
        return figures

    def _describe_rate(self, figures: Mapping[str, Any]) -> None:
        rate = figures["rate"]
        notify(
            f"{self._name}, {rate:.3g} requests/s: TTFT p50 {format_ms(figures['ttft_ms']['p50'])}, p95 "
            f"{format_ms(figures['ttft_ms']['p95'])} ms; {figures['num_failed']} of "
            f"{figures['num_requests']} failed"
        )
        late_ms = figures["client_late_ms"]["p95"] or 0.0
        if late_ms > LATE_SHARE * self._plan.ttft_limit_ms:
            warn(
                f"at {rate:.3g} requests/s the benchmark itself sent 5 % of its requests {late_ms:.0f} "
                "ms too late, which counts in their times: leave a core to it, or measure lower rates"
            )

    async def _check(self, outcomes: Sequence[Outcome], what: str = "") -> None:
        """Check that the server still runs, if requests have failed.

        what: requests of which at least one must succeed.

        Raises:
            UserError: the server has ended, does not answer any more, or failed all requests.
        """
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        if not failures:
            return
        is_failing = len(failures) == len(outcomes)
        try:
            await self._client.find_model()
        except UserError:
            if self._server.process:  # a process that ends closes its port first
                end = time.monotonic() + GRACE_S
                while time.monotonic() < end:
                    self._server.process.check("while it was measured")
                    await asyncio.sleep(0.1)
            raise
        if what and is_failing:
            raise UserError(f"failed all {len(failures)} requests of {what}: {failures[0]}")


def _nothing() -> None:
    pass


def _summarize_reuse(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of prompts that are asked with others between them, so that no rate follows."""
    return {
        name: figure
        for name, figure in summarize(outcomes).items()
        if name not in ("duration_s", "answered_per_s", "client_late_ms")
    }


def _is_known(figures: Mapping[str, Any]) -> bool:
    """Return whether a server had new documents in its caches."""
    sources = figures["block_sources"]
    if sources:
        return bool(sources.keys() - {"computed"})
    return bool(figures["reused_percent"] > KNOWN_PERCENT)


async def _measure_rates(measure: Callable[[float], Any], plan: ServePlan) -> list[dict[str, Any]]:
    """Return the figures of all rates that are measured, in the order of the rates; see `METHOD`."""
    if plan.rates:
        return [await measure(rate) for rate in sorted(set(plan.rates))]
    found: dict[float, dict[str, Any]] = {}

    async def holds(rate: float) -> bool:
        found[rate] = await measure(rate)
        return is_within(found[rate], plan.ttft_limit_ms)

    rate, low, high = plan.first_rate, 0.0, math.inf  # the largest that holds, the smallest that does not
    for _ in range(MAX_DOUBLINGS + 1):
        if await holds(rate):
            low = rate
        else:
            high = rate
        rate = 2 * low if low else _smaller_rate(found[high])
        if rate >= high or rate * plan.seconds < MIN_RATE_SHARE * MIN_REQUESTS:
            break
    for _ in range(plan.num_bisections if low and high < math.inf else 0):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if await holds(middle) else (low, middle)
    return [found[rate] for rate in sorted(found)]


def _smaller_rate(figures: Mapping[str, Any]) -> float:
    """Return the rate to measure after one that does not hold: half of it, or less if less was answered."""
    return min(figures["rate"] / 2, figures["answered_per_s"] or math.inf)


def read_load() -> float:
    """Return the load average of the last minute, and warn if the machine is busy."""
    load, num_cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY_SHARE * num_cores:
        warn(
            f"the load average is {load:.1f} on {num_cores} cores before a server starts, so that the times "
            "are not those of the servers alone: end other work first"
        )
    return load
