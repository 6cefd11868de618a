"""`blockft bench serve`: its requests, its open loop, its search, and whole runs over HTTP."""

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from blockft.bench import serve, serve_client, time_limit
from blockft.bench.serve import ServePlan, Server
from blockft.bench.serve_client import LoadClient, Outcome, Target, is_within, summarize
from blockft.bench.serve_report import ServeReport, best_rate, print_tables, summarize_servers
from blockft.bench.serve_workload import ServePrompt, Workload, WorkloadOptions
from blockft.bench.synthetic_source import save_tokenizer, write_source
from blockft.bench.time_limit import END_S, TimeLimit
from blockft.data.encoder import Encoder
from blockft.data.request import parse_request
from blockft.errors import UserError
from blockft.model.load import load_tokenizer
from blockft.serving.asgi import Receive, Scope, Send, read_body, send_json
from blockft.stages.bench_serve import default_warmups, parse_rates
from tests.commands import TIMEOUT_S, blockft, free_port, wait_until
from tests.run import save_model
from tests.serving.conftest import LIMITS
from tests.serving.fake_vllm import MODEL, MODEL_ENTRY
from tests.serving.http_server import http_server
from tests.serving.stubs import make_served
from tests.serving.test_front_end import Setup

OPTIONS = WorkloadOptions(
    num_documents=4, document_len=12, question_len=6, answer_len=3, corpus_size=20, zipf=1.0, seed=5
)
PLAN = ServePlan(
    rates=(),
    first_rate=8,
    num_bisections=3,
    seconds=1,
    ttft_limit_ms=500,
    num_reuse=2,
    num_warmups=5,
    num_single=3,
    timeout_s=600,
)


