"""The scheduler's half: which tokens are cached, what is loaded and saved, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockft.inference.block_key import block_key
from blockft.serving import block_sets
from blockft.serving.block_request import EncodeRequest, ReplyAddress, block_params
from blockft.serving.scheduler_half import PrefixHit, SchedulerHalf
from tests.serving.stubs import (
    NOWHERE,
    PAGE_LEN,
    SECRET,
    SHAPE,
    FakePool,
    block_request,
    make_request,
    make_served,
    step,
)

PROMPT = list(range(100, 120))
LENGTHS = (5, 4, 6)


@pytest.fixture
def half(tmp_path: Path) -> SchedulerHalf:
    return open_half(tmp_path)


@pytest.fixture
def device_half(tmp_path: Path) -> SchedulerHalf:
    """The device tier has place for one prompt."""
    return open_half(tmp_path, device_bytes=16 * SHAPE.token_bytes)


def open_half(
    folder: Path, num_workers: int = 1, pool: FakePool | None = None, **changes: Any
) -> SchedulerHalf:
    half = SchedulerHalf(make_served(folder, **changes), PAGE_LEN, num_workers)
    half.use_pool(pool or FakePool())
    return half


def start_in_step(half: SchedulerHalf, id: str, pages: list[int], final: int = 0, **changes: Any) -> Any:
    """Plan a request whose blocks are on the device, and return it."""
    request = block_request(id, [*PROMPT, final], LENGTHS, **changes)
    half.add_request(request)
    half._on_device.use(half._keys_of(request, half._requests[id]))
    assert half.num_cached_tokens(request, 0) == (15, False)
    half.allocate(request, pages, 15)
    (load,) = half.plan_step(step({id: 6}, new={id: pages})).loads
    assert load.in_step
    return request


def encode_request(
    id: str, prompt: list[int], first_len: int = 0, num_blocks: int = 1, reply_to: ReplyAddress = NOWHERE
) -> Any:
    encode = EncodeRequest(first_len=first_len, num_blocks=num_blocks, reply_to=reply_to)
    return make_request(id, prompt, block_params(SECRET, encode))


READY, WAITS = (0, False), (None, False)


def test_blocks_that_are_computed_together_wait_for_each_other(half: SchedulerHalf) -> None:
    """They reach the scheduler one after the other. The first one would have a step of its own."""
    ours = [encode_request(f"a{index}", PROMPT[index:], num_blocks=3) for index in range(3)]
    other = encode_request("b", PROMPT, num_blocks=2, reply_to=ReplyAddress(socket="s", id="2"))
    alone = encode_request("c", PROMPT, reply_to=ReplyAddress(socket="s", id="3"))
    for request in (ours[0], other, alone, ours[1]):
        half.add_request(request)
        assert half.num_cached_tokens(request, 0) == (READY if request is alone else WAITS)
    half.add_request(ours[2])
    assert [half.num_cached_tokens(request, 0) for request in (*ours, other)] == [READY] * 3 + [WAITS]
    half.finish(ours[0], [])
    assert half.num_cached_tokens(ours[1], 0) == READY, "also after a preemption"


def test_blocks_do_not_wait_for_a_block_whose_client_has_left(half: SchedulerHalf) -> None:
    first, second = (encode_request(id, PROMPT, num_blocks=3) for id in "ab")
    half.add_request(first)
    half.add_request(second)
    half.finish(first, [])
    assert half.num_cached_tokens(second, 0) == READY
    half.finish(second, [])
    assert not half._sets._arriving


def test_blocks_wait_a_short_time_for_a_block_that_does_not_arrive(
    half: SchedulerHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(block_sets, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    requests = [encode_request(id, PROMPT, num_blocks=4) for id in "abc"]
    for request in requests[:2]:
        half.add_request(request)
        clock[0] += 0.9 * block_sets.ARRIVAL_S
        assert half.num_cached_tokens(requests[0], 0) == WAITS, "the last one has just arrived"
    clock[0] += 0.2 * block_sets.ARRIVAL_S
    assert [half.num_cached_tokens(request, 0) for request in requests[:2]] == [READY] * 2
    half.add_request(requests[2])
    assert half.num_cached_tokens(requests[2], 0) == WAITS
    for request in requests:
        half.finish(request, [])
    assert not half._sets._arriving


@pytest.mark.parametrize(("num_computed", "expected"), [(0, (15, True)), (8, (7, True)), (16, (0, False))])
def test_all_local_blocks_are_cached(
    half: SchedulerHalf, num_computed: int, expected: tuple[int, bool]
) -> None:
    request = block_request("a", PROMPT, LENGTHS)
    half.add_request(request)
    assert half.num_cached_tokens(request, num_computed) == expected


def test_a_load_names_the_blocks_and_the_tokens_that_are_missing(half: SchedulerHalf) -> None:
    request = block_request("a", PROMPT, LENGTHS)
    half.add_request(request)
    half.allocate(request, [7, 3, 9, 1], 7)
    plan = half.plan_step(step())
    (load,) = plan.loads
    assert (load.request_id, load.pages, load.start, load.refusal) == ("a", [7, 3, 9, 1], 8, "")
    assert load.keys == [block_key(PROMPT[:5]), block_key(PROMPT[5:9]), block_key(PROMPT[9:15])]
    assert plan.is_idle
    assert not half.plan_step(step({"a": 5})).loads, "a load is planned once"


def test_a_prompt_whose_blocks_are_in_the_prefix_cache_is_reported_in_its_step(half: SchedulerHalf) -> None:
    request = block_request("a", PROMPT, LENGTHS)
    half.add_request(request)
    assert half.num_cached_tokens(request, 16) == (0, False)
    half.allocate(request, [7, 3, 9, 1, 2], 0)
    plan = half.plan_step(step({"a": 4}, new={"a": [7, 3, 9, 1, 2]}))
    assert plan.prefix_hits == [PrefixHit(num_blocks=3, reply_to=half._requests["a"].reply_to)]
    assert not plan.loads and not half.plan_step(step({"a": 1})).prefix_hits


def test_a_request_whose_blocks_are_on_the_device_does_not_wait(tmp_path: Path) -> None:
    half = open_half(tmp_path, device_bytes=16 * SHAPE.token_bytes)
    first, second = (block_request(id, PROMPT, LENGTHS) for id in "ab")
    half.add_request(first)
    assert half.num_cached_tokens(first, 0) == (15, True)
    half.allocate(first, [7, 3, 9, 1], 15)
    assert [load.in_step for load in half.plan_step(step()).loads] == [False]
    half.add_request(second)
    assert half.num_cached_tokens(second, 0) == (15, True), "the first load runs"
    half.end_loads({"a"}, set())
    assert half.num_cached_tokens(second, 4) == (11, False)
    half.allocate(second, [2, 4, 6, 8], 11)
    (load,) = half.plan_step(step({"b": 5}, new={"b": [2, 4, 6, 8]})).loads
    assert load.in_step and load.start == 4


def test_blocks_of_a_load_that_failed_are_not_on_the_device(tmp_path: Path) -> None:
    half = open_half(tmp_path, device_bytes=16 * SHAPE.token_bytes)
    request = block_request("a", PROMPT, LENGTHS)
    half.add_request(request)
    for finished, bad_pages in (({"a"}, {9}), ({"b"}, {2}), (set(), set())):
        half.num_cached_tokens(request, 0)
        half.allocate(request, [7, 3, 9, 1], 15)
        half.end_loads(finished, bad_pages)
        assert half.num_cached_tokens(request, 0) == (15, True)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_blocks_that_were_computed_just_now_are_on_the_device(tmp_path: Path, num_workers: int) -> None:
    """Of several workers, all but one read them in the folder."""
    half = open_half(tmp_path, num_workers)
    request = block_request("a", PROMPT, LENGTHS)
    half.add_request(request)
    for start, end in ((0, 5), (5, 9), (9, 15)):
        assert half.num_cached_tokens(request, 0) == (15, True)
        encode = encode_request(f"e{start}", PROMPT[start:end])
        half.add_request(encode)
        half.plan_step(step({encode.request_id: end - start}, new={encode.request_id: [4, 8]}))
    assert half.num_cached_tokens(request, 0) == (15, num_workers > 1)


def test_a_request_waits_if_its_blocks_were_evicted_while_it_waited_for_pages(tmp_path: Path) -> None:
    half = open_half(tmp_path, device_bytes=15 * SHAPE.token_bytes)
    request, other = block_request("a", PROMPT, LENGTHS), block_request("b", PROMPT[::-1], LENGTHS)
    for one in (request, other):
        half.add_request(one)
        half.num_cached_tokens(one, 0)
        half.allocate(one, [7, 3, 9, 1], 15)
        half.end_loads({one.request_id}, set())
        assert half.num_cached_tokens(one, 0) == (15, False)
    assert half.num_cached_tokens(request, 0) == (15, True)
    half.plan_step(step())
    half.allocate(request, [7, 3, 9, 1], 15)
    assert not half.plan_step(step()).loads[0].in_step


def test_pages_of_a_load_in_a_step_are_shared_after_its_result_alone(device_half: SchedulerHalf) -> None:
    """vLLM's prefix cache has them at once, and other prompts would be computed over them."""
    half = device_half
    half.add_request(other := block_request("b", [*PROMPT, 8], LENGTHS))
    half.add_request(another := block_request("c", [*PROMPT[::-1], 8], LENGTHS))
    half.add_request(full := make_request("d", PROMPT, None))
    start_in_step(half, "a", [7, 3, 9, 1, 2, 6])
    assert half.num_cached_tokens(other, 16) == (None, False)
    assert half.num_cached_tokens(other, 4) == (None, False), "the first page of the load is enough"
    assert half.num_cached_tokens(other, 0) == (15, False), "it uses pages of its own"
    assert half.num_cached_tokens(another, 8) == (7, True), "its pages are others"
    assert half.num_cached_tokens(full, 4) == (0, False)
    half.plan_step(step())
    assert half.num_cached_tokens(other, 16) == (0, False)


