"""Endpoints of teachers: errors that pass are survived, others stop in a sentence, limits are kept."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest

from blockft.data import teacher_endpoint
from blockft.data.sample import Message
from blockft.data.teacher_answers import Finish, Question, TeacherAnswer
from blockft.data.teacher_endpoint import (
    Endpoint,
    EndpointError,
    QuestionFailed,
    RateLimiter,
    ask_endpoint,
    parse_retry_after,
    request_body,
)
from blockft.errors import UserError
from tests.commands import free_port
from tests.endpoint import Reply, Respond, completion, endpoint, error

KEY = "sk-secret-1234567890"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_endpoint, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(teacher_endpoint, "MAX_WAIT_S", 0.002)


@pytest.fixture
def end_time_limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that lets the time limit of the present request end, whatever it is. Threads may call it."""
    present: list[tuple[asyncio.AbstractEventLoop, asyncio.Timeout]] = []

    def begin(delay: float) -> asyncio.Timeout:
        present[:] = [(asyncio.get_running_loop(), asyncio.timeout(delay))]
        return present[0][1]

    def end() -> None:
        ((loop, limit),) = present
        loop.call_soon_threadsafe(lambda: limit.reschedule(loop.time()))

    monkeypatch.setattr(teacher_endpoint, "asyncio", SimpleNamespace(**vars(asyncio) | {"timeout": begin}))
    return end


def question(text: str) -> Question:
    return Question(key=text, messages=(Message(role="user", content=(text,)),), sample=text)


def options_of(base_url: str, **options: Any) -> Endpoint:
    """Return the options of an endpoint; `options` replace the usual ones."""
    given: dict[str, Any] = {
        "base_url": base_url,
        "model": "m",
        "body": request_body(9, 0, {}),
        "concurrency": 2,
        "requests_per_minute": None,
        "timeout_s": 600,
        "max_retries": 3,
    }
    return Endpoint(**given | options)


def ask(
    base_url: str,
    texts: Sequence[str] = ("q",),
    *,
    skipped: list[tuple[str, str]] | None = None,
    **options: Any,
) -> list[TeacherAnswer]:
    answers: list[TeacherAnswer] = []
    skip = None if skipped is None else lambda question, reason: skipped.append((question.key, reason))
    ask_endpoint(options_of(base_url, **options), iter(map(question, texts)), answers.append, skip)
    return answers


def always(reply: Reply) -> Respond:
    return lambda text, before: reply


def first(*faults: Reply) -> Respond:
    """Return a script that answers with faults first, and then with an answer."""
    return lambda text, before: faults[before] if before < len(faults) else Reply(body=completion("yes"))


def test_a_request_has_the_messages_the_options_and_the_key() -> None:
    with endpoint(first()) as server:
        body = request_body(9, 0.5, {"top_k": 1, "max_tokens": None, "max_completion_tokens": 8})
        (answer,) = ask(server.base_url, body=body, api_key=KEY)
    assert answer == TeacherAnswer(
        key="q", answer="yes", finish=Finish.stop, prompt_tokens=7, answer_tokens=3
    )
    ((headers, sent),) = server.requests
    assert headers["authorization"] == f"Bearer {KEY}"
    assert sent.pop("path") == "/v1/chat/completions"
    assert sent == {
        "model": "m",
        "messages": [{"role": "user", "content": "q"}],
        "temperature": 0.5,
        "top_k": 1,
        "max_completion_tokens": 8,
    }


def test_keys_of_the_environment_are_not_sent_to_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)
    with endpoint(first()) as server:
        ask(server.base_url)
    assert KEY not in str(server.requests)