@pytest.fixture(autouse=True)
def long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark and a server wait for may take minutes in a test."""
    monkeypatch.setattr(serve, "GRACE_S", 600)
    for limit in LIMITS:
        monkeypatch.setattr(f"blockft.serving.{limit}", 600)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A tokenizer with many words, as random models have it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_source(folder / "source.jsonl", 40, 0)
    save_tokenizer(folder, folder / "source.jsonl", num_ids=2000)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def workload(tokenizer: PreTrainedTokenizerBase) -> Workload:
    return Workload(tokenizer, OPTIONS)


# Requests


def test_prompts_have_their_numbers_of_tokens_and_follow_from_the_seed(
    workload: Workload, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = workload.prompts(30, stream=1)
    assert prompts == Workload(tokenizer, OPTIONS).prompts(30, stream=1)
    assert prompts != workload.prompts(30, stream=2)
    assert prompts != Workload(tokenizer, replace(OPTIONS, seed=6)).prompts(30, stream=1)
    encoder = Encoder(tokenizer)
    for prompt in prompts:
        blocks = encoder.encode_prompt(parse_request({"blocks": prompt.blocks}, None, "p"))
        assert [len(ids) for ids in blocks] == [12, 12, 12, 12, 6]
        assert [id for ids in blocks for id in ids] == prompt.ids
        assert len(set(prompt.blocks)) == 5
    assert len({prompt.blocks[-1] for prompt in prompts}) == 30


def test_a_tokenizer_without_words_gets_prompts_too(model: Path) -> None:
    (prompt,) = Workload(load_tokenizer(str(model)), OPTIONS).prompts(1, stream=1)
    assert len(prompt.ids) == OPTIONS.num_tokens - OPTIONS.answer_len


def test_documents_follow_zipfs_law(workload: Workload) -> None:
    counts = Counter(text for prompt in workload.prompts(500, stream=1) for text in prompt.blocks[:-1])
    order = [text for text, _ in counts.most_common()]
    covering = [text for prompt in workload.warmup_prompts(5) for text in prompt.blocks[:-1]]
    assert len(covering) == len(set(covering)) == 20
    assert order[0] == covering[0] and order.index(covering[-1]) > 10
    assert counts[covering[0]] > 3 * counts[covering[-1]]
    assert default_warmups(20, 4) == 10
    assert len(workload.warmup_prompts(12)) == 12
    uneven = {text for prompt in workload.warmup_prompts(3) for text in prompt.blocks[:-1]}
    assert uneven == set(covering[:12])


def test_prompts_over_new_documents_are_followed_by_the_same_documents_in_other_orders(
    workload: Workload,
) -> None:
    groups = list(workload.reuse_prompts(20))
    known = {text for prompt in workload.warmup_prompts(5) for text in prompt.blocks}
    questions = set()
    for group in groups:
        new, same, other = (list(group[order].blocks) for order in ("new", "same_order", "other_order"))
        assert new[:-1] == same[:-1] and sorted(other[:-1]) == sorted(new[:-1])
        assert other[0] != new[0]
        assert not known & set(new)
        known |= set(new)
        questions |= {new[-1], same[-1], other[-1]}
    assert len(questions) == 60
    assert list(workload.reuse_prompts(20)) == groups


def test_one_document_has_no_other_order(tokenizer: PreTrainedTokenizerBase) -> None:
    (group,) = Workload(tokenizer, replace(OPTIONS, num_documents=1)).reuse_prompts(1)
    assert list(group) == ["new", "same_order"]


def test_arrivals_are_those_of_another_rate_in_other_units(workload: Workload) -> None:
    slow, fast = workload.arrival_times(10, 100), workload.arrival_times(20, 50)
    assert slow == pytest.approx([2 * time for time in fast])
    assert slow == sorted(slow) and 850 < len(slow) < 1150 and slow[-1] < 100
    gaps = [b - a for a, b in zip(slow, slow[1:], strict=False)]
    assert max(gaps) > 3 / 10 > 1 / 10 > min(gaps)


def test_a_slow_rate_gets_more_time_until_its_p95_is_not_the_slowest_request(workload: Workload) -> None:
    times = workload.arrival_times(0.5, 10, min_number=serve.MIN_REQUESTS)
    assert len(times) == serve.MIN_REQUESTS and times[-1] > 10
    assert times[:3] == workload.arrival_times(0.5, 10)[:3]
    assert workload.arrival_times(50, 10, min_number=serve.MIN_REQUESTS) == workload.arrival_times(50, 10)
    for number in (serve.MIN_REQUESTS - 1, serve.MIN_REQUESTS):
        figures = summarize([answered(seconds) for seconds in range(number)])
        is_slowest = figures["ttft_ms"]["p95"] == 1000 * (number - 1)
        assert is_slowest == (number < serve.MIN_REQUESTS)


# The open loop


class StubServer:
    """Streams an answer of 3 tokens to each request. `respond` may answer otherwise, by number."""

    def __init__(self, respond: Any = None) -> None:
        self.respond, self.num_asked, self.bodies = respond, 0, list[dict[str, Any]]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/v1/models":
            await send_json(send, 200, {"object": "list", "data": [MODEL_ENTRY]})
            return
        self.bodies.append(json.loads(await read_body(receive, 1 << 30)))
        self.num_asked += 1
        number = self.num_asked
        if self.respond is None or not await self.respond(number, send):
            await stream(send)


async def stream(send: Send, num_tokens: int = 3, end: bool = True) -> None:
    base = {"id": "1", "object": "text_completion", "created": 1, "model": MODEL}
    chunks = [
        base | {"choices": [{"index": 0, "text": "a", "finish_reason": None, "logprobs": None}]},
        base
        | {
            "choices": [],
            "usage": {
                "prompt_tokens": 10,
                "completion_tokens": num_tokens,
                "total_tokens": 10 + num_tokens,
                "prompt_tokens_details": {"cached_tokens": 4},
            },
        },
    ]
    content = [b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in (chunks if end else chunks[:1])]
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for event in (*content, b"data: [DONE]\n\n"):
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


PROMPT = ServePrompt(blocks=["a", "b"], ids=[1, 2])


def ask(server: StubServer, times: Sequence[float], timeout_s: float = 600) -> list[Outcome]:
    async def run(url: str) -> list[Outcome]:
        async with LoadClient(Target(kind="plain", url=url), 3, timeout_s) as client:
            return await client.run_open_loop([PROMPT] * len(times), times, lambda: None)

    with http_server(server) as url:
        return asyncio.run(run(url))


def test_times_count_from_the_planned_arrival_also_while_the_server_stalls() -> None:
    """A client that waits for an answer before it sends the next request would hide the stall."""

    async def stall(number: int, send: Send) -> bool:
        if number == 1:
            time.sleep(1)  # no other request is answered meanwhile
        return False

    outcomes = ask(StubServer(stall), [0, 0.1, 0.2, 0.3, 0.4])
    assert not any(outcome.failure for outcome in outcomes)
    for outcome, planned in zip(outcomes, [0, 0.1, 0.2, 0.3, 0.4], strict=True):
        assert 0.95 - planned < outcome.ttft_s <= outcome.end_to_end_s
        assert outcome.prompt_tokens == 10 and outcome.reused_tokens == 4


def test_an_idle_connection_is_not_used_when_a_server_may_close_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that closes an idle connection while a request is sent on it makes the request fail."""
    monkeypatch.setattr(serve_client, "KEEPALIVE_S", 0.1)
    ports = list[int]()

    class Recorder(StubServer):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/v1/completions":
                ports.append(scope["client"][1])
            await super().__call__(scope, receive, send)

    async def ask_after_a_pause(url: str) -> list[Outcome]:
        async with LoadClient(Target(kind="plain", url=url), 3, 600) as client:
            outcomes = await client.run_closed_loop([PROMPT] * 2, 1, lambda: None)
            await asyncio.sleep(0.5)
            return outcomes + await client.run_closed_loop([PROMPT], 1, lambda: None)

    with http_server(Recorder()) as url:
        outcomes = asyncio.run(ask_after_a_pause(url))
    assert not [outcome.failure for outcome in outcomes if outcome.failure]
    assert len(ports) == 3 and ports[2] not in ports[:2]