def test_a_request_that_shares_older_pages_alone_does_not_wait(device_half: SchedulerHalf) -> None:
    """Such as those of an instruction, which is the first block of many prompts."""
    half, lengths = device_half, (4, 11)
    first, second = (
        block_request(id, [*PROMPT[:4], *range(n, n + 20)], lengths) for id, n in (("a", 1), ("b", 2))
    )
    for request in (first, second):
        half.add_request(request)
        half._on_device.use(half._keys_of(request, half._requests[request.request_id])[:1])
    half._on_device.use(half._keys_of(first, half._requests["a"]))
    assert half.num_cached_tokens(first, 4) == (11, False)
    half.allocate(first, [7, 3, 9, 1, 2, 6], 11)
    assert half.num_cached_tokens(second, 4) == (11, True)


@pytest.mark.parametrize(("num_output", "evicted"), [(0, {9, 1, 2, 6, 5}), (1, set())])
def test_pages_of_a_request_that_ends_before_its_first_token_are_evicted(
    tmp_path: Path, num_output: int, evicted: set[int]
) -> None:
    """Such as one whose client has left: vLLM evicts the pages of running requests alone."""
    half = open_half(tmp_path, pool=(pool := FakePool()), device_bytes=16 * SHAPE.token_bytes)
    request = block_request("a", PROMPT, LENGTHS)
    half.add_request(request)
    half._on_device.use(half._keys_of(request, half._requests["a"]))
    assert half.num_cached_tokens(request, 8) == (7, False)
    half.allocate(request, [7, 3, 9, 1, 2], 7)
    half.plan_step(step({"a": 5}, new={"a": [7, 3, 9, 1, 2]}))
    request.num_output_tokens = num_output
    half.finish(request, [7, 3, 9, 1, 2, 6, 5])
    assert pool.evicted == evicted


