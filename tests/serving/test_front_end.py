"""The front end over an application that behaves as vLLM's: requests, missing blocks, streams, failures."""

import asyncio
import functools
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blockft.data.encoder import Encoder
from blockft.data.sample import Sample
from blockft.inference.block_key import BlockKey, block_key, first_ids, num_first, num_tokens, token_ids
from blockft.inference.disk_tier import DiskTier
from blockft.serving import front_end, launch
from blockft.serving.answer_sender import ABORTED
from blockft.serving.block_request import BlockRequest, block_keys, block_salt, parse_params
from blockft.serving.front_end import (
    CHAT,
    COMPLETIONS,
    END_TIMEOUT_S,
    ENGINE_END_S,
    MAX_ATTEMPTS,
    BlockFrontEnd,
)
from blockft.serving.missing_blocks import BlockComputer
from blockft.serving.prompt_encoder import PromptEncoder
from blockft.serving.report import Report
from blockft.serving.served_model import ServedModel
from tests.serving.fake_vllm import LEAVE, MAX_LEN, Client, FakeVllm
from tests.serving.stubs import SECRET, SHAPE, make_served

DOCUMENTS = ["Dogs bark.", "Cows moo.", "Cats purr."]
"""Documents of a prompt with 5 local blocks: the template's markup, the instruction and the documents."""
QUESTION = {"documents": DOCUMENTS, "question": "Who barks?"}
NESTED: Any = functools.reduce(lambda inner, _: [inner], range(101), {})
CHAT_BLOCKS = {"messages": [{"role": "user", "content": ["Dogs bark.\n", "Cows moo.\n", "Who barks?"]}]}


class FakeCounters:
    """Counts in memory."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, dict[str, int]]] = []
        self.failures = Counter[str]()
        self.num_encoded = 0

    def count_answer(self, mode: str, blocks: Any, tokens: Any) -> None:
        assert blocks.keys() == tokens.keys()
        self.answers.append((mode, dict(blocks)))

    def count_failure(self, reason: str) -> None:
        self.failures[reason] += 1

    def count_encoded(self, num_tokens: int) -> None:
        self.num_encoded += 1


class Setup:
    """A front end over a fake vLLM. Blocks that vLLM stores appear in the cache folder."""

    def __init__(self, served: ServedModel) -> None:
        self.served, self.counters = served, FakeCounters()
        self.vllm = FakeVllm(local_sees_first=served.local_sees_first)
        self.vllm.on_store = self._write
        self.app = BlockFrontEnd(self.vllm, served, self.counters)

    def _write(self, key: BlockKey) -> None:
        file = self._file(key)
        file.write_bytes(bytes(self.served.computed_by_vllm.entry_bytes(len(token_ids(key)))))

    def _file(self, key: BlockKey) -> Path:
        return self.served.open_disk_tiers()[1]._path(key)

    def evict(self, key: BlockKey) -> None:
        self.vllm.blocks.discard(key)
        self._file(key).unlink(missing_ok=True)

    async def post(self, body: Any, path: str = CHAT, **client: Any) -> tuple[int, Any]:
        status, headers, content = await Client(self.app, **client).post(path, body)
        if headers.get("content-type", "").startswith("text/event-stream"):
            assert b"".join(content.split(b"\n\n")[-1:]) == b""
            return status, [event.removeprefix(b"data: ") for event in content.split(b"\n\n")[:-1]]
        if content and "content-length" in headers:
            assert int(headers["content-length"]) == len(content)
        return status, json.loads(content) if content else None

    def prompt_completions(self) -> list[dict[str, Any]]:
        """The completion requests that are no blocks to compute."""
        found = []
        for body in self.vllm.completions:
            request = parse_params(body.get("kv_transfer_params"), SECRET)
            if request is None or isinstance(request, BlockRequest):
                found.append(body)
        return found


@pytest.fixture
def setup(tmp_path: Path, toy_model: Path) -> Setup:
    return Setup(make_served(tmp_path, path=str(toy_model)))


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_missing_blocks_are_computed_once_and_then_reused(setup: Setup) -> None:
    async def test() -> None:
        status, first = await setup.post(QUESTION)
        assert status == 200 and first["object"] == "chat.completion"
        assert first["choices"][0]["message"] == {"role": "assistant", "content": "below"}
        assert first["usage"]["block_attention"]["sources"] == {"computed": 5}
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        _, second = await setup.post({"documents": DOCUMENTS[::-1], "question": "Who purrs?"})
        usage = second["usage"]["block_attention"]
        assert usage["sources"] == {"host": 5} and usage["blocks_reused"] == 5
        reused = sum(len(token_ids(key)) for key in setup.vllm.blocks)
        assert usage["tokens_reused"] == second["usage"]["prompt_tokens_details"]["cached_tokens"] == reused
        assert setup.counters.answers == [("block", {"computed": 5}), ("block", {"host": 5})]
        assert setup.counters.num_encoded == 5

    run(test)


def test_vllm_gets_the_ids_of_the_engine_and_the_limits_of_blocks(setup: Setup) -> None:
    async def test() -> None:
        await setup.post(QUESTION | {"max_completion_tokens": 7, "temperature": 0.5, "cache_salt": "mine"})
        (body,) = setup.prompt_completions()
        encoder = PromptEncoder(setup.served)
        assert encoder.prompt is not None
        from blockft.data.request import parse_request

        blocks = await encoder.encode(parse_request(QUESTION, encoder.prompt, "request"))
        assert body["prompt"] == [id for block in blocks for id in block]
        request = parse_params(body["kv_transfer_params"], SECRET)
        assert isinstance(request, BlockRequest)
        assert request.lengths == tuple(map(len, blocks[:-1]))
        assert body["cache_salt"] == request.salt == block_salt(SECRET, request.lengths, "mine")
        assert body["max_tokens"] == 7 and body["temperature"] == 0.5
        assert set(encoder.end_token_ids) <= set(body["stop_token_ids"])
        assert setup.vllm.blocks == {block_key(block) for block in blocks[:-1]}

    run(test)


def test_blocks_that_nearer_places_give_count_as_used_on_disk(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers open no entry for blocks of vLLM's prefix cache, for example. Hot blocks would be evicted."""
    monkeypatch.setattr("blockft.serving.missing_blocks.KNOWN_S", -1)
    by_blockft, by_vllm = setup.served.open_disk_tiers()
    long_ago, now = 1000, time.time()

    async def test() -> None:
        await setup.post(QUESTION)
        known = [*setup.vllm.blocks]
        by_blockft.write(known[0], torch.zeros(SHAPE.num_layers, *SHAPE.layer_shape(num_tokens(known[0]))))
        await setup.post({"documents": ["Pigs oink."], "question": "?"})
        for path in Path(setup.served.folder).rglob("*.safetensors"):
            os.utime(path, (long_ago, long_ago))
        await setup.post(QUESTION)
        used = {key for key in setup.vllm.blocks if _used_since(by_vllm, key, now)}
        assert used == {*known[1:]} and _used_since(by_blockft, known[0], now)
        assert not setup.vllm.blocks <= used | {known[0]}, "the pigs"

    run(test)