def test_every_failure_is_counted_with_its_reason() -> None:
    async def fail(number: int, send: Send) -> bool:
        if number == 1:
            await send_json(send, 500, {"error": {"message": "out of pages"}})
        elif number == 2:
            await stream(send, num_tokens=2)
        elif number == 3:
            await stream(send, end=False)
        elif number == 4:
            raise ConnectionResetError
        return number <= 4

    async def hang(number: int, send: Send) -> bool:
        await asyncio.sleep(3600)
        return True

    outcomes = ask(StubServer(fail), [0.1 * number for number in range(6)])
    outcomes += ask(StubServer(hang), [0], timeout_s=2)
    figures = summarize(outcomes)
    assert figures["num_requests"] == 7 and figures["num_failed"] == 5
    reasons = "\n".join(figures["failures"])
    for reason in ("code: 500", "2 tokens instead of 3", "before its usage", "no complete answer after 2 s"):
        assert reason in reasons
    assert figures["ttft_ms"]["p50"] is None and figures["end_to_end_ms"]["p95"] is None
    assert not is_within(figures, 1e9)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    async def run() -> None:
        async with LoadClient(Target(kind="plain", url=f"http://127.0.0.1:{free_port()}/v1"), 3, 600):
            raise AssertionError

    with pytest.raises(UserError, match="does not list its models"):
        asyncio.run(run())


# Figures


def answered(seconds: float) -> Outcome:
    return Outcome(ttft_s=seconds, end_to_end_s=2 * seconds, end_s=10, prompt_tokens=10, reused_tokens=5)


def test_a_percentile_is_a_measured_value_and_a_failure_is_slower_than_every_answer() -> None:
    outcomes = [answered(number / 100) for number in range(1, 101)]
    figures = summarize(outcomes)
    assert figures["ttft_ms"] == pytest.approx({"p50": 510, "p95": 960, "p99": 1000})
    assert figures["answered_per_s"] == 10 and figures["reused_percent"] == 50
    figures = summarize([*outcomes[:97], *[Outcome(failure="status 500: x")] * 3])
    assert figures["ttft_ms"]["p95"] == pytest.approx(960) and figures["ttft_ms"]["p99"] is None
    assert figures["failures"] == {"status 500: x": 3} and not is_within(figures, 1000)
    assert summarize([])["ttft_ms"]["p95"] is None


def search(
    capacity: float, plan: ServePlan, answered_per_s: Callable[[float], float] = lambda rate: rate
) -> list[dict[str, Any]]:
    """Measure rates of a server that holds every rate up to its capacity."""
    measured = []

    async def measure(rate: float) -> dict[str, Any]:
        measured.append(rate)
        p95 = 100.0 if rate <= capacity else 900.0
        return {
            "rate": rate,
            "num_failed": 0,
            "ttft_ms": {"p95": p95},
            "answered_per_s": answered_per_s(rate),
        }

    rates = asyncio.run(serve._measure_rates(measure, plan))
    assert len(measured) == len(set(measured)) == len(rates)
    for one in rates:
        one["is_within_limit"] = is_within(one, plan.ttft_limit_ms)
    return rates


@pytest.mark.parametrize("capacity", [0.7, 7.9, 8, 100, 333.3])
def test_the_search_finds_the_largest_rate_within_its_resolution(capacity: float) -> None:
    rates = search(capacity, replace(PLAN, seconds=100))
    assert [one["rate"] for one in rates] == sorted(one["rate"] for one in rates)
    best = best_rate({"rates": rates})
    assert best is not None and best <= capacity < best * 2 ** (1 / 8) * 1.0001


@pytest.mark.parametrize(
    ("capacity", "answered", "expected"),
    [
        (5.2, 5.0, [5, 7.071, 10, 32]),  # the rate at which it answered holds; 10 does not
        (5.2, 5.5, [2.75, 3.889, 5.5, 32]),  # the rate at which it answered does not hold
        (5.2, 0.0, [4, 5.657, 8, 16, 32]),  # all requests have failed
        (20.0, 30.0, [16, 22.627, 32]),
    ],
)
def test_a_search_that_begins_too_high_goes_down_to_what_the_server_answered(
    capacity: float, answered: float, expected: list[float]
) -> None:
    """Halves of the first rate would use the time of a server that answers a sixth of it."""
    plan = replace(PLAN, first_rate=32, seconds=100, num_bisections=1)
    rates = search(capacity, plan, lambda rate: min(rate, answered))
    assert [one["rate"] for one in rates] == pytest.approx(expected, abs=1e-3)


