"""Ask a teacher behind an endpoint that speaks the chat completions protocol of OpenAI.

The client library sends each request once. Requests are repeated here, because every one counts for the limit
of requests per minute, and because a malformed answer is repeated as well as an error of the server.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

from blockft.data.teacher_answers import Finish, Question, TeacherAnswer
from blockft.errors import UserError
from blockft.inputs import shorten, text_problem
from blockft.units import format_count

FIRST_WAIT_S = 0.5
"""Time before a request is repeated for the first time; it doubles each time."""

MAX_WAIT_S = 30.0
"""Longest time before a request is repeated, unless the server names a time."""

MAX_RETRY_AFTER_S = 900.0
"""Longest time for which `prepare` waits because the server asks for it."""

CONNECT_TIMEOUT_S = 30.0
"""Longest time to open a connection."""

MAX_FAILURES_IN_A_ROW = 50
"""Number of questions in a row that may fail and be skipped."""

STOP_TIMEOUT_S = 30.0
"""Longest time for answers that are being written when another question ends the command."""

_TRANSIENT_STATUS = {408, 409, 425, 429}
"""Status codes below 500 after which an equal request may succeed."""

_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_REFUSAL_CODES = {"content_filter", "content_policy_violation", "invalid_prompt", "data_inspection_failed"}
_REFUSAL_TEXTS = ("input was flagged", "prompt was flagged", "content policy", "content management policy")
_TOO_LONG_CODES = {"context_length_exceeded", "exceed_context_size_error"}
_TOO_LONG_TEXTS = ("context length", "context size", "context window", "maximum model length")


class EndpointError(UserError):
    """The endpoint answers no further question, until the user has changed something."""


class QuestionFailed(UserError):
    """The endpoint has no answer to one question, not even after the retries. Others may have one."""


class InvalidCompletion(Exception):
    """A response is not a complete chat completion; the message says why."""


class _Transient(Exception):
    """An error that may pass; the message is the reason.

    wait_s: the time that the server asks to wait, if it names one.
    is_unreachable: no connection could be opened.
    """

    def __init__(self, reason: str, *, wait_s: float | None = None, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.is_unreachable = wait_s, is_unreachable


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Address, model and limits of an endpoint; see `TeacherSettings`. Without `api_key` no key is sent."""

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    body: Mapping[str, Any]
    concurrency: int
    requests_per_minute: float | None
    timeout_s: float
    max_retries: int


