"""`blockft bench serve`: its requests, its open loop, its search, and whole runs over HTTP."""

import asyncio
import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from blockft.bench import serve, serve_client
from blockft.bench.serve import ServePlan, best_rate, summarize_servers
from blockft.bench.serve_client import LoadClient, Outcome, Target, is_within, summarize
from blockft.bench.serve_workload import ServePrompt, Workload, WorkloadOptions
from blockft.bench.synthetic_source import save_tokenizer, write_source
from blockft.data.encoder import Encoder
from blockft.data.request import parse_request
from blockft.errors import UserError
from blockft.model.load import load_tokenizer
from blockft.serving.asgi import Receive, Scope, Send, read_body, send_json
from blockft.stages.bench_serve import default_warmups, parse_rates
from tests.commands import blockft
from tests.run import save_model
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
    num_warmups=5,
    num_single=3,
    timeout_s=20,
)


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
        self.num_asked += 1
        number = self.num_asked
        self.bodies.append(json.loads(await read_body(receive, 1 << 30)))
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


def ask(server: StubServer, times: Sequence[float], timeout_s: float = 20) -> list[Outcome]:
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

    assert not [outcome.failure for outcome in ask(Recorder(), [0, 0.02, 0.5]) if outcome.failure]
    assert ports[2] not in ports[:2]


def test_every_failure_is_counted_with_its_reason() -> None:
    async def fail(number: int, send: Send) -> bool:
        if number == 1:
            await send_json(send, 500, {"error": {"message": "out of pages"}})
        elif number == 2:
            await stream(send, num_tokens=2)
        elif number == 3:
            await stream(send, end=False)
        elif number == 4:
            await asyncio.sleep(5)
        elif number == 5:
            raise ConnectionResetError
        return number <= 5

    outcomes = ask(StubServer(fail), [0.1 * number for number in range(7)], timeout_s=2)
    figures = summarize(outcomes)
    assert figures["num_requests"] == 7 and figures["num_failed"] == 5
    reasons = "\n".join(figures["failures"])
    for reason in ("code: 500", "2 tokens instead of 3", "before its usage", "no complete answer after 2 s"):
        assert reason in reasons
    assert figures["ttft_ms"]["p50"] is None and figures["end_to_end_ms"]["p95"] is None
    assert not is_within(figures, 1e9)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    async def run() -> None:
        async with LoadClient(Target(kind="plain", url="http://127.0.0.1:9/v1"), 3, 5):
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


def search(capacity: float, plan: ServePlan) -> list[dict[str, Any]]:
    """Measure rates of a server that holds every rate up to its capacity."""
    measured = []

    async def measure(rate: float) -> dict[str, Any]:
        measured.append(rate)
        p95 = 100.0 if rate <= capacity else 900.0
        return {"rate": rate, "num_failed": 0, "ttft_ms": {"p95": p95}}

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
    assert best <= capacity < best * 2 ** (1 / 8) * 1.0001


def test_the_search_ends_where_every_rate_holds_or_none() -> None:
    assert len(search(math.inf, PLAN)) == serve.MAX_DOUBLINGS + 1
    assert best_rate({"rates": search(0, PLAN)}) == 0
    assert len(search(0, replace(PLAN, first_rate=6, seconds=1))) == 1


def test_given_rates_are_measured_and_the_best_has_no_failing_rate_below() -> None:
    rates = search(3, replace(PLAN, rates=(4, 1, 2, 1)))
    assert [one["rate"] for one in rates] == [1, 2, 4] and best_rate({"rates": rates}) == 2
    assert (
        best_rate({"rates": [{"rate": 1, "is_within_limit": False}, {"rate": 2, "is_within_limit": True}]})
        == 0
    )


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
    assert serve._read_load() == load
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
            *("--ttft-limit-ms", "5000", "--out", out, "--png", png),
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
    assert result["summary"]["rate_ratio"] == 1
    assert "vLLM with blocks: at least 20 requests/s with p95 of the TTFT within 5000 ms" in done.stdout
    assert "vLLM alone" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")


def test_both_servers_get_the_same_prompts_and_none_of_them_twice(model: Path) -> None:
    """vLLM alone gets the ids of the blocks. A prompt that is asked twice would be in its prefix cache."""
    workload = Workload(load_tokenizer(str(model)), OPTIONS)
    seen = []
    for kind in ("plain", "blocks"):
        server = StubServer()
        with http_server(server) as url:
            target = Target(kind=kind, url=url)  # type: ignore[arg-type]
            asyncio.run(serve._measure(target, workload, replace(PLAN, rates=(5, 10))))
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

    with http_server(StubServer(fail)) as url:
        done = blockft("bench", "serve", model, *SIZES, "--plain-url", url, "--out", tmp_path / "serve.json")
    assert done.returncode == 2 and "failed all 134 requests of the warm-up: Error code: 400" in done.stderr
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
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

words = sys.argv[1:]
if "--fail" in words:
    sys.exit("first line\\nno [bold]GPU[/bold] is free")

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send({entry})

    def do_POST(self):
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

with open(sys.argv[0] + ".log", "a") as log:
    log.write(json.dumps([os.getpid(), *words]) + "\\n")
ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    import sys

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
