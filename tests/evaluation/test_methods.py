"""Methods without training: each equals an independent computation, and block or full mode at its ends."""

import random
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata, token_indices
from blockft.evaluation.methods import Method, MethodBatch
from blockft.inference.block_key import block_key
from blockft.inference.rotate_keys import RotatedKeysBatch, prefill_blocks
from blockft.model.decoder_layers import rotary_embeddings
from blockft.model.masked_forward import masked_logits
from tests.tiny import CONFIGS, build_model, random_ids, random_layout

NUM_NEW = 3
"""Tokens that a test appends after the prompt, one decode step each."""

every_model = pytest.mark.parametrize("name", CONFIGS)
Prompt = list[list[int]]


def build(name: str, *, local_sees_first: bool = False) -> PreTrainedModel:
    model = build_model(name, "block_cached")
    if local_sees_first:
        model.config.block_attention = {"version": 1, "local_sees_first": True}
    return model


def random_prompts(name: str, *, first_len: int = 1) -> list[Prompt]:
    """Return prompts of different lengths and numbers of blocks; one has no local block."""
    rng = random.Random(name)
    prompts = []
    for length, num_blocks in [(60, 5), (24, 1), (90, 30), (37, 2)]:
        parts = random_ids(rng, length).split(random_layout(rng, length, num_blocks).block_lengths)
        prompts.append([part.tolist() for part in parts])
        if num_blocks > 1:
            prompts[-1][0] += random_ids(rng, first_len).tolist()
    return prompts


def method_logits(model: PreTrainedModel, prompts: list[Prompt], method: Method) -> torch.Tensor:
    """Return the logits after the prompts and after each of `NUM_NEW` tokens: (B, NUM_NEW + 1, V)."""
    batch = MethodBatch(model, prompts, method)
    logits = [batch.prefill()]
    for step in range(NUM_NEW):
        logits.append(batch.decode_step([new_token(row, step) for row in range(len(prompts))]))
    return torch.stack(logits, dim=1)


def new_token(row: int, step: int) -> int:
    return 5 + 7 * row + step


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, prompts: list[Prompt], mode: str = "block") -> torch.Tensor:
    """Return the same by one masked forward pass for each prompt with its new tokens."""
    rows = []
    for row, (*local, final) in enumerate(prompts):
        prompt = [*local, [*final, *(new_token(row, step) for step in range(NUM_NEW))]]
        layout = Layout(tuple(map(len, prompt)))
        layout = layout if mode == "block" else layout.full()
        rows.append(masked_logits(model, [*chain.from_iterable(prompt)], [layout], NUM_NEW + 1))
    return torch.stack(rows)


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


@every_model
def test_the_mask_alone_is_block_mode(name: str) -> None:
    model, prompts = build(name), random_prompts(name)
    assert_equal(method_logits(model, prompts, Method()), reference_logits(model, prompts))


@every_model
def test_local_positions_are_those_of_a_model_that_was_trained_with_them(name: str) -> None:
    model, prompts = build(name), random_prompts(name)
    got = method_logits(model, prompts, Method(reencoded=False))
    model.config.block_attention = {"version": 1, "position_scheme": "local"}
    expected = reference_logits(model, prompts)
    assert_equal(got, expected)
    del model.config.block_attention
    assert not torch.allclose(got, reference_logits(model, prompts), atol=1e-3)


@every_model
def test_a_whole_shared_start_is_block_mode_of_a_model_that_sees_the_first_block(name: str) -> None:
    """Alone, with attention that is scaled by 1, and where no token or every token is computed again."""
    model, prompts = build(name, local_sees_first=True), random_prompts(name, first_len=6)
    block, full = (reference_logits(model, prompts, mode) for mode in ("block", "full"))
    mask = Method(start_tokens=None)
    assert_equal(method_logits(model, prompts, mask), block)
    assert_equal(method_logits(model, prompts, replace(mask, temperature=1 + 1e-9)), block)
    for tokens in ("first", "deviation"):
        for share, expected in [(0, block), (1, full)]:
            method = replace(mask, recomputed_share=share, recomputed_tokens=tokens)
            assert_equal(method_logits(model, prompts, method), expected)
    assert not torch.allclose(block, reference_logits(build(name), prompts), atol=1e-3)