def test_a_request_that_is_preempted_before_its_load_fails_fails_too(tmp_path: Path) -> None:
    """vLLM fails running requests alone, and gives out the token that it has computed over bad pages."""
    half = open_half(tmp_path, pool=(pool := FakePool()), device_bytes=16 * SHAPE.token_bytes)
    request = start_in_step(half, "a", [7, 3, 9, 1, 2, 6])
    half.plan_step(step())
    half.end_loads((), {9, 1, 2, 6})
    assert pool.evicted == {9, 1, 2, 6}
    request.num_preemptions = 1
    num_external, is_async = half.num_cached_tokens(request, 0)
    assert (num_external, is_async) == (20, True)
    half.allocate(request, [4, 5, 8, 10, 11, 12], 20)
    (load,) = half.plan_step(step()).loads
    assert "before it was preempted" in load.refusal and not load.in_step


def test_a_load_fails_its_own_request_alone(device_half: SchedulerHalf) -> None:
    """Later loads may write pages that an ended or preempted request has had before."""
    half = device_half
    request = start_in_step(half, "a", [7, 3, 9, 1, 2, 6])
    for _ in range(2):
        half.plan_step(step())
    half.end_loads((), {9})
    assert half.num_cached_tokens(request, 0) == (15, False)


def test_a_preempted_request_waits_for_its_load(device_half: SchedulerHalf) -> None:
    """If it were preempted again, a token that is computed over bad pages would be given out."""
    request = start_in_step(device_half, "a", [7, 3, 9, 1, 2, 6])
    request.num_preemptions = 1
    assert device_half.num_cached_tokens(request, 0) == (15, True)