def _used_since(tier: DiskTier, key: BlockKey, start: float) -> bool:
    return tier._path(key).stat().st_mtime >= start - 1


def before_encoding(monkeypatch: pytest.MonkeyPatch, act: Callable[[Sample], None]) -> None:
    """Let `act` run with each prompt before it is encoded, in the same thread."""
    encode = Encoder.encode_prompt_arrays

    def act_and_encode(encoder: Encoder, sample: Sample) -> list[NDArray[np.int32]]:
        act(sample)
        return encode(encoder, sample)

    monkeypatch.setattr(Encoder, "encode_prompt_arrays", act_and_encode)


def test_no_request_waits_for_the_tokens_of_a_large_prompt(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document of 60 MB takes half a minute."""
    monkeypatch.setattr("blockft.serving.prompt_encoder.LARGE_PROMPT_CHARS", 500)
    is_waiting, may_end = threading.Event(), threading.Event()

    def wait_if_large(sample: Sample) -> None:
        if sum(map(len, sample.blocks)) >= 500:
            is_waiting.set()
            assert may_end.wait(600)

    before_encoding(monkeypatch, wait_if_large)

    async def test() -> None:
        large = asyncio.create_task(setup.post({"documents": ["moo " * 125], "question": "?"}))
        try:
            assert await asyncio.to_thread(is_waiting.wait, 600)
            async with asyncio.timeout(300):
                assert (await setup.post(QUESTION))[0] == 200
            assert not large.done()
        finally:
            may_end.set()
        status, answer = await large
        assert status == 400 and "use fewer documents" in answer["error"]["message"]

    run(test)


@pytest.mark.parametrize("limit", ["SHORT_PROMPT_BLOCKS", "SHORT_PROMPT_MESSAGES", "KNOWN_CHARS"])
def test_a_prompt_that_may_take_long_is_encoded_by_the_thread(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Also if all its documents are known: 100,000 short ones are."""
    threads: list[str] = []
    before_encoding(monkeypatch, lambda sample: threads.append(threading.current_thread().name))

    async def test() -> None:
        for value in (None, 0):
            if value is not None:
                monkeypatch.setattr(f"blockft.serving.prompt_encoder.{limit}", value)
            assert (await setup.post(QUESTION))[0] == 200
        assert threads == [threading.current_thread().name, "blockft-encode_0"]

    run(test)


def test_a_prompt_of_known_documents_is_encoded_at_once(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread would start later than the prompt is encoded. It encodes other prompts one after the other."""
    monkeypatch.setattr("blockft.serving.prompt_encoder.SHORT_PROMPT_CHARS", 60)
    is_waiting, may_end = threading.Event(), threading.Event()
    may_end.set()
    threads: list[str] = []

    def note_and_wait(sample: Sample) -> None:
        threads.append(threading.current_thread().name)
        is_waiting.set()
        assert may_end.wait(600)

    before_encoding(monkeypatch, note_and_wait)

    async def test() -> None:
        event_loop, thread = threading.current_thread().name, "blockft-encode_0"
        known = {"documents": ["moo " * 20]}
        for question in ("Who?", "What?"):
            assert (await setup.post(known | {"question": question}))[0] == 200
        assert threads == [thread, event_loop]
        may_end.clear()
        is_waiting.clear()
        new = asyncio.create_task(setup.post({"documents": ["woof " * 20], "question": "?"}))
        assert await asyncio.to_thread(is_waiting.wait, 600)
        in_turn = asyncio.create_task(setup.post(known | {"question": "Where?"}))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not in_turn.done(), "the event loop does not wait"
        may_end.set()
        assert [status for status, _ in await asyncio.gather(new, in_turn)] == [200, 200]
        assert threads[2:] == [thread, thread]

    run(test)


def test_blocks_that_see_the_first_block_are_computed_behind_it(tmp_path: Path, toy_model: Path) -> None:
    """vLLM gets the tokens of both, and the number of those that are not stored."""
    setup = Setup(make_served(tmp_path, path=str(toy_model), local_sees_first=True))

    async def test() -> None:
        _, answer = await setup.post(CHAT_BLOCKS)
        (body,) = setup.prompt_completions()
        params = parse_params(body["kv_transfer_params"], SECRET)
        assert isinstance(params, BlockRequest)
        context = block_keys(body["prompt"], params.lengths, local_sees_first=True)
        assert setup.vllm.blocks == {*context}
        encoded = [
            (prompt, body["kv_transfer_params"]["first_len"])
            for body in setup.vllm.completions
            if body["kv_transfer_params"].get("encode")
            for prompt in body["prompt"]
        ]
        assert sorted(encoded) == sorted((first_ids(key) + token_ids(key), num_first(key)) for key in context)
        assert answer["usage"]["block_attention"]["sources"] == {"computed": len(context)}
        _, again = await setup.post(CHAT_BLOCKS)
        assert again["usage"]["block_attention"]["sources"] == {"host": len(context)}
        other = {"messages": [{"role": "system", "content": "Moo."}, *CHAT_BLOCKS["messages"]]}
        _, moved = await setup.post(other)
        assert set(moved["usage"]["block_attention"]["sources"]) == {"computed"}

    run(test)


def test_an_answer_that_ignores_end_tokens_does_not_stop_at_them(setup: Setup) -> None:
    async def test() -> None:
        await setup.post(QUESTION | {"ignore_eos": True, "stop_token_ids": [7]})
        (body,) = setup.prompt_completions()
        assert body["ignore_eos"] is True and body["stop_token_ids"] == [7]

    run(test)


def test_the_newer_name_of_the_limit_of_an_answer_counts(setup: Setup) -> None:
    async def test() -> None:
        await setup.post(QUESTION | {"max_tokens": 9, "max_completion_tokens": 7})
        (body,) = setup.prompt_completions()
        assert body["max_tokens"] == 7

    run(test)


def test_full_mode_has_the_same_ids_and_no_blocks(setup: Setup) -> None:
    async def test() -> None:
        await setup.post(QUESTION)
        _, answer = await setup.post(QUESTION | {"mode": "full"})
        block, full = setup.prompt_completions()
        assert full["prompt"] == block["prompt"]
        assert not full.keys() & {"kv_transfer_params", "cache_salt"}
        assert answer["usage"]["block_attention"]["mode"] == "full"
        assert answer["usage"]["block_attention"]["blocks_reused"] == 0

    run(test)


OTHERS = [
    {"messages": [{"role": "user", "content": "Who barks?"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who barks?"}]}]},
    {"messages": [], "kv_transfer_params": {"secret": "guess", "lengths": [3]}, "cache_salt": "blockft-0"},
    {"messages": "text"},
    {"messages": [None, 3]},
    b"[1, 2]",
    b"no JSON",
    b"",
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("body", OTHERS)
def test_requests_without_blocks_go_to_vllm_unchanged(setup: Setup, body: Any) -> None:
    async def test() -> None:
        status, answer = await setup.post(body)
        assert (status, answer) == (200, {"is_from_vllm": True})
        ((scope, content),) = setup.vllm.others
        assert scope["path"] == CHAT
        assert content == (body if isinstance(body, bytes) else json.dumps(body).encode())

    run(test)


BLOCK_MESSAGES = {"messages": CHAT_BLOCKS["messages"]}


@pytest.mark.parametrize(
    "path",
    ["/invocations", "/v1/messages", "/v1/responses", "/v1/chat/completions/batch", "/tokenize", "/new"],
)
@pytest.mark.parametrize(
    ("body", "field"),
    [
        (QUESTION, "'documents'"),
        ({"blocks": ["a", "b"], "prompt": ""}, "'blocks'"),
        ({"prompt": "a", "mode": "block"}, "'mode'"),
        (BLOCK_MESSAGES, "the block texts of 'messages'"),
    ],
)
def test_a_path_that_would_ignore_blocks_refuses_them(
    setup: Setup, path: str, body: dict[str, Any], field: str
) -> None:
    """vLLM ignores fields that it does not know, and answers with full attention over the question alone."""

    async def test() -> None:
        status, answer = await setup.post(body, path)
        assert status == 400 and f"'{path}' gives full attention and would ignore {field}" in str(answer)
        assert "send the request to /v1/chat/completions or /v1/completions" in answer["error"]["message"]
        assert not setup.vllm.others and setup.counters.failures == {"refused": 1}

    run(test)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "Who barks?"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]}),
        ("/v1/rerank", {"query": "Who barks?", "documents": DOCUMENTS}),
        ("/v1/load_lora_adapter", b""),
    ],
)
def test_other_paths_go_to_vllm_unchanged(setup: Setup, path: str, body: Any) -> None:
    async def test() -> None:
        assert (await setup.post(body, path))[1] == {"is_from_vllm": True}
        ((_, content),) = setup.vllm.others
        assert content == (body if isinstance(body, bytes) else json.dumps(body).encode())

    run(test)


def test_a_form_is_not_read_as_a_prompt(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of sound are larger than prompts."""
    monkeypatch.setattr("blockft.serving.front_end.MAX_BODY_BYTES", 10)

    async def test() -> None:
        form = {"headers": {"Content-Type": "multipart/form-data; boundary=x"}}
        status, answer = await setup.post(b"a" * 1000, "/v1/audio/transcriptions", **form)
        assert (status, answer) == (200, {"is_from_vllm": True})

    run(test)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"documents": DOCUMENTS}, "question"),
    (CHAT, {"documents": "text", "question": "?"}, "documents"),
    (CHAT, {"documents": [{"title": "x"}], "question": "?"}, "text"),
    (CHAT, QUESTION | {"mode": "local"}, "block or full"),
    (CHAT, QUESTION | CHAT_BLOCKS, "have 'documents' and 'question', or 'messages', or 'blocks'"),
    (CHAT, QUESTION | {"prompt_logprobs": 1}, "prompt_logprobs"),
    (CHAT, QUESTION | {"tools": []}, "tools"),
    (CHAT, QUESTION | {"kv_transfer_params": {}}, "kv_transfer_params"),
    (CHAT, QUESTION | {"logprobs": 3}, "logprobs"),
    (CHAT, QUESTION | {"max_tokens": 0}, "max_tokens"),
    (CHAT, QUESTION | {"max_tokens": True}, "max_tokens"),
    (CHAT, QUESTION | {"stop_token_ids": 3}, "stop_token_ids"),
    (CHAT, QUESTION | {"stop_token_ids": ["a"]}, "stop_token_ids"),
    (CHAT, QUESTION | {"cache_salt": 3}, "cache_salt"),
    (CHAT, QUESTION | {"model": 3}, "model"),
    (CHAT, QUESTION | {"stop": ["a", "\ud800"]}, "stop"),
    (CHAT, QUESTION | {"top_k": 10**40}, "top_k"),
    (CHAT, QUESTION | {"logit_bias": {"\ud800": 1}}, "logit_bias"),
    (CHAT, QUESTION | {"response_format": [[[{"a": [-(10**40)]}]]]}, "response_format"),
    (CHAT, QUESTION | {"logit_bias": {"1": float("nan")}}, "finite"),
    (CHAT, QUESTION | {"temperature": float("inf")}, "finite"),
    (CHAT, QUESTION | {"response_format": NESTED}, "nested at most 100 times"),
    (CHAT, QUESTION | {"f" * 1000: 1}, "characters) is not supported"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "question": "?"}, "'documents' and 'question'"),
    (CHAT, QUESTION | {"max_completion_tokens": "2", "max_tokens": 2}, "max_tokens"),
    (CHAT, QUESTION | {"max_tokens": 399}, "399"),
    (CHAT, {"documents": ["\ud800"], "question": "?"}, "Unicode"),
    (CHAT, {"documents": DOCUMENTS * 40, "question": "?"}, "fewer documents"),
    (CHAT, {"messages": [{"role": "king", "content": ["a", "b"]}]}, "role"),
    (CHAT, {"documents": DOCUMENTS, "messages": [{"role": "system", "content": "?"}]}, "user"),
    (COMPLETIONS, {"documents": DOCUMENTS, "prompt": ["a", "b"]}, "question"),
    (COMPLETIONS, {"documents": DOCUMENTS, "prompt": [1, 2]}, "question"),
    (COMPLETIONS, {"blocks": ["a", "b"], "prompt": "?"}, "prompt"),
    (COMPLETIONS, QUESTION | {"echo": True}, "echo"),
    (COMPLETIONS, QUESTION | {"use_beam_search": True}, "use_beam_search"),
    (COMPLETIONS, QUESTION | {"top_logprobs": 1}, "top_logprobs"),
    (COMPLETIONS, {"blocks": ["a", ""]}, "block"),
    (COMPLETIONS, {"blocks": []}, "blocks"),
    (COMPLETIONS, {"blocks": ["a", 3]}, "blocks"),
]


