"""Blocks computed separately, shifted and concatenated give the logits of the masked forward pass."""

import json
import random
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, block_key
from blockft.inference.engine import Engine
from blockft.inference.rotate_keys import RotatedKeysBatch, prefill_blocks
from blockft.model.decoder_layers import rotary_embeddings
from tests.run import save_model
from tests.tiny import CONFIGS, build_model, random_ids, random_layout


def split_ids(ids: torch.Tensor, layout: Layout) -> list[list[int]]:
    return [part.tolist() for part in ids.split(layout.block_lengths)]


def keys_of(prompts: list[list[list[int]]]) -> list[list[BlockKey]]:
    return [[block_key(block) for block in prompt[:-1]] for prompt in prompts]


@torch.inference_mode()
def masked_logits(
    model: PreTrainedModel, ids: torch.Tensor, layout: Layout, *, reencoded: bool = True
) -> torch.Tensor:
    """Return the reference: the final block's logits of one forward pass under the block mask."""
    metadata = build_metadata([layout], reencoded=reencoded)
    out = model(
        input_ids=ids[None],
        position_ids=metadata.position_ids,
        block_masks=AttentionMasks(metadata),
        use_cache=False,
    )
    return out.logits[0, layout.context_len :]


def rotated_keys_logits(
    model: PreTrainedModel, prompts: list[list[list[int]]], *, reencoded: bool = True
) -> list[torch.Tensor]:
    contexts = keys_of(prompts)
    blocks = dict(prefill_blocks(model, chain.from_iterable(contexts), max_tokens=512))
    batch = RotatedKeysBatch(model, rotary_embeddings(model), contexts, blocks, reencoded=reencoded)
    finals = [prompt[-1] for prompt in prompts]
    logits = batch.decode_step(finals, num_logits=max(map(len, finals)))
    return [row[-len(final) :] for row, final in zip(logits, finals, strict=True)]


@pytest.mark.parametrize("reencoded", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_rotated_keys_give_the_logits_of_the_masked_forward(name: str, reencoded: bool) -> None:
    """Also for blocks that stay at positions 0..n-1, compared with a masked forward at these positions."""
    rng, model = random.Random(name), build_model(name)
    prompts, expected = [], []
    for length, num_blocks in [(60, 5), (24, 1), (90, 50), (37, 2)]:
        ids, layout = random_ids(rng, length), random_layout(rng, length, num_blocks)
        prompts.append(split_ids(ids, layout))
        expected.append(masked_logits(model, ids, layout, reencoded=reencoded))
    for got, logits in zip(rotated_keys_logits(model, prompts, reencoded=reencoded), expected, strict=True):
        assert_close(got, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_rotated_keys_match_the_masked_forward_up_to_2048_tokens(name: str) -> None:
    rng, model = random.Random(name), build_model(name)
    ids, layout = random_ids(rng, 2048), random_layout(rng, 2048, 12)
    got = rotated_keys_logits(model, [split_ids(ids, layout)])[0]
    assert_close(got, masked_logits(model, ids, layout), rtol=1e-5, atol=1e-5)


def test_decoding_steps_give_the_logits_of_the_masked_forward() -> None:
    model, layout = build_model("gemma3"), Layout((12, 7, 9, 11))
    ids = random_ids(random.Random(3), layout.num_tokens)
    prompt = split_ids(ids, layout)
    (context,), final = keys_of([prompt]), prompt[-1]
    batch = RotatedKeysBatch(model, rotary_embeddings(model), [context], dict(prefill_blocks(model, context)))
    steps = [batch.decode_step([final[:2]]), *(batch.decode_step([[token]]) for token in final[2:])]
    got = torch.cat([step[0] for step in steps])
    assert_close(got, masked_logits(model, ids, layout)[1:], rtol=1e-5, atol=1e-5)


def test_the_engine_uses_the_positions_of_training(tmp_path: Path) -> None:
    save_model(tmp_path, initializer_range=1.0)
    ids, layout, answers = random_ids(random.Random(1), 60), Layout((20, 25, 15)), {}
    config = json.loads((tmp_path / "config.json").read_text())
    for scheme in ("reencoded", "local"):
        config["block_attention"] = {"position_scheme": scheme}
        (tmp_path / "config.json").write_text(json.dumps(config))
        engine = Engine.load(str(tmp_path), device="cpu")
        (answers[scheme],) = engine.generate_ids([split_ids(ids, layout)], max_new_tokens=6)
        expected = masked_logits(engine.model, ids, layout, reencoded=scheme == "reencoded")
        assert answers[scheme].ids[0] == int(expected[-1].argmax())
    assert answers["local"].ids != answers["reencoded"].ids
    config["block_attention"] = {"position_scheme": "sideways"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sideways"):
        Engine.load(str(tmp_path), device="cpu")


def test_a_repeated_block_is_computed_once() -> None:
    model = build_model("llama")
    blocks = [block_key(ids) for ids in ([1, 2, 3], [4, 5], [1, 2, 3])]
    assert [key for key, _ in prefill_blocks(model, blocks)] == blocks[:2]