def test_requests_wait_for_their_loads_without_the_pages_of_vllm(tmp_path: Path) -> None:
    """They are evicted if a load fails."""
    half = SchedulerHalf(make_served(tmp_path, device_bytes=16 * SHAPE.token_bytes), PAGE_LEN)
    request = block_request("a", PROMPT, LENGTHS)
    half.add_request(request)
    half._on_device.use(half._keys_of(request, half._requests["a"]))
    assert half.num_cached_tokens(request, 0) == (15, True)


def test_blocks_that_a_worker_has_evicted_are_not_on_the_device(device_half: SchedulerHalf) -> None:
    half = device_half
    request = start_in_step(half, "a", [7, 3, 9, 1, 2, 6])
    half.plan_step(step())
    half.end_loads((), (), {block_key(PROMPT[5:9])})
    assert half.num_cached_tokens(request, 0) == (15, True)
    assert half.num_cached_tokens(request, 9) == (6, False)


def test_blocks_that_see_the_first_block_are_loaded_and_saved_with_it(tmp_path: Path) -> None:
    half = open_half(tmp_path, local_sees_first=True)
    request, encode = block_request("a", PROMPT, LENGTHS), encode_request("e", PROMPT[:9], first_len=5)
    half.add_request(request)
    half.allocate(request, [7, 3, 9, 1], 15)
    half.add_request(encode)
    plan = half.plan_step(step({"e": 9}, new={"e": [4, 8, 2]}))
    first, document = block_key(PROMPT[:5]), block_key(PROMPT[5:9], PROMPT[:5])
    assert plan.loads[0].keys == [first, document, block_key(PROMPT[9:15], PROMPT[:5])]
    assert [(save.key, save.pages) for save in plan.saves] == [(document, [4, 8, 2])]


def test_a_preempted_request_is_loaded_again(half: SchedulerHalf) -> None:
    request = block_request("a", PROMPT, LENGTHS)
    half.add_request(request)
    for pages in ([7, 3, 9, 1], [2, 4, 6, 8]):
        assert half.num_cached_tokens(request, 0) == (15, True)
        half.allocate(request, pages, 15)
        assert half.plan_step(step()).loads[0].pages == pages
        half.allocate(request, [*pages, 5], 0)  # when its tokens are scheduled
        assert not half.plan_step(step({"a": 5})).loads


