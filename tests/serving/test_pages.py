"""Blocks are written into pages of any layout, at their positions in the prompt, and read back."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blockft.inference.block_key import KVShape
from blockft.serving.block_request import page_slots
from blockft.serving.pages import PageLayout, read_block, write_blocks
from tests.inference.cached import random_key
from tests.serving.stubs import BACKENDS, PAGE_LEN, SHAPE, kv_of, make_layers, make_served


@pytest.mark.parametrize("start", [0, 3, 4, 9, 13])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_are_written_at_their_positions(backend: type[Any], start: int, tmp_path: Path) -> None:
    """Blocks of 5, 4 and 6 tokens, of which the first `start` tokens are in pages already."""
    served, layers = make_served(tmp_path), make_layers(backend)
    keys = [random_key(seed, length) for seed, length in enumerate((5, 4, 6))]
    blocks, pages = [kv_of(key) for key in keys], random.Random(start).sample(range(16), 4)
    write_blocks(layers, served.rotaries, blocks, page_slots(pages, PAGE_LEN, start, 15))
    expected = torch.cat(blocks, dim=1).clone()
    for layer, rotary in enumerate(served.rotaries):
        shifted = [
            rotary.shift(kv[layer, :, 0], offset) for kv, offset in zip(blocks, (0, 5, 9), strict=True)
        ]
        expected[layer, :, 0] = torch.cat(shifted)
    found = read_block(layers, SHAPE, page_slots(pages, PAGE_LEN, 0, 15))
    assert_close(found[:, start:], expected[:, start:], rtol=1e-6, atol=1e-6)
    assert bool((found[:, :start] == -1).all()), "tokens before `start` stay"
    assert sum(int((layer.kv_cache != -1).sum()) for layer in layers) == expected[:, start:].numel()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_backend_wrote_is_read_exactly(backend: type[Any], dtype: str) -> None:
    shape = KVShape(num_layers=3, num_kv_heads=2, head_size=4, dtype=dtype)
    layers, kv = make_layers(backend, dtype=dtype), kv_of(random_key(1, 11), shape)
    slots = page_slots([6, 0, 9], PAGE_LEN, 0, 11)
    for index, layer in enumerate(layers):
        layer.impl.do_kv_cache_update(layer, *kv[index].unbind(1), layer.kv_cache, slots)
    assert torch.equal(read_block(layers, shape, slots), kv)


def test_a_page_tells_its_number_of_tokens() -> None:
    for backend in BACKENDS:
        assert PageLayout(make_layers(backend)[0], SHAPE).page_len == PAGE_LEN