def test_the_search_ends_where_every_rate_holds_or_none() -> None:
    assert len(search(math.inf, PLAN)) == serve.MAX_DOUBLINGS + 1
    assert best_rate({"rates": search(0, PLAN)}) is None
    assert len(search(0, replace(PLAN, first_rate=6, seconds=1))) == 1


def test_given_rates_are_measured_and_the_best_has_no_failing_rate_below() -> None:
    rates = search(3, replace(PLAN, rates=(4, 1, 2, 1)))
    assert [one["rate"] for one in rates] == [1, 2, 4] and best_rate({"rates": rates}) == 2
    failing = {"rate": 1, "is_within_limit": False}
    assert best_rate({"rates": [failing, {"rate": 2, "is_within_limit": True}]}) is None


def test_ratios_are_between_the_two_servers() -> None:
    measured = [
        {
            "kind": kind,
            "one_at_a_time": {"ttft_ms": {"p50": ttft}},
            "rates": [{"rate": rate, "is_within_limit": True}],
        }
        for kind, ttft, rate in (("plain", 400.0, 2), ("blocks", 50.0, 8))
    ]
    summary = summarize_servers(measured, 500)
    assert summary["rate_ratio"] == 4 and summary["ttft_share_percent"] == 12.5
    assert "rate_ratio" not in summarize_servers(measured[:1], 500)
    assert "rate_ratio" not in summarize_servers(measured, 500, has_all_rates=False)
    points = [
        {"kind": kind, "reuse": {order: {"ttft_ms": {"p50": ttft}} for order, ttft in orders.items()}}
        for kind, orders in (
            ("plain", {"new": 200.0, "same_order": 40.0}),
            ("blocks", {"new": None, "same_order": 50.0}),
        )
    ]
    summary = summarize_servers(points, 500)
    assert summary["reuse_percent_of_plain_new"] == {
        "plain": {"new": 100, "same_order": 20},
        "blocks": {"new": None, "same_order": 25},
    }
    assert summary["largest_rate"] == {"plain": None, "blocks": None}


def test_a_server_that_holds_no_measured_rate_has_no_largest_rate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was not measured at a rate of 0, and holds some rate below the smallest one."""
    rate = summarize([]) | {"rate": 16, "num_requests": 9, "is_within_limit": False}
    measured: list[dict[str, Any]] = [{"kind": "plain", "rates": [rate]}]
    print_tables("toy", measured, summarize_servers(measured, 500), 500)
    line = (
        "vLLM alone: no rate was measured with p95 of the TTFT within 500 ms, the smallest was 16 requests/s"
    )
    assert line in capsys.readouterr().out


def test_rates_are_numbers() -> None:
    assert parse_rates("") == [] and parse_rates("1, 2.5") == [1, 2.5]
    for text in ("1,", "a", "0", "-1", "nan", "inf", "1e9"):
        with pytest.raises(UserError, match="--rates has"):
            parse_rates(text)


@pytest.mark.parametrize("load", [0.9, 1.1])
def test_a_busy_machine_is_named_and_recorded(
    load: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other work delays clients and servers by times that differ from run to run."""
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert serve.read_load() == load
    assert ("the load average is 1.1 on 4 cores" in capsys.readouterr().err) == (load > 1)


# Whole runs


@contextlib.contextmanager
def two_servers(tmp_path: Path, model: Path) -> Any:
    """Serve a stub of vLLM alone, and the real front end over a stub of vLLM."""
    blocks = Setup(make_served(tmp_path, path=str(model)))
    with http_server(StubServer()) as plain_url, http_server(blocks.app) as blocks_url:
        yield plain_url, blocks_url


SIZES = ("--num-documents", "3", "--document-len", "12", "--question-len", "6", "--answer-len", "3")