@every_model
@pytest.mark.parametrize("tokens", ["first", "deviation"])
def test_recomputation_of_nothing_is_block_mode_and_of_everything_full_mode(name: str, tokens: str) -> None:
    model, prompts = build(name), random_prompts(name)
    for share, mode in [(0, "block"), (1, "full")]:
        method = Method(recomputed_share=share, recomputed_tokens=tokens)  # type: ignore[arg-type]
        assert_equal(method_logits(model, prompts, method), reference_logits(model, prompts, mode))


@torch.inference_mode()
def recomputed_logits(
    model: PreTrainedModel, prompt: Prompt, chosen: list[int], *, local_sees_first: bool = False
) -> torch.Tensor:
    """Return the last logits after the chosen context tokens are recomputed one by one, in order."""
    ids = list(chain.from_iterable(prompt))
    layout = Layout(tuple(map(len, prompt)), local_sees_first=local_sees_first)
    encoded = encode_block_mode(model, ids, layout)
    again: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    full = build_metadata([layout.full()])
    for token in [*chosen, *range(layout.context_len, len(ids))]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(encoded):
            keys, values = keys[:, :, :token].clone(), values[:, :, :token].clone()
            for index, layers in again.items():
                keys[:, :, index], values[:, :, index] = layers[layer]
            if token:
                cache.update(keys, values, layer)
        metadata = type(full)(*(ids[:, : token + 1] for ids in full.as_tuple()))
        logits = model(
            input_ids=torch.tensor([[ids[token]]]),
            position_ids=torch.tensor([[token]]),
            block_masks=AttentionMasks(metadata),
            past_key_values=cache,
            use_cache=True,
        ).logits[0, -1]
        again[token] = [(keys[:, :, token], values[:, :, token]) for keys, values, *_ in cache]
    return logits