def request_body(max_new_tokens: int, temperature: float, extra_body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request other than model and messages. A field that is null is left out."""
    fields = {"max_tokens": max_new_tokens, "temperature": temperature, **extra_body}
    return {name: value for name, value in fields.items() if value is not None}


class RateLimiter:
    """Starts requests at equal distances, and pauses all of them when the server asks for it."""

    def __init__(
        self,
        requests_per_minute: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._interval_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next_start = self._pause_end = clock()

    async def wait(self) -> None:
        """Wait until the next request may start."""
        while True:
            start = max(self._clock(), self._next_start)
            self._next_start = start + self._interval_s
            while (delay := start - self._clock()) > 0:
                await self._sleep(delay)
            if start >= self._pause_end:
                return
            # a pause began meanwhile: requests that wait must not all start at its end

    def pause(self, seconds: float) -> None:
        """Start no request during the next `seconds`."""
        self._pause_end = max(self._pause_end, self._clock() + seconds)
        self._next_start = max(self._next_start, self._pause_end)


def ask_endpoint(
    endpoint: Endpoint,
    questions: Iterator[Question],
    record: Callable[[TeacherAnswer], None],
    skip: Callable[[Question, str], None] | None = None,
) -> None:
    """Ask an endpoint all questions, several at the same time, and record each answer when it comes.

    skip: called with a question that failed after all retries, and the reason. None raises an error instead.

    Raises:
        EndpointError: the endpoint is not reachable after all retries, refuses the key, does not know the
            model, has no quota left, asks to wait for too long, or fails at too many questions in a row.
        QuestionFailed: a question failed.
        UserError: the client library is not installed.
    """
    _run(_Client(endpoint).ask_all(questions, record, skip))


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(coroutine)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, coroutine).result()


class _Client:
    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "data.teacher.base_url needs the package openai, which is not installed: "
                "pip install 'blockft[teacher]'"
            ) from error
        self._endpoint = endpoint
        self._limiter = RateLimiter(endpoint.requests_per_minute)
        self._requesting: set[asyncio.Task[Any] | None] = set()
        self._is_stopping = False
        self._failures_in_a_row = 0
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            # without a key the library would send that of the environment, wherever the address leads
            api_key=endpoint.api_key or "none",
            max_retries=0,
            timeout=openai.Timeout(endpoint.timeout_s, connect=min(endpoint.timeout_s, CONNECT_TIMEOUT_S)),
        )

    async def ask_all(
        self,
        questions: Iterator[Question],
        record: Callable[[TeacherAnswer], None],
        skip: Callable[[Question, str], None] | None,
    ) -> None:
        async def work() -> None:
            for question in questions:  # the workers share the iterator
                try:
                    answer = await self._ask(question)
                except QuestionFailed as error:
                    if skip is None:
                        raise
                    self._count_failure(error)
                    skip(question, str(error))
                else:
                    self._failures_in_a_row = 0
                    record(answer)
                if self._is_stopping:
                    return

        async with self._client:
            workers = [asyncio.create_task(work()) for _ in range(self._endpoint.concurrency)]
            finished, others = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            if others:
                await self._stop(others)
            errors = [error for worker in finished if (error := worker.exception())]
        if errors:
            raise errors[0]

    def _count_failure(self, error: QuestionFailed) -> None:
        """Count a question that is skipped.

        Raises:
            EndpointError: too many questions in a row have failed: it is not because of the questions.
        """
        self._failures_in_a_row += 1
        if self._failures_in_a_row > MAX_FAILURES_IN_A_ROW:
            raise EndpointError(
                f"{self._failures_in_a_row} questions in a row have failed (the last one: {error}): check "
                "the server and data.teacher"
            ) from error

    async def _stop(self, workers: Collection["asyncio.Task[None]"]) -> None:
        """End the workers; answers that the server is just writing are recorded, because they cost money."""
        self._is_stopping = True
        for worker in workers:
            if worker not in self._requesting:
                worker.cancel()
        await asyncio.wait(workers, timeout=STOP_TIMEOUT_S)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, question: Question) -> TeacherAnswer:
        """Return the answer to a question; the request is repeated after errors that may pass.

        Raises:
            EndpointError, QuestionFailed: see `ask_endpoint`.
        """
        for attempt in count():
            await self._limiter.wait()
            try:
                return await self._request(question)
            except _Transient as error:
                self._check_retry(error, attempt)
                if error.wait_s:
                    self._limiter.pause(error.wait_s)
                # a random part: requests that failed together would otherwise fail together again
                wait_s = min(FIRST_WAIT_S * 2 ** min(attempt, 30), MAX_WAIT_S)
                await asyncio.sleep(wait_s * random.uniform(0.75, 1))
        raise AssertionError

    def _check_retry(self, error: _Transient, attempt: int) -> None:
        """Check that a request may be repeated after `attempt` repetitions.

        Raises:
            EndpointError, QuestionFailed: it may not.
        """
        if error.wait_s is not None and error.wait_s > MAX_RETRY_AFTER_S:
            raise EndpointError(
                f"the teacher asks to wait for {error.wait_s:,.0f} s ({error}): run the command again then"
            ) from error
        if attempt < self._endpoint.max_retries and not self._is_stopping:
            return
        after = f"after {format_count(attempt + 1, 'request')}"
        if error.is_unreachable:
            raise EndpointError(
                f"the teacher cannot be reached {after} ({error}): check data.teacher.base_url, and whether "
                "the server runs"
            ) from error
        raise QuestionFailed(f"the teacher has not answered {after} ({error})") from error

    async def _request(self, question: Question) -> TeacherAnswer:
        """Send one request and return its answer.

        Raises:
            _Transient: the error may pass.
            EndpointError, QuestionFailed: it does not.
        """
        import httpx2
        import openai

        messages: Any = [{"role": message.role, "content": message.text} for message in question.messages]
        self._requesting.add(asyncio.current_task())
        try:
            # the timeout of the library ends when a byte arrives, this one does not
            async with asyncio.timeout(self._endpoint.timeout_s):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=self._endpoint.model, messages=messages, extra_body=dict(self._endpoint.body)
                )
            return parse_completion(response.http_response.content, question.key)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _Transient(
                f"no answer within {self._endpoint.timeout_s:g} s",
                is_unreachable=isinstance(error.__cause__, httpx2.ConnectTimeout),
            ) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise _Transient(
                self._show(str(cause) or type(cause).__name__),
                is_unreachable=isinstance(cause, httpx2.ConnectError | httpx2.ProxyError),
            ) from error
        except InvalidCompletion as error:
            raise _Transient(self._show(str(error))) from error
        except openai.APIStatusError as error:
            finish = self._read_status(error)
            return TeacherAnswer(key=question.key, answer="", finish=finish, prompt_tokens=0, answer_tokens=0)
        finally:
            self._requesting.discard(asyncio.current_task())

    def _read_status(self, error: Any) -> Finish:
        """Return how a question ended whose request was refused because of its content or length.

        Raises:
            _Transient: the error may pass.
            EndpointError, QuestionFailed: it does not.
        """
        status, codes = error.status_code, {str(error.code), str(error.type)}
        message = _server_message(error)
        reason = self._show(f"{status}: {message}")
        if codes & _QUOTA_CODES or status == 402:
            raise EndpointError(f"the teacher has no quota left ({reason}): check the account") from error
        if status in _TRANSIENT_STATUS or status >= 500:
            raise _Transient(reason, wait_s=parse_retry_after(error.response.headers)) from error
        # some servers refuse a text with the status of a wrong key
        is_refusal = status in (400, 403) and any(text in message.lower() for text in _REFUSAL_TEXTS)
        if is_refusal or codes & _REFUSAL_CODES:
            return Finish.refused
        if status in (401, 403):
            has_key = self._endpoint.api_key is not None
            remedy = (
                "check the key in the environment variable that data.teacher.api_key_env names"
                if has_key
                else "set data.teacher.api_key_env to the environment variable with the key"
            )
            raise EndpointError(f"the teacher refuses access ({reason}): {remedy}") from error
        if status < 400 or status in (404, 405):
            raise EndpointError(
                f"the teacher knows no such model or address ({reason}): check data.teacher.model, which is "
                f"{self._endpoint.model}, and data.teacher.base_url, which mostly ends in /v1"
            ) from error
        if codes & _TOO_LONG_CODES or any(text in message.lower() for text in _TOO_LONG_TEXTS):
            return Finish.too_long
        raise QuestionFailed(f"the teacher refuses the request ({reason})") from error

    def _show(self, text: str) -> str:
        """Return a text of the server for a message: one line, and without the key."""
        if key := self._endpoint.api_key:
            text = text.replace(key, "***")
        return shorten(" ".join(text.split()))


def parse_completion(content: bytes, key: str) -> TeacherAnswer:
    """Return the answer in the response to a request for a chat completion.

    Raises:
        InvalidCompletion: the response is not JSON, or lacks an answer, or says that the answer was
            interrupted.
    """
    try:
        response = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidCompletion(_describe_content(content)) from error
    if not isinstance(response, dict):
        raise InvalidCompletion("the response is not a JSON object")
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices:
        problem = response.get("error")
        raise InvalidCompletion(f"the response has no choices{f': {problem}' if problem else ''}")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | list | None):
        raise InvalidCompletion("the response has no message")
    answer = _join_parts(message.get("content") or "")
    finish = _parse_finish(choice.get("finish_reason"))
    if problem := text_problem(answer):
        raise InvalidCompletion(f"the answer {problem}")
    usage = response.get("usage")
    return TeacherAnswer(
        key=key,
        answer=answer,
        finish=Finish.refused if message.get("refusal") else finish,
        prompt_tokens=_parse_count(usage, "prompt_tokens"),
        answer_tokens=_parse_count(usage, "completion_tokens"),
    )


def _describe_content(content: bytes) -> str:
    """Return what a response is that is not JSON."""
    text = content.decode("utf-8", "replace").strip()
    if text[:9].lower().startswith(("<!doctype", "<html")):  # of a chat, a login, a proxy
        return "the response is a web page: check data.teacher.base_url, which mostly ends in /v1"
    return f"the response is not JSON: {text}" if text else "the response is empty"


def _join_parts(content: str | list[Any]) -> str:
    """Return the text of a message. Some servers send a list, in which the reasoning is a part of its own."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _parse_finish(reason: Any) -> Finish:
    """Return how an answer ended; servers have different words for it.

    Raises:
        InvalidCompletion: there is no reason, or an unknown one such as `abort`, `error` or
            `insufficient_system_resource`: the server has interrupted the answer.
    """
    if not isinstance(reason, str):
        raise InvalidCompletion("the response does not say why it ends")
    match reason.lower():
        case "stop" | "eos" | "eos_token" | "end_turn" | "stop_sequence" | "complete":
            return Finish.stop
        case "length" | "max_tokens":
            return Finish.length
        case "content_filter" | "safety" | "sensitive" | "recitation" | "refusal":
            return Finish.refused
        case "tool_calls" | "tool_use" | "function_call":
            return Finish.other
    raise InvalidCompletion(f"the server ended the answer for the reason {reason!r}")


def _parse_count(usage: Any, name: str) -> int:
    """Return a number of tokens; 0 if the endpoint does not count them."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and count >= 0 else 0


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds for which a server asks to wait, or None if it names no time."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * unit_s
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _server_message(error: Any) -> str:
    """Return the message in the body of an error, or its first text."""
    body = error.body
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and name in body:
            body = body[name]
    return str(body or "no message")
