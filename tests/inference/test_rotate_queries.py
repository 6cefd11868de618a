"""Rotated queries over cached blocks give the logits of the masked forward (without Triton, on the CPU)."""

import random
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedModel

from blockft.attention.cached_context import TILE_PADDING
from blockft.attention.layout import Layout
from blockft.inference import rotate_queries, runner
from blockft.inference.device_tier import DeviceTier
from blockft.inference.rotate_keys import prefill_blocks
from blockft.inference.rotate_queries import QueryRotationRunner
from blockft.inference.runner import kv_shape
from blockft.model.decoder_layers import rotary_embeddings
from tests.inference.engines import ROTATE, Prompt, greedy, make_engine
from tests.inference.test_rotate_keys import keys_of, masked_logits, split_ids
from tests.tiny import CONFIGS, build_model, random_ids, random_layout

WINDOWED = ["gemma3", "mistral-window", "phi3-partial"]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate_queries, "CHUNK_LEN", 20)


def open_runner(
    model: PreTrainedModel, prompts: list[Prompt], *, reencoded: bool = True, use_graphs: bool = False
) -> QueryRotationRunner:
    """Return a runner over a tier that has the blocks of these prompts, in a random order."""
    keys = [*dict.fromkeys(chain.from_iterable(keys_of(prompts)))]
    random.Random(0).shuffle(keys)
    shape = kv_shape(model)
    tier = DeviceTier(shape, torch.device("cpu"), 4096 * shape.token_bytes, TILE_PADDING)
    with tier.add(keys, keep=()):
        for key, kv in prefill_blocks(model, keys):
            tier.block(key).copy_(kv)
    return QueryRotationRunner(
        model, rotary_embeddings(model), tier, use_triton=False, use_graphs=use_graphs, reencoded=reencoded
    )


def final_logits(query_runner: QueryRotationRunner, prompts: list[Prompt]) -> list[torch.Tensor]:
    finals = [prompt[-1] for prompt in prompts]
    longest = max(map(len, finals))
    logits = query_runner.start_batch(keys_of(prompts), longest).decode_step(finals, num_logits=longest)
    return [row[-len(final) :] for row, final in zip(logits, finals, strict=True)]


def check(model: PreTrainedModel, prompts: list[Prompt], *, reencoded: bool = True) -> None:
    got = final_logits(open_runner(model, prompts, reencoded=reencoded), prompts)
    for prompt, logits in zip(prompts, got, strict=True):
        layout = Layout(tuple(map(len, prompt)))
        ids = torch.tensor([*chain.from_iterable(prompt)])
        expected = masked_logits(model, ids, layout, reencoded=reencoded)
        assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reencoded", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_rotated_queries_give_the_logits_of_the_masked_forward(name: str, reencoded: bool) -> None:
    """One batch has prompts with no blocks, fifty blocks, blocks of several chunks, and a repeated block."""
    rng, model = random.Random(name), build_model(name, "block_cached")
    prompts = []
    for length, num_blocks in [(60, 5), (24, 1), (90, 50), (37, 2), (300, 3)]:
        prompts.append(split_ids(random_ids(rng, length), random_layout(rng, length, num_blocks)))
    a, b, c, *_ = prompts[0]
    prompts.append([a, b, a, a, c])
    check(model, prompts, reencoded=reencoded)


@pytest.mark.parametrize("name", ["gemma3", "llama-yarn", "phi3-partial"])
def test_rotated_queries_match_the_masked_forward_up_to_2048_tokens(name: str) -> None:
    rng, model = random.Random(name), build_model(name, "block_cached")
    check(model, [split_ids(random_ids(rng, 2048), random_layout(rng, 2048, 12))])


BLOCKS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(prompts=st.lists(st.tuples(st.lists(BLOCKS, max_size=6), BLOCKS), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_rotated_queries_are_right_for_any_batch_with_shared_blocks(
    prompts: list[tuple[list[list[int]], list[int]]],
) -> None:
    model = build_model("gemma3", "block_cached")
    check(model, [[*context, final] for context, final in prompts])


@pytest.mark.parametrize("name", WINDOWED)
def test_decoding_steps_give_the_logits_of_the_masked_forward(name: str) -> None:
    """For prompts of different lengths, until the first tokens are outside the sliding window."""
    model, layouts = build_model(name, "block_cached"), [Layout((12, 7, 9, 16)), Layout((30, 14))]
    all_ids = [random_ids(random.Random(i), layout.num_tokens) for i, layout in enumerate(layouts)]
    prompts = [split_ids(ids, layout) for ids, layout in zip(all_ids, layouts, strict=True)]
    batch = open_runner(model, prompts).start_batch(keys_of(prompts), 64)
    steps = [batch.decode_step([prompts[0][-1][:4], prompts[1][-1][:2]])]
    for i in range(12):
        steps.append(batch.decode_step([[prompts[0][-1][4 + i]], [prompts[1][-1][2 + i]]]))
    got = torch.cat(steps, dim=1)
    for row, start, ids, layout in zip(got, (3, 1), all_ids, layouts, strict=True):
        assert_close(row, masked_logits(model, ids, layout)[start : start + 13], rtol=1e-5, atol=1e-5)


def test_questions_padded_to_the_size_of_a_graph_leave_room_for_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """257 tokens are padded to 512. With 140 more tokens they need more columns than without padding."""
    monkeypatch.setattr(rotate_queries, "MAX_GRAPH_TOKENS", 0)
    model, layout = build_model("llama", "block_cached"), Layout((30, 397))
    ids = random_ids(random.Random(5), layout.num_tokens)
    prompt = split_ids(ids, layout)
    batch = open_runner(model, [prompt], use_graphs=True).start_batch(keys_of([prompt]), 397)
    first = batch.decode_step([prompt[-1][:257]])
    rest = batch.decode_step([prompt[-1][257:]], num_logits=140)
    expected = masked_logits(model, ids, layout)[256:]
    assert_close(torch.cat((first, rest), dim=1)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_cache_and_the_final_blocks_are_padded_for_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rotate_queries, runner):
        monkeypatch.setattr(module, "TILE_PADDING", 777)
    engine = make_engine(build_model("llama", "block_cached"), "queries")
    query_runner, tier = engine.runner._query_runner, engine.runner.block_cache.device
    assert query_runner is not None and tier is not None and tier.cache_LS2KD.shape[1] == tier.num_slots + 777
    batch = query_runner.start_batch([[]], 300)
    batch.decode_step([[1, 2, 3]])
    assert batch.inputs and batch.inputs.final_LBS2KD.shape[2] >= 300 + 777


@pytest.mark.parametrize("name", CONFIGS)
def test_both_attention_paths_answer_as_the_masked_forward(name: str) -> None:
    rng, model = random.Random(name), build_model(name, "block_cached")
    prompts = [
        split_ids(random_ids(rng, length), random_layout(rng, length, num_blocks))
        for length, num_blocks in [(50, 4), (11, 1), (70, 30)]
    ]
    model.generation_config.eos_token_id = None  # no answer ends early
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    for rotate in ROTATE:
        answers = make_engine(model, rotate).generate_ids(prompts, max_new_tokens=6)
        assert [answer.ids for answer in answers] == expected
