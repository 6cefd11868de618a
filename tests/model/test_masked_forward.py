"""The masked forward pass in which local blocks see the first block, against plain transformers models."""

import random

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from blockft.attention.layout import Layout
from blockft.model.masked_forward import masked_logits
from tests.tiny import CONFIGS, build_model, random_ids, random_layout


def build_trained_model(name: str) -> PreTrainedModel:
    """Return a model whose config says that local blocks see the first block."""
    model = build_model(name)
    model.config.block_attention = {"version": 1, "local_sees_first": True}
    return model


def encode_plain(model: PreTrainedModel, ids: torch.Tensor, start: int) -> DynamicCache:
    """Return the keys and values of a plain causal pass at positions `start`, `start + 1`, ..."""
    cache = DynamicCache()
    positions = torch.arange(start, start + len(ids))
    model(input_ids=ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the logits of the final block over blocks that were each encoded behind the first block."""
    blocks = ids.split(list(layout.block_lengths))
    first, start = blocks[0], 0
    context = DynamicCache()
    for index, block in enumerate(blocks[:-1]):
        before = first[:0] if index == 0 else first
        encoded = encode_plain(model, torch.cat((before, block)), start - len(before))
        for layer, (keys_BKTD, values_BKTD, *_) in enumerate(encoded):
            context.update(keys_BKTD[:, :, len(before) :], values_BKTD[:, :, len(before) :], layer)
        start += len(block)
    positions = torch.arange(start, len(ids))
    return model(
        input_ids=blocks[-1][None], position_ids=positions[None], past_key_values=context, use_cache=True
    ).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_blocks_encoded_behind_the_first_block(name: str) -> None:
    rng = random.Random(name)
    layout = random_layout(rng, 60, 5)
    ids = random_ids(rng, 60)
    plain = build_model(name, attention="eager")
    expected = plain_logits(plain, ids, layout)
    logits = masked_logits(build_trained_model(name), ids, [layout])
    assert logits.shape[0] == 60
    assert_close(logits[-layout.final_lengths[0] :], expected, rtol=1e-5, atol=1e-5)
    without_copies = masked_logits(build_model(name), ids, [layout])
    assert not torch.allclose(logits, without_copies, rtol=1e-3, atol=1e-3)


def test_examples_of_a_row_do_not_change_each_other_and_copies_have_no_logits() -> None:
    rng, model = random.Random(3), build_trained_model("llama-yarn")
    layouts = [random_layout(rng, 25, 4, 2), Layout((3, 9)), random_layout(rng, 30, 6), Layout((7,))]
    ids = [random_ids(rng, layout.num_tokens) for layout in layouts]
    alone = torch.cat(
        [masked_logits(model, some, [layout]) for some, layout in zip(ids, layouts, strict=True)]
    )
    row = torch.cat(ids)
    assert_close(masked_logits(model, row, layouts), alone, rtol=1e-5, atol=1e-5)
    kept = torch.tensor([0, 70, 30, 24])
    assert_close(masked_logits(model, row, layouts, kept), alone[kept], rtol=1e-5, atol=1e-5)
    assert_close(masked_logits(model, row.tolist(), layouts, 3), alone[-3:], rtol=1e-5, atol=1e-5)


def test_a_local_block_sees_the_first_block_and_no_other() -> None:
    rng, model = random.Random(5), build_trained_model("llama")
    layout, ids = Layout((4, 6, 6, 5)), random_ids(rng, 21)
    logits = masked_logits(model, ids, [layout])

    def changed(token: int) -> list[bool]:
        """Return which blocks have other logits if a token is another one."""
        others = ids.clone()
        others[token] = 1 + ids[token] % 90
        differences = (masked_logits(model, others, [layout]) - logits).abs().amax(dim=1)
        return [bool(block.max() > 1e-4) for block in differences.split(list(layout.block_lengths))]

    assert changed(3) == [True, True, True, True]
    assert changed(4) == [False, True, False, True]
    assert changed(15) == [False, False, True, True]
    assert changed(20) == [False, False, False, True]


def test_full_mode_has_no_copies() -> None:
    rng = random.Random(8)
    layout, ids = random_layout(rng, 40, 5, 2), random_ids(rng, 40)
    found = masked_logits(build_trained_model("qwen3"), ids, [layout.full()])
    assert torch.equal(found, masked_logits(build_model("qwen3"), ids, [layout.full()]))