def test_two_running_servers_are_compared(tmp_path: Path, model: Path) -> None:
    out, png = tmp_path / "serve.json", tmp_path / "serve.png"
    with two_servers(tmp_path, model) as (plain_url, blocks_url):
        done = blockft(
            *("bench", "serve", model, *SIZES, "--corpus-size", "9", "--rates", "10,20", "--seconds", "1"),
            *("--plain-url", plain_url, "--blocks-url", blocks_url, "--runs", "3"),
            *(
                "--reuse-prompts",
                "2",
                "--ttft-limit-ms",
                "600000",
                "--timeout",
                "600",
                "--out",
                out,
                "--png",
                png,
            ),
        )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    plain, blocks = result["servers"]
    assert (plain["kind"], blocks["kind"]) == ("plain", "blocks")
    assert result["load_average"] >= 0
    assert result["workload"]["corpus_size"] == 9 and result["plan"]["rates"] == [10, 20]
    assert blocks["warmup"]["num_requests"] == 6
    sources = blocks["warmup"]["block_sources"]
    assert sources["computed"] >= 9 and sum(sources.values()) == 18
    for one, other in zip(plain["rates"], blocks["rates"], strict=True):
        assert one["num_requests"] == other["num_requests"] > 0
        assert not one["num_failed"] and not other["num_failed"]
    assert blocks["rates"][0]["block_sources"].keys() == {"host"}
    assert blocks["rates"][0]["reused_percent"] == pytest.approx(100 * 36 / 42)
    assert result["summary"]["rate_ratio"] == 1 and result["missing"] == {}
    for figures in (plain, blocks):
        assert list(figures["reuse"]) == ["new", "same_order", "other_order"]
        assert all(one["num_requests"] == 2 and not one["num_failed"] for one in figures["reuse"].values())
    assert [set(one["block_sources"]) for one in blocks["reuse"].values()] == [
        {"computed"},
        {"host"},
        {"host"},
    ]
    assert result["summary"]["reuse_percent_of_plain_new"]["plain"]["new"] == 100
    assert "other order" in done.stdout
    assert "vLLM with blocks: at least 20 requests/s with p95 of the TTFT within 600000 ms" in done.stdout
    assert "vLLM alone" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")


def measure(
    target: Target,
    workload: Workload,
    plan: ServePlan,
    limit: TimeLimit | None = None,
    out: Path | None = None,
) -> ServeReport:
    """Measure a running server."""
    report = ServeReport("m", [target.kind], plan.parts, plan.ttft_limit_ms, record={}, out=out)
    png = out and out.with_suffix(".png")
    serve.bench_serve(
        workload,
        plan,
        [Server(target=target)],
        report,
        limit=limit or TimeLimit(),
        start_timeout_s=1,
        png=png,
    )
    return report


def test_both_servers_get_the_same_prompts_and_none_of_them_twice(model: Path) -> None:
    """vLLM alone gets the ids of the blocks. A prompt that is asked twice would be in its prefix cache."""
    workload = Workload(load_tokenizer(str(model)), OPTIONS)
    seen = []
    for kind in ("plain", "blocks"):
        server = StubServer()
        with http_server(server) as url:
            target = Target(kind=kind, url=url)  # type: ignore[arg-type]
            measure(target, workload, replace(PLAN, rates=(5, 10)))
        seen.append(server.bodies)
    plain, blocks = (sorted(bodies, key=lambda body: str(body.get("prompt"))) for bodies in seen)
    encoder = Encoder(load_tokenizer(str(model)))
    of_blocks = []
    for body in blocks:
        ids = encoder.encode_prompt(parse_request({"blocks": body["blocks"]}, None, "p"))
        of_blocks.append([id for block in ids for id in block])
    assert sorted(of_blocks) == sorted(body["prompt"] for body in plain)
    assert len({tuple(body["prompt"]) for body in plain}) == len(plain) > 12
    for body in (*plain, *blocks):
        assert body["min_tokens"] == body["max_tokens"] == 3 and body["temperature"] == 0


def test_a_server_that_fails_every_request_ends_the_benchmark(tmp_path: Path, model: Path) -> None:
    async def fail(number: int, send: Send) -> bool:
        await send_json(send, 400, {"error": {"message": "no such [bold]model[/bold]"}})
        return True

    for options, what in (
        ((), "3 requests of the first prompts"),
        (("--reuse-prompts", "0"), "134 requests of the warm-up"),
    ):
        with http_server(StubServer(fail)) as url:
            done = blockft(
                *("bench", "serve", model, *SIZES, "--plain-url", url, "--out", tmp_path / "serve.json"),
                *options,
            )
        assert done.returncode == 2 and f"vLLM alone: failed all {what}: Error code: 400" in done.stderr
        assert not (tmp_path / "serve.json").exists()