@pytest.mark.parametrize("params", [None, {}, "text", ["list"], {"blocks": [3]}, {"do_remote_prefill": True}])
def test_a_request_of_others_is_full_attention(half: SchedulerHalf, params: Any) -> None:
    """Its parameters are removed, because vLLM itself fails on parameters that are no object."""
    request = make_request("a", PROMPT, params)
    half.add_request(request)
    assert request.kv_transfer_params is None
    assert half.num_cached_tokens(request, 0) == (0, False)
    half.allocate(request, [1, 2], 0)
    plan = half.plan_step(step({"a": 20}, new={"a": [1, 2]}))
    assert not plan.loads and not plan.saves and not plan.is_idle


REFUSED: dict[str, dict[str, Any]] = {
    "final block": {"prompt": PROMPT[:15]},
    "no token": {"lengths": (5, 0, 6)},
    "cache salt": {"salt": "another"},
    "adapter": {"lora_request": object()},
    "prompt_logprobs": {"sampling_params": SimpleNamespace(prompt_logprobs=1)},
    "embeddings": {"prompt_token_ids": None},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_request_that_would_be_full_attention_fails_while_it_is_loaded(
    half: SchedulerHalf, reason: str
) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "lengths": LENGTHS}
    request = block_request("a", **fields | REFUSED[reason])
    half.add_request(request)
    num_external, is_async = half.num_cached_tokens(request, 4)
    assert num_external is not None and num_external == request.num_prompt_tokens - 5 and is_async
    half.allocate(request, [7, 3, 9, 1], num_external)
    (load,) = half.plan_step(step()).loads
    assert reason in load.refusal and load.start == 4


def test_a_refused_request_that_cannot_fail_waits(half: SchedulerHalf) -> None:
    request = block_request("a", [1], (3,))
    half.add_request(request)
    assert half.num_cached_tokens(request, 0) == (None, False)


def test_prompt_logprobs_do_not_make_vllm_drop_the_blocks(half: SchedulerHalf) -> None:
    """vLLM would ask for no cached token, and compute the prompt with full attention."""
    request = block_request("a", PROMPT, LENGTHS, skip_reading_prefix_cache=True)
    half.add_request(request)
    assert request.skip_reading_prefix_cache is False


def test_a_block_is_saved_when_its_last_token_is_computed(half: SchedulerHalf) -> None:
    request = encode_request("e", PROMPT[:10])
    half.add_request(request)
    assert half.num_cached_tokens(request, 0) == (0, False)
    half.allocate(request, [4], 0)
    assert not half.plan_step(step({"e": 4}, new={"e": [4]})).saves
    request.num_computed_tokens = 4
    assert not half.plan_step(step({"e": 4}, more={"e": [8]})).saves
    request.num_computed_tokens = 8
    (save,) = half.plan_step(step({"e": 2}, more={"e": [2]})).saves
    assert (save.key, save.pages) == (block_key(PROMPT[:10]), [4, 8, 2])
    request.num_computed_tokens = 10
    assert not half.plan_step(step({"e": 1}, more={"e": []})).saves


def test_a_preempted_block_is_saved_from_its_new_pages(half: SchedulerHalf) -> None:
    request = encode_request("e", PROMPT[:10])
    half.add_request(request)
    half.plan_step(step({"e": 4}, new={"e": [4]}))
    half.plan_step(step())
    (save,) = half.plan_step(step({"e": 10}, resumed={"e": [9, 7, 5]})).saves
    assert save.pages == [9, 7, 5]


def test_a_finished_request_is_forgotten(half: SchedulerHalf) -> None:
    for request in (block_request("a", PROMPT, LENGTHS), encode_request("e", PROMPT[:10])):
        half.add_request(request)
        half.plan_step(step({"e": 4}, new={"e": [4]}))
        half.finish(request, [])
        assert half.num_cached_tokens(request, 0) == (0, False)
        assert not half.plan_step(step({"e": 10}, more={"e": [5]})).saves
