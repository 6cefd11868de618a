"""Rotated queries on a GPU: Triton kernels, CUDA graphs and asynchronous copies change no answer."""

import gc
import random
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from blockft.inference.engine import Engine
from blockft.inference.rotate_keys import prefill_blocks
from blockft.inference.rotate_queries import QueryRotationRunner
from blockft.inference.runner import CacheOptions, Rotate
from tests.inference.engines import ROTATE, Prompt, keep_only_disk, load_engine, make_engine, options
from tests.inference.test_rotate_keys import keys_of, split_ids
from tests.tiny import CONFIGS, build_model, random_ids, random_layout

pytestmark = pytest.mark.gpu

NUM_NEW = 12


def random_prompts(rng: random.Random, *shapes: tuple[int, int]) -> list[Prompt]:
    return [
        split_ids(random_ids(rng, length), random_layout(rng, length, num_blocks))
        for length, num_blocks in shapes
    ]


def on_gpu(path: Path, rotate: Rotate, cache: CacheOptions | None = None) -> Engine:
    engine = Engine.load(
        str(path), device="cuda", dtype=torch.float32, cache=cache or options(device=2**24), rotate=rotate
    )
    engine.eos_token_ids = set()
    return engine


@pytest.mark.parametrize("name", CONFIGS)
def test_rotated_queries_answer_as_rotated_keys(name: str) -> None:
    model = build_model(name, "block_cached").cuda()
    prompts = random_prompts(random.Random(name), (60, 5), (24, 1), (90, 50), (700, 3))
    rotated_keys, rotated_queries = (make_engine(model, rotate) for rotate in ROTATE)
    rotated_keys.eos_token_ids = rotated_queries.eos_token_ids = set()
    expected = [answer.ids for answer in rotated_keys.generate_ids(prompts, max_new_tokens=NUM_NEW)]
    for _ in range(2):
        answers = rotated_queries.generate_ids(prompts, max_new_tokens=NUM_NEW)
        assert [answer.ids for answer in answers] == expected


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-partial"])
def test_graphs_change_no_logit(name: str) -> None:
    model = build_model(name, "block_cached").cuda()
    prompts = random_prompts(random.Random(name), (300, 5), (200, 2))
    engine = make_engine(model, "queries")
    keys = [*dict.fromkeys(chain.from_iterable(keys_of(prompts)))]
    tier, rotaries = engine.runner.block_cache.device, engine.runner._rotaries
    assert tier is not None
    with tier.add(keys, keep=()):
        for key, kv in prefill_blocks(model, keys):
            tier.block(key).copy_(kv)
    logits = []
    for use_graphs in (False, True, True):
        query_runner = QueryRotationRunner(model, rotaries, tier, use_triton=True, use_graphs=use_graphs)
        batch = query_runner.start_batch(keys_of(prompts), 200)
        steps = [batch.decode_step([prompt[-1] for prompt in prompts]).clone()]
        steps += [batch.decode_step([[7], [8]]).clone() for _ in range(4)]
        logits.append(torch.cat(steps, dim=1))
    # a graph pads its questions, so its programs may share the context differently
    assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[1], logits[2])


def test_a_graph_is_captured_while_others_are_garbage() -> None:
    """A graph that is destroyed during a capture would end it: garbage is collected before or after."""
    model = build_model("llama", "block_cached").cuda()
    prompts = random_prompts(random.Random(3), (60, 3))
    answers = []
    thresholds = gc.get_threshold()
    gc.set_threshold(1)  # collect at nearly every allocation
    try:
        for _ in range(4):
            engine = make_engine(model, "queries")
            engine.eos_token_ids = set()
            engine.cycle = engine  # type: ignore[attr-defined]  # garbage as soon as the next engine exists
            answers.append(engine.generate_ids(prompts, max_new_tokens=NUM_NEW)[0].ids)
    finally:
        gc.set_threshold(*thresholds)
    assert answers == answers[:1] * 4