REFUSED = [
    (("--num-documents", "5", "--corpus-size", "4"), "set a larger corpus"),
    (("--document-len", "2000"), "positions"),
    (("--rates", "0.1", "--seconds", "1"), "give no request"),
    (("--seconds", "nan"), "--seconds"),
    (("--plain-url", "localhost:8000"), "http://"),
    (("--plain-url", "http://localhost:1/v1", "--max-num-seqs", "3"), "there are URLs"),
    (("--pipeline-parallel-size", "2"), "not allowed"),
    (("--host-bytes", "much"), "not a size"),
    (("--api-key-env", "NO_SUCH_VARIABLE"), "not set"),
    (("--python", "/dev/null"), "no program"),
    (("--folder", "/dev/null"), "not a folder"),
    (("--log-folder", "/dev/null"), "not a folder"),
    (("--model-folder", "m"), "is a model"),
    (("--plain-url", "http://localhost:1/v1", "--servers-together"), "there are URLs"),
    (("--plain-url", "http://localhost:1/v1", "--log-folder", "."), "there are URLs"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_what_cannot_be_measured_is_refused_before_a_server_starts(
    model: Path, options: tuple[str, ...], reason: str
) -> None:
    done = blockft("bench", "serve", model, *options)
    assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


FAKE_PYTHON = """#!{python}
'''Pretend to be the Python of an environment with vLLM.'''
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

words = sys.argv[1:]
if "--fail" in words:
    sys.exit("first line\\nno [bold]GPU[/bold] is free")

num_asked, lock = 0, threading.Lock()

def option(name):
    return words[words.index(name) + 1] if name in words else ""

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send({entry})

    def do_POST(self):
        global num_asked
        with lock:
            num_asked += 1
            number = num_asked
            with open(sys.argv[0] + ".asked", "a") as log:
                log.write(f"{time.monotonic()} {os.getpid()}\\n")
        kind = "blocks" if "blockft" in words else "plain"
        if str(number) == option("--die-after") and kind == option("--die-kind"):
            os._exit(9)
        if number > int(option("--hang-after") or 10**9):
            time.sleep(3600)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert ("blocks" in body) == ("blockft" in words), words
        chunk = dict(id="1", object="text_completion", created=1, model="toy")
        usage = dict(prompt_tokens=42, completion_tokens=3, total_tokens=45)
        events = [chunk | dict(choices=[dict(index=0, text="a", finish_reason=None, logprobs=None)])]
        events.append(chunk | dict(choices=[], usage=usage))
        self.send("".join("data: " + json.dumps(e) + "\\n\\n" for e in events) + "data: [DONE]\\n\\n")

    def send(self, content):
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(200)
        kind = "text/event-stream" if isinstance(content, str) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass

time.sleep(float(option("--start-s") or 0))
with open(sys.argv[0] + ".log", "a") as log:
    log.write(json.dumps([os.getpid(), *words]) + "\\n")
ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    models = {"object": "list", "data": [MODEL_ENTRY]}
    path.write_text(FAKE_PYTHON.replace("{python}", sys.executable).replace("{entry}", repr(models)))
    path.chmod(0o755)
    return path


def test_both_servers_are_started_one_after_the_other_and_ended(
    tmp_path: Path, model: Path, fake_python: Path
) -> None:
    done = blockft(
        *("bench", "serve", model, *SIZES, "--python", fake_python, "--rates", "5", "--seconds", "1"),
        *("--runs", "2", "--warmups", "2", "--max-num-seqs", "7", "--out", tmp_path / "serve.json"),
        *("--host-bytes", "1GB"),
    )
    assert done.returncode == 0, done.stderr
    plain, blocks = map(json.loads, Path(f"{fake_python}.log").read_text().splitlines())
    assert "vllm.entrypoints.openai.api_server" in plain and "--enable-prompt-tokens-details" in plain
    assert blocks[1:5] == ["-m", "blockft", "serve", str(model)]
    assert blocks[blocks.index("--host-bytes") + 1] == "1GB" and "--host-bytes" not in plain
    for words in (plain, blocks):
        assert words[words.index("--max-model-len") + 1] == str(3 * 12 + 6 + 3 + 16)
        assert words[-2:] == ["--max-num-seqs", "7"] and words[words.index("--dtype") + 1] == "float32"
        assert not Path(f"/proc/{words[0]}").exists()
    result = json.loads((tmp_path / "serve.json").read_text())
    assert result["vllm_options"] == ["--max-num-seqs", "7"] and result["dtype"] == "float32"
    for server in result["servers"]:
        assert server["start_s"] > 0 and not server["rates"][0]["num_failed"]


def fast(fake_python: Path, model: Path, out: Path, *options: object) -> tuple[object, ...]:
    """Return a command that measures stubs of servers quickly."""
    return (
        *("bench", "serve", model, *SIZES, "--python", fake_python, "--rates", "20,40", "--seconds", "1"),
        *("--reuse-prompts", "2", "--runs", "2", "--warmups", "2", "--timeout", "600", "--out", out),
        *options,
    )


def started(fake_python: Path) -> list[list[Any]]:
    """Return the process id and the words of each started server."""
    return [json.loads(line) for line in Path(f"{fake_python}.log").read_text().splitlines()]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "options", [("--servers-together",), ("--kv-cache-memory-bytes=1G",), ("--kv_cache_memory_bytes", "1G")]
)
def test_servers_that_start_at_once_are_asked_one_after_the_other(
    tmp_path: Path, model: Path, fake_python: Path, options: tuple[str, ...]
) -> None:
    out, logs = tmp_path / "serve.json", tmp_path / "logs"
    logs.mkdir()
    done = blockft(*fast(fake_python, model, out, "--start-s", "0.7", "--log-folder", logs, *options))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["servers_run_together"] and not result["missing"]
    lines = [line.split() for line in Path(f"{fake_python}.asked").read_text().splitlines()]
    pids = [pid for _, pid in lines]
    plain, blocks = started(fake_python)
    if "blockft" in plain:
        plain, blocks = blocks, plain
    assert pids == sorted(pids, key=[str(plain[0]), str(blocks[0])].index)
    for words in (plain, blocks):
        assert not is_alive(words[0])
        assert ("--gpu-memory-utilization" in words) == (options[0] != "--servers-together")
    assert {path.name for path in logs.iterdir()} == {"plain.log", "blocks.log"}
    assert all(server["start_s"] > 0.5 for server in result["servers"])


@pytest.mark.parametrize("together", ["--servers-together", "--servers-in-turn"])
@pytest.mark.parametrize(
    ("kind", "number", "parts"),
    [
        ("blocks", 1, {"reuse", "warmup", "one_at_a_time", "rates"}),
        ("blocks", 8, {"reuse", "warmup", "one_at_a_time", "rates"}),
        ("plain", 20, {"rates"}),
    ],
)
def test_a_server_that_ends_leaves_the_other_figures(
    tmp_path: Path,
    model: Path,
    fake_python: Path,
    together: str,
    kind: str,
    number: int,
    parts: set[str],
) -> None:
    out = tmp_path / "serve.json"
    dying = ("--die-kind", kind, "--die-after", str(number))
    done = blockft(*fast(fake_python, model, out, together, *dying))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "ended with exit code 9 while it was measured" in last and f"are in {out}" in last
    (other,) = {"plain", "blocks"} - {kind}
    result = json.loads(out.read_text())
    assert result["missing"].keys() == {kind} and result["missing"][kind].keys() == parts
    assert all("exit code 9" in reason for reason in result["missing"][kind].values())
    assert "rate_ratio" not in result["summary"]
    servers = {server["kind"]: server for server in result["servers"]}
    assert len(servers[other]["rates"]) == 2 and "missing: " in done.stdout
    if number == 8:  # the first group warms up, the second is complete, the third is lost
        assert servers["blocks"]["reuse"]["new"]["num_requests"] == 1
    if number == 20:
        assert servers["plain"]["one_at_a_time"]["num_requests"] == 2 and not servers["plain"]["rates"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_the_figures_and_what_is_missing(
    tmp_path: Path, model: Path, fake_python: Path, number: signal.Signals
) -> None:
    out = tmp_path / "serve.json"
    # after a group that warms up, and another one
    hanging = fast(fake_python, model, out, "--hang-after", "6")
    words = [sys.executable, "-m", "blockft", *hanging]
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)
    wait_until(out.exists, lambda: process.poll() is None)
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    result = json.loads(out.read_text())
    pid = started(fake_python)[0][0]
    if number == signal.SIGTERM:
        assert process.returncode == 130 and not is_alive(pid), errors
    else:
        os.kill(pid, signal.SIGKILL)
    reason = "the benchmark was stopped" if number == signal.SIGTERM else "not measured yet"
    assert result["missing"]["blocks"] == dict.fromkeys(PLAN.parts, reason)
    assert result["missing"]["plain"]["rates"] == reason
    (plain,) = result["servers"]
    assert plain["kind"] == "plain" and plain["reuse"]["new"]["num_requests"] >= 1


def test_a_limit_bounds_the_whole_command(
    tmp_path: Path, model: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up would never end. Each server has half of the time that is left, which then ends."""
    limits: list[tuple[float, asyncio.Timeout]] = []

    def begin(delay: float) -> asyncio.Timeout:
        limits.append((delay, asyncio.timeout(delay)))
        return limits[-1][1]

    warm_up = serve._Measurement._warm_up

    async def end_time_and_warm_up(measurement: serve._Measurement) -> None:
        limits[-1][1].reschedule(asyncio.get_running_loop().time() + 0.5)
        await warm_up(measurement)

    monkeypatch.setattr(serve, "asyncio", SimpleNamespace(**vars(asyncio) | {"timeout": begin}))
    monkeypatch.setattr(serve._Measurement, "_warm_up", end_time_and_warm_up)
    out = tmp_path / "serve.json"
    options = ("--servers-together", "--limit-s", str(END_S + 2000), "--hang-after", "9")
    done = blockft(*fast(fake_python, model, out, *options))
    assert done.returncode == 0, done.stderr
    first, second = (delay for delay, _ in limits)
    assert 0 < first < 1000 < second < 2000
    result = json.loads(out.read_text())
    for kind in ("plain", "blocks"):
        assert result["missing"][kind]["warmup"] == "the time limit left no time"
        assert result["missing"][kind].keys() == {"warmup", "one_at_a_time", "rates"}
    assert [server["reuse"]["new"]["num_requests"] for server in result["servers"]] == [2, 2]
    assert not any(is_alive(words[0]) for words in started(fake_python))
    assert (
        "missing: vLLM alone, warm-up, one request at a time, rates: the time limit left no time"
        in done.stdout
    )


def test_a_rate_that_might_not_end_in_time_does_not_start(
    tmp_path: Path, workload: Workload, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = StubServer()
    limit = TimeLimit(limit_s=END_S + 500)
    plan = replace(PLAN, rates=(40, 1), timeout_s=600, num_reuse=0)
    with http_server(server) as url:
        report = measure(Target(kind="plain", url=url), workload, plan, limit, tmp_path / "serve.json")
    assert server.num_asked == plan.num_warmups + plan.num_single
    assert report.missing["plain"].keys() == {"rates"}
    assert "1 requests/s would take up to" in report.missing["plain"]["rates"]
    assert "with --timeout 600" in capsys.readouterr().err
    assert json.loads((tmp_path / "serve.json").read_text())["summary"]["largest_rate"] == {"plain": None}
    assert (tmp_path / "serve.png").exists()
    # a search keeps the rates that it has measured: here the time is over when the first one is
    server = StubServer()

    def read_clock() -> float:
        is_over = server.num_asked > plan.num_warmups + plan.num_single
        return time.monotonic() + 1000 * is_over

    monkeypatch.setattr(serve, "time", SimpleNamespace(monotonic=read_clock))
    plan = replace(plan, rates=(), first_rate=40, num_bisections=0, ttft_limit_ms=1e6)
    with http_server(server) as url:
        report = measure(Target(kind="plain", url=url), workload, plan, TimeLimit(limit_s=END_S + 900))
    (rate,) = report.servers["plain"]["rates"]
    assert rate["rate"] == 40 and report.missing["plain"].keys() == {"rates"}


def test_shares_of_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = TimeLimit(limit_s=END_S + 100, begun=1000)
    with monkeypatch.context() as patched:
        patched.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: 1000.0))
        assert limit.share_end(2) == 1050 and limit.share_end(1) == 1100
    assert TimeLimit().share_end(2) == math.inf
    with TimeLimit().interrupting("while it sleeps"):
        pass
    with (
        pytest.raises(UserError, match="--limit-s 10.2 is over while it sleeps"),
        TimeLimit(limit_s=END_S + 0.2).interrupting("while it sleeps"),
    ):
        time.sleep(600)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_server_that_knows_the_new_documents_is_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = Workload(load_tokenizer(str(model)), OPTIONS)
    plan = replace(PLAN, rates=(20,), num_warmups=0)
    with two_servers(tmp_path, model) as (_, blocks_url):
        for is_known in (False, True):
            report = measure(Target(kind="blocks", url=blocks_url), workload, plan)
            assert ("knew the new documents before" in capsys.readouterr().err) == is_known
            sources = report.servers["blocks"]["reuse"]["new"]["block_sources"]
            assert sources.keys() == ({"host"} if is_known else {"computed"})


def test_random_weights_are_written_once(
    tmp_path: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockft.stages import bench_serve as stage

    folder = tmp_path / "weights"
    assert stage._find_model("tiny", folder, tmp_path) == str(folder)
    monkeypatch.setattr(stage, "_save_random_model", lambda *_: pytest.fail("the weights are there"))
    assert stage._find_model("tiny", folder, tmp_path) == str(folder)
    with pytest.raises(UserError, match="hidden_size 64, the shape llama-3.2-1b has 2048"):
        stage._find_model("llama-3.2-1b", folder, tmp_path)
    done = blockft(
        *fast(
            fake_python,
            Path("tiny"),
            tmp_path / "serve.json",
            "--model-folder",
            folder,
            "--reuse-prompts",
            "0",
        )
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "serve.json").read_text())["model"] == "tiny"
    assert all(str(folder) in words for words in started(fake_python))


def test_a_server_that_does_not_start_shows_the_end_of_its_output(model: Path, fake_python: Path) -> None:
    done = blockft("bench", "serve", model, *SIZES, "--python", fake_python, "--fail")
    assert done.returncode == 2
    assert "no [bold]GPU[/bold] is free" in done.stderr
    assert "exit code 1 before it answered; the end of its output is above" in done.stderr.splitlines()[-1]


def test_a_shape_gets_random_weights_and_a_tokenizer_with_all_ids(tmp_path: Path) -> None:
    from blockft.stages.bench_serve import _save_random_model

    _save_random_model("tiny", tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert len(tokenizer) == 512
    assert all(tokenizer.decode([id]) for id in range(300, 512))
    (prompt,) = Workload(tokenizer, OPTIONS).prompts(1, stream=1)
    assert len(prompt.ids) == OPTIONS.num_tokens - OPTIONS.answer_len