def encode_block_mode(
    model: PreTrainedModel, ids: list[int], layout: Layout
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and values of each layer for the tokens of a prompt, without copies."""
    metadata = build_metadata([layout])
    cache = encode(model, [ids[index] for index in token_indices([layout])], metadata)
    kept = ~metadata.is_copy[0]
    return [(keys[:, :, kept], values[:, :, kept]) for keys, values, *_ in cache]


def encode(model: PreTrainedModel, ids: list[int], metadata: object) -> DynamicCache:
    cache = DynamicCache()
    model(
        input_ids=torch.tensor([ids]),
        position_ids=metadata.position_ids,  # type: ignore[attr-defined]
        block_masks=AttentionMasks(metadata),  # type: ignore[arg-type]
        past_key_values=cache,
        use_cache=True,
    )
    return cache


@every_model
@pytest.mark.parametrize("sees_first", [False, True])
def test_first_tokens_of_blocks_are_recomputed_over_all_blocks(name: str, sees_first: bool) -> None:
    model, prompts = build(name, local_sees_first=sees_first), random_prompts(name)
    method = Method(start_tokens=None if sees_first else 0, recomputed_share=0.3)
    got = method_logits(model, prompts, method)[:, 0]
    for row, prompt in zip(got, prompts, strict=True):
        starts = [sum(map(len, prompt[:block])) for block in range(len(prompt))]
        ranked = [
            starts[block] + index
            for index in range(100)
            for block in range(1, len(prompt) - 1)
            if index < len(prompt[block])
        ]
        chosen = sorted(ranked[: round(0.3 * len(ranked))])
        assert_equal(row, recomputed_logits(model, prompt, chosen, local_sees_first=sees_first))


@every_model
@pytest.mark.parametrize("sees_first", [False, True])
def test_the_tokens_that_deviate_most_are_recomputed(name: str, sees_first: bool) -> None:
    model, prompts = build(name, local_sees_first=sees_first), random_prompts(name)
    start_tokens = None if sees_first else 0
    method = Method(start_tokens=start_tokens, recomputed_share=0.2, recomputed_tokens="deviation")
    got = method_logits(model, prompts, method)[:, 0]
    for row, prompt in zip(got, prompts, strict=True):
        ids = list(chain.from_iterable(prompt))
        layout = Layout(tuple(map(len, prompt)), local_sees_first=sees_first)
        with torch.inference_mode():
            block, full = (encode_block_mode(model, ids, some)[1] for some in (layout, layout.full()))
        squares = torch.stack([(a - b).square().sum(dim=(0, 1, 3)) for a, b in zip(block, full, strict=True)])
        first = len(prompt[0])
        deviation = squares.sum(dim=0)[first : max(first, layout.context_len)]
        chosen = (deviation.topk(round(0.2 * len(deviation))).indices + first).sort().values.tolist()
        assert_equal(row, recomputed_logits(model, prompt, chosen, local_sees_first=sees_first))


@torch.inference_mode()
def logits_of_blocks_behind(model: PreTrainedModel, prompt: Prompt, num_start: int | None) -> torch.Tensor:
    """Return the last logits over blocks that are encoded behind the start, and moved to their positions."""
    first, *others, final = prompt
    start, rotaries = first[:num_start], rotary_embeddings(model)
    blocks = dict(prefill_blocks(model, [block_key(first)]))
    for block in others:
        ((_, layers),) = prefill_blocks(model, [block_key(start + block)])
        keys, values = layers[:, len(start) :].unbind(dim=2)
        moved = torch.stack([r.shift(k, -len(start)) for r, k in zip(rotaries, keys, strict=True)])
        blocks[block_key(block)] = torch.stack((moved, values), dim=2)
    contexts = [[block_key(block) for block in prompt[:-1]]]
    return RotatedKeysBatch(model, rotaries, contexts, blocks).decode_step([final])[0, -1]


@every_model
@pytest.mark.parametrize("start_tokens", [1, 4, None])
def test_shared_start_encodes_every_block_behind_the_same_tokens(name: str, start_tokens: int | None) -> None:
    model = build(name)
    prompts = [prompt for prompt in random_prompts(name, first_len=6) if len(prompt) > 1]
    got = method_logits(model, prompts, Method(start_tokens=start_tokens))[:, 0]
    for row, prompt in zip(got, prompts, strict=True):
        assert_equal(row, logits_of_blocks_behind(model, prompt, start_tokens))


@every_model
def test_the_final_block_reads_a_shared_start_once(name: str) -> None:
    """A start of no tokens is block mode; with one local block no other block stands behind the start."""
    model, prompts = build(name), random_prompts(name, first_len=6)
    assert_equal(method_logits(model, prompts, Method(start_tokens=0)), reference_logits(model, prompts))
    few = [prompt for prompt in prompts if len(prompt) <= 2]
    assert_equal(method_logits(model, few, Method(start_tokens=None)), reference_logits(model, few))


@every_model
def test_a_temperature_and_a_scale_near_1_are_block_mode(name: str) -> None:
    model, prompts = build(name), random_prompts(name)
    near = Method(temperature=1 + 1e-9, scale=1 - 1e-9)
    assert_equal(method_logits(model, prompts, near), reference_logits(model, prompts))
    exact = method_logits(model, prompts, replace(near, temperature=1, scale=1))
    assert_equal(exact, reference_logits(model, prompts))


@every_model
def test_scaled_attention_does_not_depend_on_the_batch(name: str) -> None:
    model, prompts = build(name), random_prompts(name, first_len=6)
    method = Method(temperature=0.6, scale=0.8, start_tokens=4)
    together = method_logits(model, prompts, method)
    (first, *_) = method_logits(model, prompts[:1], method)
    assert_equal(together[0], first)
    assert not torch.allclose(together, reference_logits(model, prompts), atol=1e-3)


def test_a_backend_that_would_ignore_the_method_is_refused() -> None:
    with pytest.raises(AssertionError):
        MethodBatch(build_model("llama"), [[[1, 2], [3]]], Method(temperature=0.5))
