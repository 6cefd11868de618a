"""Send the requests of `blockft bench serve` to a server, and record when its tokens arrive.

The generator is an open loop: a request is sent at its planned time, however many have no answer yet. Its
times count from the planned arrival, so that a late start, of the client or of a connection, is not hidden.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from blockft.bench.serve_workload import ServePrompt
from blockft.errors import UserError, first_line

PERCENTILES = (50, 95, 99)

KEEPALIVE_S = 2.0
"""How long a connection without a request is kept. Servers close theirs, most of them after 5 seconds, and a
request that is sent at the same moment fails."""

ServerKind = Literal["plain", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server that is asked.

    kind: `plain` gets the token ids of a prompt, `blocks` the texts of its blocks.
    url: the address with /v1.
    """

    kind: ServerKind
    url: str
    api_key: str = field(default="none", repr=False)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request. A failed request has infinite times and a reason.

    ttft_s, end_to_end_s  from the planned arrival to the first token, and to the end of the answer
    late_s                from the planned arrival to the moment when the client sent the request
    end_s                 the end of the answer, from the start of the measurement
    sources               blocks of the prompt by where they came from
    """

    ttft_s: float = math.inf
    end_to_end_s: float = math.inf
    late_s: float = 0.0
    end_s: float = math.inf
    prompt_tokens: int = 0
    reused_tokens: int = 0
    sources: Mapping[str, int] = field(default_factory=dict)
    failure: str = ""


class IncompleteAnswer(Exception):
    """A stream has ended before its answer was complete."""


class LoadClient:
    """Asks one server. Use it as an asynchronous context manager.

    timeout_s: a request without a complete answer after this time, from its planned arrival, has failed.

    Raises:
        UserError: the client library is not installed.
    """

    def __init__(self, target: Target, answer_len: int, timeout_s: float) -> None:
        try:
            import httpx2
            import openai
        except ImportError as error:
            raise UserError(
                "blockft bench serve needs the package openai, which is not installed: pip install openai"
            ) from error
        self._target, self._answer_len, self._timeout_s = target, answer_len, timeout_s
        # a request must never wait for a connection of another one
        limits = httpx2.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_S
        )
        self._client = openai.AsyncOpenAI(
            base_url=target.url,
            api_key=target.api_key,
            max_retries=0,
            timeout=timeout_s,
            http_client=openai.DefaultAsyncHttpxClient(limits=limits),
        )
        self._model = ""

    async def __aenter__(self) -> "LoadClient":
        self._model = await self.find_model()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def find_model(self) -> str:
        """Return the name of the server's model.

        Raises:
            UserError: the server does not answer.
        """
        import openai

        try:
            models = await self._client.models.list()
        except openai.OpenAIError as error:
            raise UserError(f"{self._target.url} does not list its models: {first_line(error)}") from error
        return models.data[0].id

    async def run_open_loop(
        self, prompts: Sequence[ServePrompt], times: Sequence[float], done: Callable[[], None]
    ) -> list[Outcome]:
        """Send each prompt at its time, and return the outcomes in order when all have ended."""
        start, tasks = time.perf_counter(), []
        for prompt, planned in zip(prompts, times, strict=True):
            if (wait_s := start + planned - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(self._ask(prompt, start, planned, done)))
        return list(await asyncio.gather(*tasks))

    async def run_closed_loop(
        self, prompts: Sequence[ServePrompt], num_clients: int, done: Callable[[], None]
    ) -> list[Outcome]:
        """Send the prompts from some clients, each of which waits for an answer before it goes on."""
        start, waiting, outcomes = time.perf_counter(), iter(prompts), list[Outcome]()

        async def work() -> None:
            for prompt in waiting:
                outcomes.append(await self._ask(prompt, start, time.perf_counter() - start, done))

        await asyncio.gather(*(work() for _ in range(num_clients)))
        return outcomes

    async def _ask(
        self, prompt: ServePrompt, start: float, planned: float, done: Callable[[], None]
    ) -> Outcome:
        import openai

        arrival = start + planned
        late_s = time.perf_counter() - arrival
        try:
            async with asyncio.timeout(self._timeout_s - late_s):
                return await self._receive(prompt, start, arrival, late_s)
        except (TimeoutError, openai.APITimeoutError):
            failure = f"no complete answer after {self._timeout_s:g} s"
        except (openai.OpenAIError, IncompleteAnswer) as error:
            failure = first_line(error)[:200]
        finally:
            done()
        return Outcome(late_s=late_s, failure=failure)

    async def _receive(self, prompt: ServePrompt, start: float, arrival: float, late_s: float) -> Outcome:
        """Send one request and read its stream to the end."""
        first, usage = math.inf, None
        stream = await self._client.completions.create(**self._body(prompt))
        async for chunk in stream:
            if chunk.choices and first == math.inf:
                first = time.perf_counter()
            usage = chunk.usage or usage
        end = time.perf_counter()
        if usage is None:
            raise IncompleteAnswer("the stream ended before its usage")
        if usage.completion_tokens != self._answer_len:
            raise IncompleteAnswer(
                f"the answer has {usage.completion_tokens} tokens instead of {self._answer_len}"
            )
        details = usage.prompt_tokens_details
        blocks: dict[str, Any] = getattr(usage, "block_attention", None) or {}
        return Outcome(
            ttft_s=first - arrival,
            end_to_end_s=end - arrival,
            late_s=late_s,
            end_s=end - start,
            prompt_tokens=usage.prompt_tokens,
            reused_tokens=(details and details.cached_tokens) or 0,
            sources=blocks.get("sources", {}),
        )

    def _body(self, prompt: ServePrompt) -> dict[str, Any]:
        """Return the fields of a completion request, whose answer cannot end early."""
        # the client library walks through its own parameters, which takes 50 ms for the ids of a long prompt
        content = {"blocks": prompt.blocks} if self._target.kind == "blocks" else {"prompt": prompt.ids}
        return {
            "model": self._model,
            "prompt": "",
            "max_tokens": self._answer_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": {"min_tokens": self._answer_len, **content},
        }


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of a measurement.

    Percentiles are over all requests. A failed request is slower than every other one, and a percentile that
    falls on it is None.
    """
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure)
    answered = [outcome for outcome in outcomes if not outcome.failure]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in answered)
    sources = Counter[str]()
    for outcome in answered:
        sources.update(outcome.sources)
    duration_s = max((outcome.end_s for outcome in answered), default=0.0)
    return {
        "num_requests": len(outcomes),
        "num_failed": len(outcomes) - len(answered),
        "failures": dict(failures.most_common(10)),
        "duration_s": duration_s,
        "answered_per_s": len(answered) / duration_s if duration_s else 0.0,
        "ttft_ms": _percentiles([outcome.ttft_s for outcome in outcomes]),
        "end_to_end_ms": _percentiles([outcome.end_to_end_s for outcome in outcomes]),
        "client_late_ms": _percentiles([outcome.late_s for outcome in outcomes]),
        "mean_prompt_tokens": prompt_tokens / max(len(answered), 1),
        "reused_percent": 100 * sum(outcome.reused_tokens for outcome in answered) / max(prompt_tokens, 1),
        "block_sources": dict(sources),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return percentiles in milliseconds: values that were measured, the higher one of two."""
    if not seconds:
        return {f"p{percent}": None for percent in PERCENTILES}
    values = np.percentile(seconds, PERCENTILES, method="higher") * 1000
    return {
        f"p{percent}": float(value) if math.isfinite(value) else None
        for percent, value in zip(PERCENTILES, values, strict=True)
    }


def is_within(figures: Mapping[str, Any], ttft_limit_ms: float) -> bool:
    """Return whether a server has held the limit: no request failed, and p95 of the TTFT is within it."""
    p95 = figures["ttft_ms"]["p95"]
    return not figures["num_failed"] and p95 is not None and p95 <= ttft_limit_ms
