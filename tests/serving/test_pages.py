"""Blocks are written into pages of any layout, at their positions in the prompt, and read back."""

import random
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.rope import rotate
from blockft.errors import UserError
from blockft.inference.block_key import KVShape
from blockft.serving.block_request import page_slots
from blockft.serving.pages import MAX_CHUNK_NUMBERS, PageLayout, read_blocks, write_blocks
from blockft.serving.served_model import ServedModel
from tests.inference.cached import random_key
from tests.serving.stubs import BACKENDS, PAGE_LEN, SHAPE, kv_of, make_layers, make_served


def write(layers: list[Any], served: ServedModel, blocks: list[torch.Tensor], slots: torch.Tensor) -> None:
    """Write the blocks that have tokens in `slots`."""
    ends = list(accumulate(block.shape[1] for block in blocks))
    needed = [block for block, end in zip(blocks, ends, strict=True) if end > ends[-1] - len(slots)]
    write_blocks(layers, served.rotaries, needed, ends[-1], slots, served.shape)


@pytest.mark.parametrize("start", [0, 3, 4, 9, 13])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_are_written_at_their_positions(backend: type[Any], start: int, tmp_path: Path) -> None:
    """Blocks of 5, 4 and 6 tokens, of which the first `start` tokens are in pages already."""
    served, layers = make_served(tmp_path), make_layers(backend)
    keys = [random_key(seed, length) for seed, length in enumerate((5, 4, 6))]
    blocks, pages = [kv_of(key) for key in keys], random.Random(start).sample(range(16), 4)
    write(layers, served, blocks, page_slots(pages, PAGE_LEN, start, 15))
    expected = shifted_to(served, blocks, (0, 5, 9))
    found = read_blocks(layers, SHAPE, PAGE_LEN, page_slots(pages, PAGE_LEN, 0, 15))
    assert_close(found[:, start:], expected[:, start:], rtol=1e-6, atol=1e-6)
    assert bool((found[:, :start] == -1).all()), "tokens before `start` stay"
    assert sum(int((layer.kv_cache != -1).sum()) for layer in layers) == expected[:, start:].numel()


@pytest.mark.parametrize("max_numbers", [1, 5 * 8, 9 * 8, 2 * 15 * 8, 1 << 20])
@pytest.mark.parametrize("start", [0, 6, 14])
def test_chunks_of_any_size_give_the_same_pages(
    max_numbers: int, start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token has 8 numbers of keys in a layer: chunks have one block or several, one layer or several."""
    monkeypatch.setitem(MAX_CHUNK_NUMBERS, "cpu", max_numbers)
    served = replace(make_served(tmp_path), layer_frequencies=(0, 0, 1))
    layers, blocks = make_layers(), [kv_of(random_key(seed, length)) for seed, length in enumerate((5, 4, 6))]
    write(layers, served, blocks, page_slots([7, 2, 9, 4], PAGE_LEN, start, 15))
    found = read_blocks(layers, SHAPE, PAGE_LEN, page_slots([7, 2, 9, 4], PAGE_LEN, 0, 15))
    assert torch.equal(found[:, start:], shifted_to(served, blocks, (0, 5, 9))[:, start:])
    assert bool((found[:, :start] == -1).all()), "tokens before `start` stay"


def test_a_chunk_on_a_cpu_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large temporary tensor costs more for its memory than for its numbers."""
    monkeypatch.setitem(MAX_CHUNK_NUMBERS, "cpu", 2 * 6 * 8)
    sizes = list[int]()

    def record(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        sizes.append(keys.numel())
        return rotate(keys, cos, sin)

    monkeypatch.setattr("blockft.serving.pages.rotate", record)
    blocks = [kv_of(random_key(seed, length)) for seed, length in enumerate((5, 4, 6))]
    write(make_layers(), make_served(tmp_path), blocks, page_slots([7, 2, 9, 4], PAGE_LEN, 0, 15))
    assert sum(sizes) == 15 * 8 * SHAPE.num_layers and max(sizes) <= 2 * 6 * 8


def shifted_to(served: ServedModel, blocks: list[torch.Tensor], offsets: tuple[int, ...]) -> torch.Tensor:
    """Return the blocks together, with the keys of each at its offset."""
    expected = torch.cat(blocks, dim=1).clone()
    for layer, rotary in enumerate(served.rotaries):
        shifted = [rotary.shift(kv[layer, :, 0], offset) for kv, offset in zip(blocks, offsets, strict=True)]
        expected[layer, :, 0] = torch.cat(shifted)
    return expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_backend_wrote_is_read_exactly(backend: type[Any], dtype: str) -> None:
    shape = KVShape(num_layers=3, num_kv_heads=2, head_size=4, dtype=dtype)
    layers, kv = make_layers(backend, dtype=dtype), kv_of(random_key(1, 11), shape)
    slots = page_slots([6, 0, 9], PAGE_LEN, 0, 11)
    for index, layer in enumerate(layers):
        layer.impl.do_kv_cache_update(layer, *kv[index].unbind(1), layer.kv_cache, slots)
    assert torch.equal(read_blocks(layers, shape, PAGE_LEN, slots), kv)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_of_the_scheduler_may_be_several_pages_of_the_backend(backend: type[Any]) -> None:
    """Page 3 of the scheduler, of 8 tokens, is pages 6 and 7 of the backend."""
    layers, kv = make_layers(backend), kv_of(random_key(1, 7))
    slots = page_slots([3], 2 * PAGE_LEN, 0, 7)
    for index, layer in enumerate(layers):
        layer.impl.do_kv_cache_update(layer, *kv[index].unbind(1), layer.kv_cache, slots)
    assert torch.equal(read_blocks(layers, SHAPE, 2 * PAGE_LEN, slots), kv)
    assert bool((layers[0].kv_cache[6:8] != -1).any()) and bool((layers[0].kv_cache[:6] == -1).all())


class LossyPages:
    """A backend that keeps no values."""

    shape = (2, PAGE_LEN, SHAPE.num_kv_heads, SHAPE.head_size)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        kv_cache[slots // PAGE_LEN, 0, slots % PAGE_LEN] = key


class ScaledPages(LossyPages):
    """A backend whose pages also hold a scale for each token."""

    shape = (2, PAGE_LEN, SHAPE.num_kv_heads, SHAPE.head_size + 1)


@pytest.mark.parametrize("backend", [LossyPages, ScaledPages])
def test_pages_with_another_content_are_refused(backend: type[Any]) -> None:
    with pytest.raises(UserError, match=f"attention backend {backend.__name__} with shape"):
        PageLayout(make_layers(backend)[0], SHAPE, PAGE_LEN)
