"""Concurrent requests and interleaved streams match sequential requests."""

import random
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import blockft.inference.runner as runner_module
from blockft.inference.answer import Answer
from blockft.inference.engine import Engine
from blockft.inference.runner import Rotate
from blockft.inference.sampling import Sampler
from tests.inference.engines import ROTATE, Prompt, greedy, load_engine, options
from tests.inference.test_runner import LARGER, PROMPT, TOKEN_BYTES, Failure, ask, random_prompt

NUM_NEW = 8
TIGHT = options(device=101 * TOKEN_BYTES, host=150 * TOKEN_BYTES)
"""Memory for the larger of the two prompts, but not for both."""

Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Twelve prompts that share blocks, at different positions."""
    rng, blocks = random.Random(3), random_prompt(5, *range(4, 34, 3))
    return [[*rng.sample(blocks, 4), *random_prompt(i, 5 + i % 3)] for i in range(12)]


@pytest.fixture(scope="module")
def expected_ids(toy_model: Path, prompts: list[Prompt]) -> list[Ids]:
    engine = load_engine(toy_model)
    engine.eos_token_ids = set()
    return [greedy(engine.model, prompt, NUM_NEW) for prompt in prompts]


@pytest.fixture(params=ROTATE)
def rotate(request: pytest.FixtureRequest) -> Rotate:
    return request.param


def load_endless(path: Path, rotate: Rotate, cache: Any = None) -> Engine:
    engine = load_engine(path, rotate, cache)
    engine.eos_token_ids = set()
    return engine


def finish(pieces: Generator[str, None, Answer]) -> Ids:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return tuple(end.value.ids)


# threads


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.parametrize("cache", [options(), TIGHT], ids=["roomy", "tight"])
def test_concurrent_requests_match_sequential(
    toy_model: Path,
    rotate: Rotate,
    cache: Any,
    num_threads: int,
    prompts: list[Prompt],
    expected_ids: list[Ids],
) -> None:
    engine = load_endless(toy_model, rotate, cache)

    def answer(i: int) -> Ids:
        prompt = prompts[i % len(prompts)]
        if i % 3:
            return engine.generate_ids([prompt], max_new_tokens=NUM_NEW)[0].ids
        return finish(engine.stream_ids(prompt, max_new_tokens=NUM_NEW))

    with ThreadPoolExecutor(num_threads) as pool:
        got = [*pool.map(answer, range(36))]
    assert got == expected_ids * 3


def test_concurrent_first_requests_match_sequential(toy_model: Path, rotate: Rotate) -> None:
    """The first requests modify the tokenizer."""
    records = [{"documents": [f"The {i} barks."], "question": f"Who is {i}?"} for i in range(12)]
    alone = load_endless(toy_model, rotate)
    expected = [alone.generate(**record, max_new_tokens=3).ids for record in records]
    engine = load_endless(toy_model, rotate)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(engine.generate, **record, max_new_tokens=3) for record in records]
        cleared = [pool.submit(clear) for clear in (engine.clear_cache, engine.flush)]
        assert [answer.result().ids for answer in answers] == expected
        assert [done.result() for done in cleared] == [None, None]


# streams


@pytest.mark.parametrize("cache", [options(), TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("sampled", [{}, {"temperature": 5.0, "top_p": 0.95, "seed": 3}])
def test_interleaved_streams_match_separate_streams(
    toy_model: Path, rotate: Rotate, cache: Any, sampled: dict[str, Any]
) -> None:
    engine, alone = (load_endless(toy_model, rotate, cache) for _ in range(2))

    def stream_prompt(engine: Engine, prompt: Prompt) -> Generator[str, None, Answer]:
        return engine.stream_ids(prompt, max_new_tokens=NUM_NEW, sampler=Sampler(**sampled))

    expected = [finish(stream_prompt(alone, prompt)) for prompt in (PROMPT, LARGER)]
    streams = [stream_prompt(engine, prompt) for prompt in (PROMPT, LARGER)]
    for _ in range(3):
        for stream in streams:
            next(stream)
    between = ask(engine).ids
    assert [finish(stream) for stream in streams] == expected
    assert between == ask(alone).ids


def test_an_unfinished_stream_does_not_delay_other_requests(toy_model: Path, rotate: Rotate) -> None:
    engine = load_endless(toy_model, rotate)
    stream = engine.stream_ids(LARGER, max_new_tokens=NUM_NEW)
    next(stream)
    with ThreadPoolExecutor(1) as pool:  # nor a request from another thread
        assert pool.submit(ask, engine).result(timeout=600).ids == ask(engine).ids
    assert finish(stream) == greedy(engine.model, LARGER, NUM_NEW)


def test_an_interrupted_stream_reports_the_sources_of_its_first_prefill(toy_model: Path) -> None:
    engine = load_endless(toy_model, "queries", options(device=101 * TOKEN_BYTES))
    stream = engine.stream_ids(PROMPT, max_new_tokens=NUM_NEW)
    next(stream)
    ask(engine, LARGER)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            assert end.value.sources == {"computed": 4} and len(end.value.ids) == NUM_NEW
            break


def test_a_failed_request_does_not_change_a_stream(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failed request may have taken the slots of the stream's blocks."""
    engine = load_endless(toy_model, "queries", options(device=101 * TOKEN_BYTES, host=0))
    stream = engine.stream_ids(PROMPT, max_new_tokens=NUM_NEW)
    next(stream)

    def fail(*_: Any) -> Any:
        raise Failure

    with monkeypatch.context() as patched:
        patched.setattr(runner_module, "prefill_blocks", fail)
        with pytest.raises(Failure):
            ask(engine, [*random_prompt(4, 60, 40), [1]])
    assert finish(stream) == greedy(engine.model, PROMPT, NUM_NEW)
