"""Write cached blocks into the pages of vLLM's KV cache, and read computed blocks from them.

A page holds the keys and values of `page_len` tokens in one layer. Its layout belongs to the attention
backend, so everything is written by the backend's own `do_kv_cache_update`, into any slots. Blocks need not
begin at the start of a page.

Shapes: n tokens, L layers, K key/value heads, D head size.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from blockft.attention.rope import RotaryEmbedding
from blockft.errors import UserError
from blockft.inference.block_key import KVShape


class AttentionBackend(Protocol):
    """The implementation of an attention layer of vLLM."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Write keys and values, (n, K, D) each, into slots (n,) of a layer's pages."""


class AttentionLayer(Protocol):
    """An attention layer of vLLM. The first dimension of `kv_cache` is the page."""

    impl: AttentionBackend
    kv_cache: torch.Tensor


def write_blocks(
    layers: Sequence[AttentionLayer],
    rotaries: Sequence[RotaryEmbedding],
    blocks: Sequence[torch.Tensor],
    slots: torch.Tensor,
) -> None:
    """Write the last tokens of a context into their slots, with keys at their positions in the prompt.

    blocks: the local blocks of the prompt in order, (L, n, 2, K, D) each.
    slots: of the last `len(slots)` tokens of all blocks. The tokens before them are in pages already.
    """
    lengths = torch.tensor([block.shape[1] for block in blocks])
    starts = lengths.cumsum(0) - lengths
    first = int(lengths.sum()) - len(slots)
    assert first >= 0
    needed = [i for i in range(len(blocks)) if starts[i] + lengths[i] > first]
    offsets = starts[needed].repeat_interleave(lengths[needed])[-len(slots) :]
    device = layers[0].kv_cache.device
    slots, offsets = slots.to(device), offsets[:, None].to(device)
    for index, (layer, rotary) in enumerate(zip(layers, rotaries, strict=True)):
        on_device = [blocks[i][index].to(device, non_blocking=True) for i in needed]
        keys_nKD, values_nKD = torch.cat(on_device)[-len(slots) :].unbind(1)
        keys_nKD = rotary.shift(keys_nKD, offsets)
        layer.impl.do_kv_cache_update(
            layer, keys_nKD.contiguous(), values_nKD.contiguous(), layer.kv_cache, slots
        )


def read_block(
    layers: Sequence[AttentionLayer], shape: KVShape, page_len: int, slots: torch.Tensor
) -> torch.Tensor:
    """Return the keys and values in slots: (L, n, 2, K, D) on the device of the pages."""
    kv = [torch.stack(PageLayout(layer, shape, page_len).read(layer, slots), dim=1) for layer in layers]
    return torch.stack(kv)


class PageLayout:
    """Where the keys and values of a page's tokens lie in a page.

    page_len: the number of tokens in a page of vLLM's scheduler.

    The attention backend is asked: it writes numbers into a scratch page, and the place of each number is the
    place from which it is read. The numbers are written as digits, because a digit is exact in bfloat16.

    Raises:
        UserError: a page holds something else than the keys and values of its tokens.
    """

    _BASE = 128
    _known: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def __init__(self, layer: AttentionLayer, shape: KVShape, page_len: int) -> None:
        page_shape = layer.kv_cache.shape[1:]
        # a backend may split each page of the scheduler into several pages
        self.page_len = page_shape.numel() // (2 * shape.num_kv_heads * shape.head_size)
        size = (self.page_len, shape.num_kv_heads, shape.head_size)
        if 2 * math.prod(size) != page_shape.numel() or page_len % self.page_len:
            raise UserError(_layout_error(layer, "holds more than keys and values"))
        kind = (type(layer.impl), tuple(page_shape), layer.kv_cache.dtype, size)
        if kind not in self._known:
            self._known[kind] = (_find_places(layer, size, 0), _find_places(layer, size, 1))
        self._places = self._known[kind]

    def read(self, layer: AttentionLayer, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values in slots: (n, K, D) each, on the device of the pages."""
        device = layer.kv_cache.device
        pages, row = torch.unique(slots // self.page_len, return_inverse=True)
        content = layer.kv_cache[pages.to(device)].reshape(len(pages), -1)
        row, column = row[:, None, None].to(device), slots % self.page_len
        keys, values = (content[row, place[column].to(device)] for place in self._places)
        return keys, values


def _find_places(layer: AttentionLayer, size: tuple[int, int, int], part: int) -> torch.Tensor:
    """Return the place in a page of each number of its keys (part 0) or values (part 1): (page_len, K, D)."""
    cache, total = layer.kv_cache, math.prod(size)
    slots = torch.arange(size[0], device=cache.device)
    numbers, found = torch.arange(total), torch.zeros(2 * total, dtype=torch.int64)
    is_written = torch.zeros(2 * total, dtype=torch.bool)
    digit = 1
    while digit < total:
        page = torch.zeros((1, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
        # a digit is written plus 1, because 0 means that nothing was written
        digits = (numbers // digit % PageLayout._BASE + 1).reshape(size).to(page)
        pair = [torch.zeros_like(digits), torch.zeros_like(digits)]
        pair[part] = digits
        layer.impl.do_kv_cache_update(layer, pair[0], pair[1], page, slots)
        read = page.reshape(-1).cpu().long()
        is_written |= read > 0
        found += torch.where(read > 0, (read - 1) * digit, 0)
        digit *= PageLayout._BASE
    places = torch.full((total,), -1)
    places[found[is_written]] = torch.arange(2 * total)[is_written]
    if int(is_written.sum()) != total or bool((places < 0).any()):
        raise UserError(_layout_error(layer, "does not hold each number once"))
    return places.reshape(size)


def _layout_error(layer: AttentionLayer, reason: str) -> str:
    return (
        f"a page of vLLM's attention backend {type(layer.impl).__name__} with shape "
        f"{tuple(layer.kv_cache.shape[1:])} {reason}: choose another with --attention-backend"
    )