def test_blocks_from_every_tier_give_the_same_answers(toy_model: Path, tmp_path: Path) -> None:
    prompts = [*random_prompts(random.Random(1), (800, 20), (300, 3)), [[5] * 1500]]
    expected = [
        answer.ids for answer in on_gpu(toy_model, "keys").generate_ids(prompts, max_new_tokens=NUM_NEW)
    ]
    cache = options(tmp_path / "cache", host=2**24, device=2**24)
    engine = on_gpu(toy_model, "queries", cache)
    assert engine.runner.block_cache.device is not None
    for source in ("computed", "device", "host", "disk", "device"):
        if source == "host":
            engine.runner.block_cache.device.clear()
        elif source == "disk":
            keep_only_disk(engine)
        for prompt, ids in zip(prompts, expected, strict=True):
            (answer,) = engine.generate_ids([prompt], max_new_tokens=NUM_NEW)
            assert answer.ids == ids and set(answer.sources) <= {source}
    cpu_engine = load_engine(toy_model, "keys", cache)
    cpu_engine.eos_token_ids = set()
    assert cpu_engine.generate_ids(prompts[:1], max_new_tokens=1)[0].sources == {"disk": 19}


def test_small_device_and_host_tiers_do_not_change_answers(toy_model: Path) -> None:
    """Blocks move and are evicted while others are copied."""
    rng = random.Random(2)
    token_bytes = 2 * 2 * 2 * 8 * 4
    engine = on_gpu(toy_model, "queries", options(host=500 * token_bytes, device=400 * token_bytes))
    reference = on_gpu(toy_model, "keys")
    blocks = random_prompts(rng, (600, 12))[0]
    for _ in range(25):
        prompt = [*rng.sample(blocks, 4), [rng.randrange(97) for _ in range(10)]]
        (got,), (expected,) = (e.generate_ids([prompt], max_new_tokens=4) for e in (engine, reference))
        assert got.ids == expected.ids
    assert engine.runner.block_cache.device is not None and engine.runner.block_cache.device.num_evicted


@pytest.mark.parametrize("question_len", [40, 260])
def test_long_answers_to_padded_questions(toy_model: Path, question_len: int) -> None:
    """A question of 260 tokens is padded to 512."""
    (prompt,) = random_prompts(random.Random(3), (100, 3))
    prompt[-1] = [i % 97 for i in range(question_len)]
    expected, got = (
        on_gpu(toy_model, rotate).generate_ids([prompt], max_new_tokens=250)[0] for rotate in ROTATE
    )
    assert got.ids == expected.ids


def test_full_attention_without_a_graph_answers_as_with_rotated_keys(toy_model: Path) -> None:
    prompts = random_prompts(random.Random(4), (1600, 4), (300, 2))
    expected, got = (
        on_gpu(toy_model, rotate).generate_ids(prompts, mode="full", max_new_tokens=NUM_NEW)
        for rotate in ROTATE
    )
    assert [answer.ids for answer in got] == [answer.ids for answer in expected]


@pytest.mark.gpu2  # a GPU that is not the current one
def test_an_engine_on_another_gpu_than_the_current_one(toy_model: Path, tmp_path: Path) -> None:
    prompts = random_prompts(random.Random(1), (60, 5), (300, 3))
    expected = on_gpu(toy_model, "keys").generate_ids(prompts, max_new_tokens=NUM_NEW)
    for _ in range(2):
        engine = Engine.load(
            str(toy_model),
            device="cuda:1",
            dtype=torch.float32,
            cache=CacheOptions(folder=tmp_path / "cache", host_bytes=2**24, device_bytes=2**24),
        )
        engine.eos_token_ids = set()
        for _ in range(2):
            answers = engine.generate_ids(prompts, max_new_tokens=NUM_NEW)
            assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
            keep_only_disk(engine)
        assert not engine.runner.block_cache.disk.statistics.entries_damaged