@pytest.mark.parametrize(("path", "body", "reason"), REFUSED)
def test_a_bad_request_is_one_sentence_and_asks_vllm_nothing(
    setup: Setup, path: str, body: dict[str, Any], reason: str
) -> None:
    async def test() -> None:
        status, answer = await setup.post(body, path)
        assert status == 400 and reason in answer["error"]["message"]
        assert "\n" not in answer["error"]["message"]
        assert not setup.vllm.completions and not setup.vllm.others
        assert setup.counters.failures == {"refused": 1}

    run(test)


def test_what_vllm_refuses_is_passed_on(setup: Setup) -> None:
    async def test() -> None:
        status, answer = await setup.post(QUESTION | {"temperature": "hot"})
        message = answer["error"]["message"]
        assert status == 400 and message.startswith("temperature is no number")
        assert SECRET[:24] not in message and setup.prompt_completions()[0]["cache_salt"][:24] not in message
        status, answer = await setup.post(QUESTION | {"model": "other"})
        message = "The model `other` does not exist."
        error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
        assert (status, answer) == (404, {"error": error})  # as vLLM's own

    run(test)


def test_a_client_without_the_key_learns_nothing(setup: Setup) -> None:
    async def test() -> None:
        setup.vllm.api_key = "key"
        assert await setup.post(QUESTION) == (401, {"error": "Unauthorized"})
        assert await setup.post(QUESTION | {"mode": 3}) == (401, {"error": "Unauthorized"})
        status, _ = await setup.post(QUESTION, headers={"Authorization": "Bearer key", "X-Request-Id": "7"})
        assert status == 200

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_an_evicted_block_is_computed_again(setup: Setup, stream: bool) -> None:
    """It is evicted after the front end has found it, and before the connector loads it."""

    async def test() -> None:
        await setup.post(QUESTION)
        evicted = next(iter(setup.vllm.blocks))

        def evict(vllm: FakeVllm) -> None:
            vllm.evict = lambda vllm: None
            setup.evict(evicted)

        setup.vllm.evict = evict
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        status, answer = await setup.post(QUESTION | options)
        assert status == 200
        usage = json.loads(answer[-2])["usage"] if stream else answer["usage"]
        assert usage["block_attention"]["sources"] == {"host": 4, "computed": 1}
        assert setup.counters.failures == {"missing": 1}

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_blocks_are_always_evicted_fails_alone(setup: Setup, stream: bool) -> None:
    async def test() -> None:
        setup.vllm.evict = lambda vllm: vllm.blocks.clear()
        status, answer = await setup.post(QUESTION | {"stream": stream})
        assert status == 500 and "5 of its blocks were evicted while it waited" in answer["error"]["message"]
        assert len(setup.prompt_completions()) == MAX_ATTEMPTS
        setup.vllm.evict = lambda vllm: None
        assert (await setup.post(QUESTION))[0] == 200

    run(test)


