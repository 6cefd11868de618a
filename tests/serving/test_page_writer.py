"""The Triton kernel writes what the reference writes.

Without a GPU the kernel runs in Triton's interpreter: see `tests/test_triton_interpreter.py`.
"""

import os
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.rope import RotaryEmbedding
from blockft.errors import UserError
from blockft.inference.block_key import KVShape
from blockft.serving.block_request import page_slots
from blockft.serving.head_shard import HeadShard
from blockft.serving.page_writer import open_page_writer
from blockft.serving.pages import read_blocks, write_blocks

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")

pytestmark = [] if IS_INTERPRETED else pytest.mark.gpu  # Triton kernels

DTYPES = ["float32", "bfloat16", "float16"]
NUM_PAGES = 40


class Pages:
    """Pages with the dimensions of `order`, which are a permutation of "2nKD", in memory."""

    def __init__(self, order: str, page_len: int) -> None:
        self.order, self.page_len = order, page_len

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        axes = [0, *(1 + self.order.index(name) for name in "2nKD")]
        pages, tokens = slots // self.page_len, slots % self.page_len
        kv_cache.permute(axes)[pages, 0, tokens] = key
        kv_cache.permute(axes)[pages, 1, tokens] = value


class ReversedPages(Pages):
    """Pages whose heads are stored in reverse: they have no positive strides."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        shuffle = torch.tensor([*range(1, key.shape[-1]), 0], device=key.device)
        super().do_kv_cache_update(layer, key[..., shuffle], value[..., shuffle], kv_cache, slots)


def make_layers(shape: KVShape, pages: Pages) -> list[Any]:
    sizes = {"2": 2, "n": pages.page_len, "K": shape.num_kv_heads, "D": shape.head_size}
    size = (NUM_PAGES, *(sizes[name] for name in pages.order))
    caches = [torch.full(size, 99.0, dtype=shape.torch_dtype, device=DEVICE) for _ in range(shape.num_layers)]
    return [SimpleNamespace(impl=pages, kv_cache=cache) for cache in caches]


def make_rotaries(shape: KVShape, num_rotated: int, kinds: int = 2) -> list[RotaryEmbedding]:
    exponents = torch.arange(0, num_rotated, 2, dtype=torch.float64) / num_rotated
    found = [RotaryEmbedding((10_000.0**-exponents / (1 + 7 * kind)).to(DEVICE)) for kind in range(kinds)]
    return [found[layer % kinds] for layer in range(shape.num_layers)]


def make_blocks(shape: KVShape, lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    sizes = ((shape.num_layers, *shape.layer_shape(length)) for length in lengths)
    return [torch.randn(size, generator=generator).to(shape.torch_dtype) for size in sizes]


def check(
    shape: KVShape,
    lengths: list[int],
    *,
    pages: Pages | None = None,
    num_rotated: int = 0,
    start: int = 0,
    blocks: list[torch.Tensor] | None = None,
    shard: HeadShard | None = None,
    page_len: int = 0,
) -> None:
    """Write blocks behind a context of 70 tokens with both writers, and compare all pages."""
    from blockft.serving.page_writer import PageWriter

    pages, shard = pages or Pages("2nKD", 16), shard or HeadShard()
    blocks = [block.to(DEVICE) for block in make_blocks(shape, lengths)] if blocks is None else blocks
    local = shard.local_shape(shape)
    rotaries = make_rotaries(shape, num_rotated or shape.head_size)
    context_len = 70 + sum(lengths)
    numbers = torch.randperm(20, generator=torch.Generator().manual_seed(start)).tolist()
    slots = page_slots(numbers, 2 * pages.page_len, 0, sum(lengths))[start:]
    expected, got = make_layers(local, pages), make_layers(local, pages)
    write_blocks(expected, rotaries, blocks, context_len, slots, local, shard)
    PageWriter(got, rotaries, local, page_len or pages.page_len, shard).write(blocks, context_len, slots)
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}[shape.dtype]
    for one, other in zip(expected, got, strict=True):
        assert_close(other.kv_cache, one.kv_cache, rtol=tolerance, atol=tolerance)
    found = read_blocks(got, local, page_len or pages.page_len, slots)
    values = torch.cat([shard.take(block).to(DEVICE) for block in blocks], dim=1)[:, start:, 1]
    assert torch.equal(found[:, :, 1], values)


SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_size=64, dtype="float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_every_type_and_head_size(dtype: str, head_size: int) -> None:
    check(replace(SHAPE, dtype=dtype, head_size=head_size), [5, 40, 17])


@pytest.mark.parametrize("num_rotated", [16, 32, 48, 64])
def test_every_part_of_a_head_may_be_rotated(num_rotated: int) -> None:
    check(SHAPE, [5, 40, 17], num_rotated=num_rotated)


@pytest.mark.parametrize("order", ["2nKD", "n2KD", "K2nD", "2KnD", "nK2D", "nKD2"])
@pytest.mark.parametrize("page_len", [1, 16, 24])
def test_every_layout_and_size_of_pages(order: str, page_len: int) -> None:
    lengths = [5, 10, 17] if page_len == 1 else [5, 40, 17]
    check(replace(SHAPE, num_kv_heads=3), lengths, pages=Pages(order, page_len))


@pytest.mark.parametrize("start", [1, 5, 37, 61])
def test_partial_pages_and_blocks(start: int) -> None:
    """The pages of the first `start` tokens hold them already."""
    lengths = [5, 40, 17]
    needed = [end > start for end in accumulate(lengths)].index(True)
    before = sum(lengths[:needed])
    check(SHAPE, lengths[needed:], start=start - before)


def test_one_kv_head_many_layers_and_one_token() -> None:
    check(replace(SHAPE, num_kv_heads=1, num_layers=30), [1])
    check(SHAPE, [1] * 50)


def test_blocks_that_are_views_of_larger_tensors() -> None:
    """As those of the device tier, and those that were read from pages together."""
    (whole,) = make_blocks(SHAPE, [100])
    whole = whole.to(DEVICE)
    check(SHAPE, [5, 40, 17], blocks=[whole[:, 3:8], whole[:, 60:], whole[:, 8:25]])


def test_blocks_on_the_host_are_written_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = make_blocks(SHAPE, [5, 40, 17])
    if DEVICE.type == "cuda":
        blocks = [blocks[0].pin_memory(), blocks[1].cuda(), blocks[2].pin_memory()]
    monkeypatch.setattr("blockft.serving.page_writer.MAX_STAGED_BYTES", blocks[0].nbytes)
    check(SHAPE, [5, 40, 17], blocks=blocks)


@pytest.mark.parametrize("worker", range(2))
def test_the_heads_of_one_worker(worker: int) -> None:
    """One block has all heads, the other those of the worker, as in the device tier."""
    shape, shard = replace(SHAPE, num_kv_heads=4), HeadShard(worker=worker, num_workers=2)
    check(shape, [5, 40], shard=shard)


def test_pages_of_the_scheduler_may_be_several_pages_of_the_backend() -> None:
    check(SHAPE, [5, 40, 17], pages=Pages("2nKD", 16), page_len=32)


def test_positions_are_exact_far_from_the_start() -> None:
    check(SHAPE, [30] * 10)


@pytest.mark.parametrize(
    ("pages", "head_size"), [(ReversedPages("2nKD", 16), 64), (Pages("2nKD", 16), 6), (Pages("K2Dn", 2), 64)]
)
def test_pages_without_strides_or_alignment_are_refused(pages: Pages, head_size: int) -> None:
    from blockft.serving.page_writer import PageWriter

    shape = replace(SHAPE, head_size=head_size)
    layers = make_layers(shape, pages)
    with pytest.raises(UserError, match=f"the Triton kernel cannot write pages of {type(pages).__name__}"):
        PageWriter(layers, make_rotaries(shape, head_size), shape, pages.page_len)


@pytest.mark.gpu  # auto takes the kernel on a GPU alone
def test_the_kernel_is_chosen_where_it_can_write_the_pages() -> None:
    shape, pages = replace(SHAPE, head_size=64), Pages("2nKD", 16)
    rotaries = make_rotaries(shape, 64)
    for choice, reason in (("auto", "the pages suit its kernel"), ("triton", "--page-writer triton")):
        writer, found = open_page_writer(choice, make_layers(shape, pages), rotaries, shape, pages.page_len)
        assert writer is not None and found == reason
    layers = make_layers(shape, ReversedPages("2nKD", 16))
    writer, found = open_page_writer("auto", layers, rotaries, shape, pages.page_len)
    assert writer is None and "ReversedPages whose numbers do not lie at regular distances" in found
    with pytest.raises(UserError, match="regular distances: use --page-writer torch"):
        open_page_writer("triton", layers, rotaries, shape, pages.page_len)
