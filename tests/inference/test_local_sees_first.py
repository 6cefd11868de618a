"""Models whose local blocks see the first block: the cache holds what was trained, and never mixes."""

import json
import random
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedModel

from blockft.attention.cached_context import TILE_PADDING
from blockft.attention.layout import Layout
from blockft.data.rag_prompt import Document
from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, block_key, context_keys, first_digest, key_digest
from blockft.inference.cache_entry import SUFFIX, EntryReader
from blockft.inference.cache_folder import CacheFolder
from blockft.inference.device_tier import DeviceTier
from blockft.inference.engine import Engine
from blockft.inference.rotate_keys import RotatedKeysBatch, prefill_blocks
from blockft.inference.rotate_queries import QueryRotationRunner
from blockft.inference.runner import Rotate, kv_shape
from blockft.model.decoder_layers import rotary_embeddings
from blockft.model.fingerprint import model_fingerprint
from blockft.model.load import BLOCK_ATTENTION, load_model
from blockft.model.lora import add_adapter
from blockft.model.masked_forward import masked_logits
from tests.inference.engines import PROMPT, ROTATE, Prompt, keep_only_disk, make_engine, options
from tests.run import save_model, save_tokenizer, write_block_attention
from tests.tiny import CONFIGS, build_model, random_ids, random_layout

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NUM_NEW = 4


def build_trained_model(name: str, *, sees_first: bool = True) -> PreTrainedModel:
    """Return a model for cached blocks whose config says whether local blocks see the first block."""
    model = build_model(name, "block_cached")
    model.config.block_attention = {"version": 1, "local_sees_first": sees_first}
    return model


def random_prompt(rng: random.Random, num_tokens: int, num_blocks: int) -> Prompt:
    ids, layout = random_ids(rng, num_tokens), random_layout(rng, num_tokens, num_blocks)
    return [part.tolist() for part in ids.split(layout.block_lengths)]


def keys_of(prompt: Prompt) -> list[BlockKey]:
    return context_keys(prompt[:-1], local_sees_first=True)


def compute(model: PreTrainedModel, *keys: BlockKey) -> dict[BlockKey, torch.Tensor]:
    return dict(prefill_blocks(model, keys))


@torch.inference_mode()
def final_logits(model: PreTrainedModel, prompt: Prompt) -> torch.Tensor:
    """Return the logits of the final block by the masked forward pass."""
    layout = Layout(tuple(map(len, prompt)))
    return masked_logits(model, [*chain.from_iterable(prompt)], [layout])[-len(prompt[-1]) :]


def greedy(model: PreTrainedModel, prompt: Prompt) -> tuple[int, ...]:
    blocks = [[*block] for block in prompt]
    for _ in range(NUM_NEW):
        blocks[-1].append(int(final_logits(model, blocks)[-1].argmax()))
    return tuple(blocks[-1][-NUM_NEW:])


def cached_logits(model: PreTrainedModel, prompts: list[Prompt], rotate: Rotate) -> list[torch.Tensor]:
    """Return the logits of the final blocks of a batch over blocks that were computed on their own."""
    contexts, finals = [keys_of(prompt) for prompt in prompts], [prompt[-1] for prompt in prompts]
    blocks, longest = compute(model, *chain.from_iterable(contexts)), max(map(len, finals))
    batch: Any
    if rotate == "keys":
        batch = RotatedKeysBatch(model, rotary_embeddings(model), contexts, blocks)
    else:
        shape = kv_shape(model)
        tier = DeviceTier(shape, torch.device("cpu"), 4096 * shape.token_bytes, TILE_PADDING)
        with tier.add([*blocks], keep=()):
            for key, kv in blocks.items():
                tier.block(key).copy_(kv)
        rotaries = rotary_embeddings(model)
        runner = QueryRotationRunner(model, rotaries, tier, use_triton=False, use_graphs=False)
        batch = runner.start_batch(contexts, longest)
    logits = batch.decode_step(finals, num_logits=longest)
    return [row[-len(final) :] for row, final in zip(logits, finals, strict=True)]


# the masked forward pass


@pytest.mark.parametrize("rotate", ROTATE)
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_blocks_give_the_logits_of_the_masked_forward(name: str, rotate: Rotate) -> None:
    """Also without local blocks, with one, with fifty, and where a later block equals the first."""
    rng, model = random.Random(name), build_trained_model(name)
    prompts = [random_prompt(rng, *size) for size in [(60, 5), (24, 1), (90, 50), (37, 2), (300, 3)]]
    first, second, third, *_ = prompts[0]
    prompts.append([first, second, first, second, third])
    for prompt, logits in zip(prompts, cached_logits(model, prompts, rotate), strict=True):
        assert_close(logits, final_logits(model, prompt), **CLOSE)