LATE = [Report(sources=["host"] * 5), Report(missing=[1, 3])]
"""Another worker, or a load after a preemption, lacks two blocks."""


def test_a_block_that_is_missing_after_the_first_report_is_computed_again(setup: Setup) -> None:
    async def test() -> None:
        await setup.post(QUESTION)
        setup.vllm.late_reports = [*LATE]
        status, answer = await setup.post(QUESTION)
        assert status == 200
        assert answer["usage"]["block_attention"]["sources"] == {"host": 3, "computed": 2}
        assert setup.counters.failures == {"missing": 1}

    run(test)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (LATE[1], "2 of its blocks were evicted while it was answered: ask again"),
        (Report(failure="its blocks could not be loaded: the disk is gone"), "the disk is gone"),
        (Report(), "Internal server error"),
    ],
)
def test_an_answer_that_fails_after_its_first_part_ends_with_the_reason(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, report: Report, reason: str
) -> None:
    """What was sent cannot be repeated."""
    if not report.is_failure:
        monkeypatch.setattr("blockft.serving.front_end.FAILURE_TIMEOUT_S", 0.05)

    async def test() -> None:
        setup.vllm.late_reports = [report]
        status, events = await setup.post(QUESTION | {"stream": True})
        assert status == 200 and reason in json.loads(events[-2])["error"]["message"]
        assert json.loads(events[1])["choices"][0]["delta"]["content"] == "be" and events[-1] == b"[DONE]"
        assert not setup.counters.answers and setup.counters.failures == {"failed": 1}

    run(test)