TRANSIENT = {
    "429": Reply(status=429, body=error("slow down")),
    "429 with a time": Reply(status=429, body=error("slow down"), headers={"Retry-After": "0.01"}),
    "429 with a bad time": Reply(status=429, body=error("slow down"), headers={"Retry-After": "soon"}),
    "408": Reply(status=408, body=error("too slow")),
    "500": Reply(status=500, body=error("broken")),
    "500 without JSON": Reply(status=500, body=b"<html>broken</html>"),
    "500 without a body": Reply(status=500, body=b""),
    "503": Reply(status=503, body=error("loading"), headers={"Retry-After": "0"}),
    "529": Reply(status=529, body=error("overloaded")),
    "nothing for too long": Reply(body=completion("late"), delay_s=3600),
    "a byte now and then": Reply(body=completion("late"), byte_delay_s=1),
    "a cut body": Reply(body=json.dumps(completion("cut")).encode()[:40], declared=400),
    "half of a JSON object": Reply(body=json.dumps(completion("half")).encode()[:40]),
    "no JSON": Reply(body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
    "no body": Reply(body=b""),
    "deep JSON": Reply(body=b"[" * 100_000),
    "bytes": Reply(body=b"\xff\xfe\x00"),
    "a list": Reply(body=[1]),
    "null": Reply(body=None),
    "no choices": Reply(body=completion("x") | {"choices": []}),
    "choices that are null": Reply(body=completion("x") | {"choices": None}),
    "an error with status 200": Reply(body=error("upstream failed")),
    "a choice without message": Reply(body={"choices": [{"finish_reason": "stop"}]}),
    "a choice that is a number": Reply(body={"choices": [3]}),
    "a content that is a number": Reply(body=completion(3)),
    "no reason of the end": Reply(body=completion("x", None)),
    "an interrupted answer": Reply(body=completion("x", "insufficient_system_resource")),
    "a stream": Reply(body=b'data: {"choices": []}\n\ndata: [DONE]\n\n'),
    "half a character": Reply(body=completion("\ud83d")),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_an_error_that_passes_is_survived(name: str, end_time_limit: Callable[[], None]) -> None:
    fault = replace(TRANSIENT[name], when_slow=end_time_limit)
    with endpoint(first(fault, fault)) as server:
        (answer,) = ask(server.base_url)
    assert answer.answer == "yes" and server.asked["q"] == 3


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_question_that_fails_after_all_retries_stops_or_is_skipped(
    name: str, end_time_limit: Callable[[], None]
) -> None:
    fault = replace(TRANSIENT[name], when_slow=end_time_limit)
    with endpoint(lambda text, before: fault if text == "bad" else Reply(body=completion(text))) as server:
        with pytest.raises(QuestionFailed, match="has not answered after 2 requests") as caught:
            ask(server.base_url, ["bad"], max_retries=1)
        assert "\n" not in str(caught.value)
        skipped: list[tuple[str, str]] = []
        answers = ask(server.base_url, ["a", "bad", "b", "c"], skipped=skipped, max_retries=0, concurrency=1)
    assert [answer.answer for answer in answers] == ["a", "b", "c"]
    assert [key for key, _ in skipped] == ["bad"]


def test_the_time_limit_of_a_request_is_that_of_the_settings() -> None:
    slow = Reply(body=completion("late"), byte_delay_s=1)
    with (
        endpoint(always(slow)) as server,
        pytest.raises(QuestionFailed, match=r"after 1 request \(no answer within 0\.5 s\)"),
    ):
        ask(server.base_url, timeout_s=0.5, max_retries=0)


FATAL = {
    "refuses access .*: check the key": Reply(status=401, body=error(f"Incorrect API key provided: {KEY}.")),
    "refuses access": Reply(status=403, body={"detail": "forbidden"}),
    "knows no such model": Reply(status=404, body=error("no model", code="model_not_found")),
    "no such model or address": Reply(status=404, body=b"404 page not found"),
    "405": Reply(status=405, body=b""),
    r"address \(302": Reply(status=302, body=b""),
    "no quota left": Reply(status=429, body=error("You exceeded your quota", code="insufficient_quota")),
    r"quota left \(402": Reply(status=402, body=error("Insufficient Balance")),
    "asks to wait for 3,600 s": Reply(status=429, body=error("daily"), headers={"Retry-After": "3600"}),
}


@pytest.mark.parametrize("message", FATAL)
@pytest.mark.parametrize("skips", [False, True])
def test_an_endpoint_that_cannot_answer_stops_in_a_sentence_without_the_key(
    message: str, skips: bool
) -> None:
    texts = [f"q{i}" for i in range(30)]
    with endpoint(always(FATAL[message])) as server, pytest.raises(EndpointError, match=message) as caught:
        ask(server.base_url, texts, api_key=KEY, skipped=[] if skips else None)
    text = str(caught.value)
    assert KEY not in text and "\n" not in text and len(text) < 500
    assert sum(server.asked.values()) <= 4, "the other questions are not asked"


def test_a_key_that_is_missing_is_asked_for() -> None:
    with (
        endpoint(always(FATAL["refuses access"])) as server,
        pytest.raises(EndpointError, match="set data.teacher.api"),
    ):
        ask(server.base_url)


@pytest.mark.parametrize("skips", [False, True])
def test_an_endpoint_that_cannot_be_reached_stops(skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    find_address = socket.getaddrinfo

    def find_known_address(host: Any, *arguments: Any, **options: Any) -> Any:
        """Know some hosts without a network, where a name server may answer late."""
        if "no-such-host" in str(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return find_address(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", find_known_address)
    for url in (f"http://127.0.0.1:{free_port()}/v1", "http://no-such-host.invalid/v1", "http://a..b/v1"):
        with pytest.raises(
            EndpointError, match="cannot be reached after 2 requests .*: check data.teacher.base_url"
        ):
            ask(url, max_retries=1, skipped=[] if skips else None)


FINISHES = {
    "cut": (Reply(body=completion("long", "length")), Finish.length),
    "filtered": (Reply(body=completion("", "content_filter")), Finish.refused),
    "refused": (Reply(body=completion(None, "stop", refusal="I cannot")), Finish.refused),
    "called a tool": (Reply(body=completion(None, "tool_calls")), Finish.other),
    "empty": (Reply(body=completion(None, "stop")), Finish.stop),
    "at the end of TGI": (Reply(body=completion("x", "eos_token")), Finish.stop),
    "at the end of Gemini": (Reply(body=completion("x", "STOP")), Finish.stop),
    "cut by Gemini": (Reply(body=completion("x", "MAX_TOKENS")), Finish.length),
    "flagged by a router": (
        Reply(status=403, body=error("requires moderation. Your input was flagged for violence")),
        Finish.refused,
    ),
    "filtered prompt": (Reply(status=400, body=error("no", code="content_filter")), Finish.refused),
    "too long for OpenAI": (
        Reply(status=400, body=error("x", code="context_length_exceeded")),
        Finish.too_long,
    ),
    "too long for vLLM": (
        Reply(
            status=400,
            body={"object": "error", "message": "This model's maximum context length is 9", "code": 400},
        ),
        Finish.too_long,
    ),
    "too long for llama.cpp": (
        Reply(
            status=400,
            body=error("the request exceeds the available context size", type="exceed_context_size_error"),
        ),
        Finish.too_long,
    ),
}


@pytest.mark.parametrize("name", FINISHES)
def test_how_an_answer_ends_is_kept(name: str) -> None:
    reply, finish = FINISHES[name]
    with endpoint(always(reply)) as server:
        (answer,) = ask(server.base_url)
    assert answer.finish is finish and server.asked["q"] == 1


def test_the_text_of_a_message_in_parts_is_its_answer() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "fox"},
    ]
    with endpoint(always(Reply(body=completion(parts)))) as server:
        (answer,) = ask(server.base_url)
    assert answer.answer == "fox"


def test_a_web_page_instead_of_an_answer_names_the_address() -> None:
    page = Reply(body=b"<!DOCTYPE html><title>Chat</title>", headers={"Content-Type": "text/html"})
    with (
        endpoint(always(page)) as server,
        pytest.raises(QuestionFailed, match="web page: check data.*base_url"),
    ):
        ask(server.base_url)


def test_a_request_that_is_refused_for_another_reason_is_not_repeated() -> None:
    reply = Reply(status=400, body=error("unknown field top_k"))
    with endpoint(always(reply)) as server:
        with pytest.raises(QuestionFailed, match="refuses the request .*400: unknown field top_k"):
            ask(server.base_url)
        skipped: list[tuple[str, str]] = []
        assert ask(server.base_url, ["a", "b"], skipped=skipped) == []
    assert len(skipped) == 2 and server.asked == {"q": 1, "a": 1, "b": 1}


def test_questions_are_asked_several_at_a_time_and_each_once() -> None:
    texts, eight_are_asked = [f"q{i}" for i in range(40)], threading.Barrier(8)

    def respond(text: str, before: int) -> Reply:
        eight_are_asked.wait(600)
        return Reply(body=completion(text))

    with endpoint(respond) as server:
        answers = ask(server.base_url, texts, concurrency=8)
    assert sorted(answer.answer for answer in answers) == sorted(texts)
    assert set(server.asked.values()) == {1} and server.most_at_once == 8


def test_answers_before_an_error_are_recorded() -> None:
    answers: list[TeacherAnswer] = []
    with endpoint(
        lambda text, before: FATAL["405"] if text == "q5" else Reply(body=completion(text))
    ) as server:
        options = options_of(server.base_url, concurrency=1, max_retries=0)
        with pytest.raises(EndpointError):
            ask_endpoint(options, iter(question(f"q{i}") for i in range(9)), answers.append)
    assert [answer.answer for answer in answers] == [f"q{i}" for i in range(5)]


def test_an_error_of_the_caller_passes_through() -> None:
    def fail(answer: TeacherAnswer) -> None:
        raise UserError("the disk is full")

    with endpoint(first()) as server, pytest.raises(UserError, match="^the disk is full$"):
        options = options_of(server.base_url, concurrency=3, max_retries=0)
        ask_endpoint(options, iter(map(question, "abc")), fail)


def test_an_endpoint_is_asked_inside_a_running_event_loop() -> None:
    async def notebook(url: str) -> list[TeacherAnswer]:
        return ask(url)

    with endpoint(first()) as server:
        assert asyncio.run(notebook(server.base_url))[0].answer == "yes"


class FakeTime:
    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_requests_start_at_the_distance_of_the_limit() -> None:
    fake, starts = FakeTime(), []
    limiter = RateLimiter(30, clock=fake.clock, sleep=fake.sleep)

    async def start(number: int) -> None:
        for _ in range(number):
            await limiter.wait()
            starts.append(fake.now)

    asyncio.run(start(4))
    fake.now += 60
    asyncio.run(start(2))
    assert starts == [100, 102, 104, 106, 166, 168], "an idle time gives no right to a burst"
    limiter.pause(30)
    asyncio.run(start(2))
    assert starts[-2:] == [198, 200]


def test_without_a_limit_only_a_pause_delays_requests() -> None:
    fake = FakeTime()
    limiter = RateLimiter(None, clock=fake.clock, sleep=fake.sleep)
    asyncio.run(limiter.wait())
    assert fake.now == 100
    limiter.pause(7)
    asyncio.run(limiter.wait())
    asyncio.run(limiter.wait())
    assert fake.now == 107


def test_requests_that_wait_during_a_pause_do_not_start_together() -> None:
    now, starts = 0, list[int]()

    async def sleep(seconds: float) -> None:
        end = now + seconds
        while now < end:
            await asyncio.sleep(0)

    async def start_four() -> None:
        nonlocal now
        limiter = RateLimiter(60, clock=lambda: now, sleep=sleep)

        async def start() -> None:
            await limiter.wait()
            starts.append(now)

        tasks = [asyncio.create_task(start()) for _ in range(4)]
        for now in range(20):
            for _ in range(5):
                await asyncio.sleep(0)
            if now == 0:
                limiter.pause(10)
        await asyncio.gather(*tasks)

    asyncio.run(start_four())
    assert starts == [0, 10, 11, 12]


def test_every_repeated_request_counts_for_the_limit() -> None:
    with endpoint(first(TRANSIENT["500"], TRANSIENT["500"])) as server:
        start = time.monotonic()
        ask(server.base_url, requests_per_minute=1200)
        assert time.monotonic() - start >= 2 * 60 / 1200


def test_a_server_says_how_long_to_wait() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=10_000), usegmt=True)
    assert parse_retry_after({"retry-after": "2.5"}) == 2.5
    assert parse_retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert 9_000 < (parse_retry_after({"retry-after": later}) or 0) <= 10_000
    assert parse_retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    for bad in ("", "soon", "-1", "nan", "inf", "1e999", "Wed, 99 Oct 2015"):
        assert parse_retry_after({"retry-after": bad}) is None, bad
    assert parse_retry_after({}) is None


def test_answers_that_are_being_written_are_recorded_when_the_command_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_endpoint, "STOP_TIMEOUT_S", 600)
    three_are_asked, has_stopped, stop = (
        threading.Barrier(3),
        threading.Event(),
        teacher_endpoint._Client._stop,
    )

    async def stop_and_tell(*arguments: Any) -> None:
        asyncio.get_running_loop().call_soon(has_stopped.set)
        await stop(*arguments)

    monkeypatch.setattr(teacher_endpoint._Client, "_stop", stop_and_tell)

    def respond(text: str, before: int) -> Reply:
        if text in ("a", "b", "bad"):
            three_are_asked.wait(600)
        if text == "bad":
            return FATAL["405"]
        has_stopped.wait(600)
        return Reply(body=completion(text))

    answers: list[TeacherAnswer] = []
    with endpoint(respond) as server:
        options = options_of(server.base_url, concurrency=3, max_retries=0)
        with pytest.raises(EndpointError):
            ask_endpoint(options, iter(map(question, ("a", "b", "bad", "c", "d"))), answers.append)
    assert sorted(answer.answer for answer in answers) == ["a", "b"] and "c" not in server.asked


def test_too_many_failures_in_a_row_stop_also_where_failures_are_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_endpoint, "MAX_FAILURES_IN_A_ROW", 3)
    texts = [f"q{i}" for i in range(12)]

    def respond(text: str, before: int) -> Reply:
        good = int(text[1:]) % 4 == 3 or before > 0
        return Reply(body=completion(text)) if good else Reply(status=502, body=b"<html>Bad Gateway</html>")

    skipped: list[tuple[str, str]] = []
    with endpoint(respond) as server:
        ask(server.base_url, texts, skipped=skipped, max_retries=0, concurrency=1)
    assert len(skipped) == 9
    with endpoint(always(TRANSIENT["500"])) as server:
        with pytest.raises(EndpointError, match=r"4 questions in a row have failed .*500: broken"):
            ask(server.base_url, texts, skipped=[], max_retries=1, concurrency=1)
        assert sum(server.asked.values()) == 8