@pytest.mark.parametrize("rotate", ROTATE)
@pytest.mark.parametrize("name", ["gemma3", "llama-yarn", "phi3-partial"])
def test_cached_blocks_match_the_masked_forward_up_to_2048_tokens(name: str, rotate: Rotate) -> None:
    rng, model = random.Random(name), build_trained_model(name)
    prompt = random_prompt(rng, 2048, 12)
    (logits,) = cached_logits(model, [prompt], rotate)
    assert_close(logits, final_logits(model, prompt), **CLOSE)


BLOCKS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(prompts=st.lists(st.tuples(st.lists(BLOCKS, max_size=6), BLOCKS), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("rotate", ROTATE)
def test_any_batch_of_prompts_with_equal_blocks_is_right(
    rotate: Rotate, prompts: list[tuple[Prompt, list[int]]]
) -> None:
    model = build_trained_model("gemma3")
    batch = [[*context, final] for context, final in prompts]
    for prompt, logits in zip(batch, cached_logits(model, batch, rotate), strict=True):
        assert_close(logits, final_logits(model, prompt), **CLOSE)


# what a block depends on


def test_a_block_depends_on_the_first_block_and_on_its_own_tokens_alone() -> None:
    model = build_trained_model("qwen3")
    first, other_first, block, other = [3, 4, 5], [3, 4, 6], [7, 8, 9, 10], [11, 12]
    kv = compute(model, block_key(block, first))[block_key(block, first)]
    beside = compute(model, block_key(other, first), block_key(block, first))[block_key(block, first)]
    assert_close(beside, kv, **CLOSE)
    for other_key in (block_key(block, other_first), block_key(block)):
        (changed,) = compute(model, other_key).values()
        assert torch.equal(changed[0], kv[0]), "the first layer sees no other token"
        assert (changed[1] - kv[1]).abs().amax() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_stored_at_the_first_positions_and_without_the_first_block(name: str) -> None:
    """Keys of the first layer depend on the token and its position alone."""
    model = build_trained_model(name)
    alone = compute(model, block_key([7, 8, 9, 10]))
    behind = compute(model, block_key([7, 8, 9, 10], [3, 4, 5]))
    (expected,), (found,) = alone.values(), behind.values()
    assert found.shape == expected.shape
    assert_close(found[0], expected[0], **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_the_tokens_of_other_blocks_do_not_change_a_bit(name: str, seed: int, lengths: list[int]) -> None:
    rng, model = random.Random(seed), build_trained_model(name)
    first = random_ids(rng, rng.randrange(1, 30)).tolist()

    def block(length: int) -> BlockKey:
        return block_key(random_ids(rng, length), first)

    shared, place = block(rng.randrange(1, 40)), rng.randrange(len(lengths) + 1)
    (alone,) = compute(model, shared).values()
    results = []
    for _ in range(2):
        group = [block(length) for length in lengths]
        assume(len({*group, shared}) == len(lengths) + 1)  # equal blocks are computed once
        group.insert(place, shared)
        results.append(compute(model, *group)[shared])
    assert torch.equal(results[0], results[1])
    assert_close(results[0], alone, **CLOSE)


def test_blocks_behind_different_first_blocks_are_computed_in_different_passes() -> None:
    """Each pass has the first block once and keeps to its limit."""
    rng, model = random.Random(0), build_trained_model("llama")
    firsts = [[], [3, 4], [5, 6, 7]]
    keys = [block_key(random_ids(rng, 5), first) for _ in range(4) for first in firsts]
    passes: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    blocks = dict(prefill_blocks(model, keys, max_tokens=13))
    handle.remove()
    assert passes == [10, 10, 12, 12, 13, 13]
    assert blocks.keys() == {*keys}
    for key, kv in blocks.items():
        assert_close(kv, compute(model, key)[key], **CLOSE)


@pytest.mark.parametrize("overflowing", ["first", "block"])
def test_a_block_that_overflows_is_refused_and_changes_no_other_block(overflowing: str) -> None:
    model = build_trained_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("inf")
    first = [8, 5] if overflowing == "first" else [8, 9]
    bad, good = block_key([10, 11 if overflowing == "first" else 5], first), block_key([12, 13, 14], [8, 9])
    (expected,) = compute(model, good).values()
    found = {}
    with pytest.raises(UserError, match="not finite for 1 block of the prompts"):
        for key, kv in prefill_blocks(model, [good, bad]):
            found[key] = kv
    assert_close(found, {good: expected}, **CLOSE)


# the engine


@pytest.fixture(params=ROTATE)
def rotate(request: pytest.FixtureRequest) -> Rotate:
    return request.param


def sources(engine: Engine, prompt: Prompt) -> dict[str, int]:
    (answer,) = engine.generate_ids([prompt], max_new_tokens=1)
    return dict(answer.sources)


def test_answers_are_those_of_the_masked_forward_from_every_tier(tmp_path: Path, rotate: Rotate) -> None:
    """Cold, warm, with the documents in another order, from the disk, and after a restart."""
    model, rng = build_trained_model("llama-llama3"), random.Random(1)
    prompt = random_prompt(rng, 70, 6)
    moved = [prompt[0], *rng.sample(prompt[1:-1], 4), prompt[-1]]
    expected = {id(prompt): greedy(model, prompt), id(moved): greedy(model, moved)}
    nearest, found = ("device" if rotate == "queries" else "host"), []
    for _ in range(2):
        with make_engine(model, rotate, options(tmp_path)) as engine:
            for asked in (prompt, prompt, moved):
                (answer,) = engine.generate_ids([asked], max_new_tokens=NUM_NEW)
                assert answer.ids == expected[id(asked)]
                found.append(dict(answer.sources))
            keep_only_disk(engine)
            found.append(sources(engine, moved))
    assert found == [
        *({source: 5} for source in ("computed", nearest, nearest, "disk")),
        *({source: 5} for source in ("disk", nearest, nearest, "disk")),
    ]


def test_a_batch_may_have_different_first_blocks(rotate: Rotate) -> None:
    model = build_trained_model("mistral-window")
    documents = [[11, 12, 13], [14, 15]]
    prompts = [[first, *documents, [21, 22]] for first in ([3, 4], [5, 6, 7], [11, 12, 13])]
    prompts += [[[3, 4], [9, 9]], [[1, 2]]]
    answers = make_engine(model, rotate).generate_ids(prompts, max_new_tokens=NUM_NEW)
    assert [answer.ids for answer in answers] == [greedy(model, prompt) for prompt in prompts]


def test_prompts_with_different_first_blocks_share_no_documents(tmp_path: Path, rotate: Rotate) -> None:
    model, documents, question = build_trained_model("llama"), [[11, 12, 13], [14, 15]], [21]
    with make_engine(model, rotate, options(tmp_path)) as engine:
        assert sources(engine, [[3, 4], *documents, question]) == {"computed": 3}
        assert sources(engine, [[3, 5], *documents, question]) == {"computed": 3}
        # a document that comes first sees itself alone, and others see it
        assert sources(engine, [*documents, question]) == {"computed": 2}
        assert sources(engine, [documents[0], question]) == {_nearest(rotate): 1}
        assert sources(engine, [[3, 4], documents[1], question]) == {_nearest(rotate): 2}
    assert len([*CacheFolder(tmp_path).entries()]) == 3 + 3 + 2


def _nearest(rotate: Rotate) -> str:
    return "device" if rotate == "queries" else "host"


def test_full_mode_is_that_of_a_model_without_the_switch() -> None:
    prompt = random_prompt(random.Random(2), 40, 4)
    answers = [
        make_engine(build_trained_model("llama", sees_first=sees_first), "keys").generate_ids(
            [prompt], mode="full", max_new_tokens=NUM_NEW
        )[0]
        for sees_first in (True, False)
    ]
    assert answers[0].ids == answers[1].ids


def test_a_model_with_the_switch_and_one_without_share_no_entry(tmp_path: Path, rotate: Rotate) -> None:
    prompt = random_prompt(random.Random(3), 50, 4)
    for _ in range(2):
        for sees_first in (True, False):
            model = build_trained_model("llama", sees_first=sees_first)
            with make_engine(model, rotate, options(tmp_path)) as engine:
                (answer,) = engine.generate_ids([prompt], max_new_tokens=NUM_NEW)
            assert answer.ids == greedy(model, prompt)
    assert len(CacheFolder(tmp_path).models()) == 2
    assert len([*CacheFolder(tmp_path).entries()]) == 6


def test_the_fingerprint_of_a_model_without_the_switch_does_not_change() -> None:
    model, without = build_model("qwen2"), build_trained_model("qwen2", sees_first=False)
    assert model_fingerprint(model, "t") == model_fingerprint(without, "t")
    assert model_fingerprint(model, "t") != model_fingerprint(build_trained_model("qwen2"), "t")


def test_an_entry_names_the_entry_of_the_first_block_that_its_block_sees(tmp_path: Path) -> None:
    prompt = [[3, 4], [11, 12, 13], [14, 15], [21]]
    with make_engine(build_trained_model("llama"), "keys", options(tmp_path)) as engine:
        sources(engine, prompt)
    ((_, model),) = CacheFolder(tmp_path).models().items()
    first, *documents = keys_of(prompt)
    for key in (first, *documents):
        with EntryReader(tmp_path / model.fingerprint / f"{key_digest(key)}{SUFFIX}", model) as entry:
            assert entry.tokens == key.tokens
            assert entry.first_digest == first_digest(key) == ("" if key is first else key_digest(first))


def test_a_stream_goes_on_after_another_request_took_its_blocks(rotate: Rotate) -> None:
    model, rng = build_trained_model("gemma3"), random.Random(4)
    prompt, other = random_prompt(rng, 40, 4), random_prompt(rng, 40, 4)
    engine = make_engine(model, rotate)
    stream = engine.stream_ids(prompt, max_new_tokens=NUM_NEW)
    answer = None
    while answer is None:
        try:
            next(stream)
            engine.generate_ids([other], max_new_tokens=1)
        except StopIteration as end:
            answer = end.value
    assert answer.ids == greedy(model, prompt)


# prompts over documents

DOCUMENTS = [Document(title="T", text=f"document {number}") for number in range(3)]
BARE_TEMPLATE = """
{%- for message in messages %}{{ message.content | trim }}
{%- if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
"""A template without markup before the first text."""


def save_trained_model(folder: Path, **size: float) -> Path:
    return write_block_attention(save_model(folder, **size), local_sees_first=True)


def test_documents_are_computed_in_advance_behind_the_instruction(tmp_path: Path) -> None:
    """Requests with documents and chats of block texts find them; another instruction does not."""
    path = save_trained_model(tmp_path)
    with Engine.load(path, device="cpu", prompt=PROMPT) as engine:
        keys = engine.document_keys(DOCUMENTS)
        assert engine.runner.prefill_blocks(keys) == 4
        assert [key.first for key in keys] == [b"", *[keys[0].tokens] * 3]
        documents = [{"title": d.title, "text": d.text} for d in reversed(DOCUMENTS)]
        answer = engine.generate(documents=documents, question="?", max_new_tokens=1)
        assert answer.sources == {"host": 4}
        chat = [{"role": "user", "content": ["Read.\n", "T document 1\n", "?"]}]
        assert engine.generate(messages=chat, max_new_tokens=1).sources == {"host": 2}
        chat[0]["content"] = ["Read!\n", "T document 1\n", "?"]
        assert engine.generate(messages=chat, max_new_tokens=1).sources == {"computed": 2}


def test_without_an_instruction_the_markup_is_the_first_block(tmp_path: Path) -> None:
    prompt = replace(PROMPT, instruction="")
    with Engine.load(save_trained_model(tmp_path), device="cpu", prompt=prompt) as engine:
        keys = engine.document_keys(DOCUMENTS)
        assert [key.first for key in keys] == [b"", *[keys[0].tokens] * 3]


@pytest.mark.parametrize("instruction", ["", " \n"])
def test_documents_that_would_be_the_first_block_are_not_computed_in_advance(
    tmp_path: Path, instruction: str
) -> None:
    """Every other document of a prompt would depend on the one that comes first.

    The template strips messages, so that no block is left of an instruction of white space.
    """
    path, template = save_trained_model(tmp_path), tmp_path / "bare.jinja"
    template.write_text(BARE_TEMPLATE)
    prompt = replace(PROMPT, instruction=instruction)
    with Engine.load(path, device="cpu", prompt=prompt, chat_template=str(template)) as engine:
        with pytest.raises(UserError, match="every block depends on the first document"):
            engine.document_keys(DOCUMENTS)
        documents = [{"title": d.title, "text": d.text} for d in DOCUMENTS]
        assert engine.generate(documents=documents, question="?", max_new_tokens=1).sources == {"computed": 3}
    with Engine.load(path, device="cpu", prompt=PROMPT, chat_template=str(template)) as engine:
        assert len(engine.document_keys(DOCUMENTS)) == 4


def test_a_document_must_fit_behind_the_first_block(tmp_path: Path) -> None:
    path = save_trained_model(tmp_path, max_position_embeddings=40)
    with Engine.load(path, device="cpu", prompt=PROMPT) as engine:
        assert engine.document_keys([Document(title="", text="x" * 30)])
        with pytest.raises(
            UserError, match="a document has 34 tokens after a first block of 7, the model has 40"
        ):
            engine.document_keys([Document(title="", text="x" * 33)])


def test_the_entry_of_an_adapter_counts_and_not_that_of_its_base(tmp_path: Path) -> None:
    prompt, base = random_prompt(random.Random(5), 40, 4), save_model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    add_adapter(load_model(str(base), backend="cached", dtype=torch.float32), {}, seed=0).save_pretrained(
        adapter
    )
    save_tokenizer(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / BLOCK_ATTENTION).write_text(json.dumps({"version": 1, "local_sees_first": True}))
    for path, sees_first in ((adapter, True), (base, False)):
        with Engine.load(path, device="cpu") as engine:
            assert engine.runner.context_keys(prompt[:-1]) == context_keys(
                prompt[:-1], local_sees_first=sees_first
            )
            (answer,) = engine.generate_ids([prompt], max_new_tokens=NUM_NEW)
            assert answer.ids == greedy(engine.model, prompt)