@pytest.mark.parametrize("mode", ["block", "full"])
def test_an_answer_that_vllm_aborts_is_no_answer(setup: Setup, mode: str) -> None:
    """While it ends, vLLM gives the tokens that it has, with status 200."""

    async def test() -> None:
        setup.vllm.is_ending = True
        for options in ({}, {"stream": True}):
            status, answer = await setup.post(QUESTION | {"mode": mode} | options)
            assert status == 500 and f"the request failed: {ABORTED}" in answer["error"]["message"]
        usage = {"stream_options": {"include_usage": True}}
        _, events = await setup.post(QUESTION | {"mode": mode, "stream": True, "min_tokens": 1} | usage)
        assert [json.loads(event).get("error", {}).get("message") for event in events[2:-1]] == [ABORTED]
        assert not setup.counters.answers and setup.counters.failures == {"failed": 3}

    run(test)


def vllm_app(limit: int | None = None, shutdown_timeout: int = 0) -> Any:
    """Return what a request knows of vLLM's application."""
    server = SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=limit))
    engine_client = SimpleNamespace(vllm_config=SimpleNamespace(shutdown_timeout=shutdown_timeout))
    return SimpleNamespace(state=SimpleNamespace(server=server, engine_client=engine_client))


async def ask_health(setup: Setup, app: Any) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/health", "headers": [], "app": app}
    await setup.app(scope, receive, send)


def test_the_engine_has_time_to_write_its_blocks_when_it_ends(setup: Setup) -> None:
    """vLLM would kill it at once. A time that the user has set stays."""

    async def test() -> None:
        for set_by_user, expected in ((0, ENGINE_END_S), (7, 7)):
            app = vllm_app(shutdown_timeout=set_by_user)
            await ask_health(setup, app)
            assert app.state.engine_client.vllm_config.shutdown_timeout == expected

    run(test)
    assert ENGINE_END_S + END_TIMEOUT_S < launch.STOP_TIMEOUT_S


def test_requests_that_the_engine_has_lost_do_not_keep_the_server(setup: Setup) -> None:
    """uvicorn cancels them. A limit of vLLM itself, and an application that has ended, stay as they are."""

    async def test() -> None:
        for limit, expected in ((None, END_TIMEOUT_S), (3, 3)):
            app = vllm_app(limit=limit)
            await ask_health(setup, app)
            assert app.state.server.config.timeout_graceful_shutdown == expected
        await ask_health(setup, SimpleNamespace())

    run(test)


def test_a_failure_in_full_mode_waits_for_no_report(setup: Setup) -> None:
    async def test() -> None:
        setup.vllm.full_mode_failure = "the engine is dead"
        async with asyncio.timeout(front_end.REPORT_TIMEOUT_S / 2):
            status, answer = await setup.post(QUESTION | {"mode": "full"})
        assert status == 500 and "the engine is dead" in answer["error"]["message"]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_is_sent_before_the_connector_has_reported(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """vLLM would give full attention without a word if it did not ask the connector."""
    for limit in ("REPORT_TIMEOUT_S", "FAILURE_TIMEOUT_S"):
        monkeypatch.setattr(f"blockft.serving.front_end.{limit}", 0.05)
    setup.vllm.is_full_attention = True

    async def test() -> None:
        status, answer = await setup.post(QUESTION | {"stream": stream})
        assert status == 500 and "has not reported" in answer["error"]["message"]
        assert not setup.counters.answers and setup.counters.failures == {"failed": 1}
        assert (await setup.post(QUESTION | {"mode": "full"}))[0] == 200

    run(test)


def test_a_failure_has_the_reason_of_the_connector(setup: Setup) -> None:
    async def test() -> None:
        setup.vllm.load_failure = "its blocks could not be loaded: the disk is gone"
        status, answer = await setup.post(QUESTION)
        assert status == 500 and "the disk is gone" in answer["error"]["message"]
        assert setup.counters.failures == {"failed": 1}

    run(test)


def test_a_block_that_cannot_be_stored_refuses_its_requests(setup: Setup) -> None:
    async def test() -> None:
        setup.vllm.store_failure = "values that are not finite"
        status, answer = await setup.post(QUESTION)
        assert status == 400 and "not finite" in answer["error"]["message"]
        setup.vllm.store_failure = ""
        assert (await setup.post(QUESTION))[0] == 200

    run(test)


def test_vllm_lists_its_models_once_for_each_client(setup: Setup) -> None:
    """Every request with another key is refused by vLLM itself."""
    setup.vllm.api_key = "key"

    async def test() -> None:
        for key, status in (("key", 200), ("guess", 401), ("key", 200), ("guess", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await setup.post(QUESTION, headers=headers))[0] == status
        assert setup.vllm.num_listed == 1

    run(test)


def test_the_missing_blocks_of_a_prompt_are_one_request(setup: Setup) -> None:
    """vLLM computes them in one step, if they fit there."""

    async def test() -> None:
        assert (await setup.post(QUESTION))[0] == 200
        encoded, asked = setup.vllm.completions
        assert len(encoded["prompt"]) == 5
        assert sum(encoded["prompt"], []) == asked["prompt"][: sum(map(len, encoded["prompt"]))]

    run(test)


def test_a_request_has_as_many_blocks_as_vllm_takes_prompts(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MAX_COMPLETION_PROMPTS", "2")

    async def test() -> None:
        assert (await setup.post(QUESTION))[0] == 200
        *encoded, _ = setup.vllm.completions
        assert sorted(len(body["prompt"]) for body in encoded) == [1, 2, 2]

    run(test)


def test_computed_blocks_need_no_folder(setup: Setup) -> None:
    """The folder gets a block later than memory has it, or cannot be written."""

    async def test() -> None:
        setup.vllm.on_store = lambda key: None
        for sources in ({"computed": 5}, {"host": 5}):
            status, answer = await setup.post(QUESTION)
            assert status == 200 and answer["usage"]["block_attention"]["sources"] == sources
        assert setup.counters.num_encoded == 5

    run(test)


def test_a_block_is_looked_for_in_the_folder_again_after_a_time(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockft.serving.missing_blocks.KNOWN_S", 0)

    async def test() -> None:
        await setup.post(QUESTION)
        for key in [*setup.vllm.blocks]:
            setup.evict(key)
        assert (await setup.post(QUESTION))[0] == 200
        assert setup.counters.num_encoded == 10 and not setup.counters.failures

    run(test)


def test_a_block_that_was_found_in_the_folder_counts_as_there_for_a_time(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is evicted meanwhile, the request that needs it computes it again."""
    looked_for = list[BlockKey]()

    def find_missing(computer: BlockComputer, keys: Iterable[BlockKey]) -> set[BlockKey]:
        looked_for.extend(keys)
        return original(computer, keys)

    original = BlockComputer._find_missing
    monkeypatch.setattr(BlockComputer, "_find_missing", find_missing)

    async def test() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("blockft.serving.missing_blocks.KNOWN_S", 0)
            await setup.post(QUESTION)
        for _ in range(2):
            assert (await setup.post(QUESTION))[0] == 200
        assert len(looked_for) == 10 and {*looked_for} == {*setup.vllm.blocks}
        for key in [*setup.vllm.blocks]:
            setup.evict(key)
        status, answer = await setup.post(QUESTION)
        assert status == 200 and answer["usage"]["block_attention"]["sources"] == {"computed": 5}
        assert setup.counters.num_encoded == 10 and setup.counters.failures == {"missing": 1}

    run(test)


def test_one_block_that_cannot_be_stored_refuses_its_requests_alone(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request waits for another block of the same computation."""
    monkeypatch.setattr("blockft.serving.missing_blocks.KNOWN_S", 0)

    async def test() -> None:
        await setup.post({"blocks": ["Cows moo.", "a"]}, COMPLETIONS)
        (bad,) = setup.vllm.blocks
        setup.evict(bad)
        setup.vllm.store_failure, setup.vllm.fails_to_store = "not finite", lambda key: key == bad
        prompts = [["Dogs.", "Cows moo.", "a"], ["Dogs.", "a"]]
        answers = await asyncio.gather(*(setup.post({"blocks": p}, COMPLETIONS) for p in prompts))
        assert [status for status, _ in answers] == [400, 200]
        assert setup.counters.num_encoded == 2

    run(test)


def test_requests_at_the_same_time_compute_a_block_once(setup: Setup) -> None:
    async def test() -> None:
        answers = await asyncio.gather(*(setup.post(QUESTION) for _ in range(8)))
        assert {status for status, _ in answers} == {200}
        assert setup.counters.num_encoded == 5

    run(test)


def test_a_block_that_is_computed_during_a_slow_look_up_is_not_computed_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder lacked the block when it was looked for."""
    find_missing, is_computed, numbers = BlockComputer._find_missing, threading.Event(), itertools.count()

    def find_slowly(self: BlockComputer, keys: Any) -> set[BlockKey]:
        found = find_missing(self, keys)
        assert next(numbers) == 0 or is_computed.wait(600)
        return found

    monkeypatch.setattr(BlockComputer, "_find_missing", find_slowly)

    async def test() -> None:
        tasks = {asyncio.create_task(setup.post(QUESTION)) for _ in range(2)}
        (first,), (second,) = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        is_computed.set()
        sources = [answer["usage"]["block_attention"]["sources"] for _, answer in (await first, await second)]
        assert sources == [{"computed": 5}, {"host": 5}] and setup.counters.num_encoded == 5

    run(test)


def test_a_client_that_leaves_is_told_to_vllm(setup: Setup) -> None:
    async def test() -> None:
        body = {"blocks": ["Dogs bark.", LEAVE]}
        assert await setup.post(body, COMPLETIONS, is_gone=True) == (0, None)
        assert setup.vllm.saw_disconnect

    run(test)


def test_a_stream_of_a_chat(setup: Setup) -> None:
    async def test() -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        status, events = await setup.post(CHAT_BLOCKS | options)
        assert status == 200 and events[-1] == b"[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in deltas) == "below\n\n"
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["usage"]["block_attention"]["sources"] == {"computed": 3}

    run(test)


def test_a_stream_of_a_completion_counts_without_usage(setup: Setup) -> None:
    async def test() -> None:
        _, events = await setup.post(QUESTION | {"stream": True}, COMPLETIONS)
        chunks = [json.loads(event) for event in events[:-1]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "below\n\n"
        assert setup.counters.answers == [("block", {"computed": 5})]

    run(test)


def test_log_probabilities_of_a_chat(setup: Setup) -> None:
    async def test() -> None:
        _, answer = await setup.post(QUESTION | {"logprobs": True, "top_logprobs": 2})
        (token,) = answer["choices"][0]["logprobs"]["content"]
        assert (token["token"], token["logprob"], token["bytes"]) == ("be", -0.5, [98, 101])
        assert [top["token"] for top in token["top_logprobs"]] == ["be", "a"]
        assert setup.prompt_completions()[0]["logprobs"] == 2

    run(test)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"documents": DOCUMENTS, "messages": [{"role": "user", "content": "Who barks?"}]}),
        (CHAT, QUESTION | {"messages": []}),
        (COMPLETIONS, {"documents": DOCUMENTS, "prompt": "Who barks?"}),
        (COMPLETIONS, QUESTION | {"prompt": ""}),
        (COMPLETIONS, QUESTION | {"question": "Who barks?", "prompt": None}),
    ],
)
def test_the_question_may_be_where_the_client_of_openai_puts_it(
    setup: Setup, path: str, body: dict[str, Any]
) -> None:
    async def test() -> None:
        await setup.post(QUESTION, COMPLETIONS)
        assert (await setup.post(body, path))[0] == 200
        first, second = setup.prompt_completions()
        assert first["prompt"] == second["prompt"]

    run(test)


def test_a_chat_may_use_all_tokens_that_are_left(setup: Setup) -> None:
    async def test() -> None:
        await setup.post(QUESTION)
        (body,) = setup.prompt_completions()
        assert body["max_tokens"] + len(body["prompt"]) == MAX_LEN

    run(test)


def test_a_large_body_is_refused(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockft.serving.front_end.MAX_BODY_BYTES", 1 << 20)

    async def test() -> None:
        assert (await setup.post({"documents": ["a" * (1 << 20)], "question": "?"}))[0] == 413

    run(test)
