"""Write cached blocks into the pages of vLLM's KV cache, and read computed blocks from them.

A page holds the keys and values of `page_len` tokens in one layer. Its layout belongs to the attention
backend, so everything is written by the backend's own `do_kv_cache_update`, into any slots. Blocks need not
begin at the start of a page.

Shapes: n tokens, L layers, G layers of a group, K key/value heads, D head size.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from blockft.attention.rope import RotaryEmbedding, rotate
from blockft.errors import UserError
from blockft.inference.block_key import KVShape
from blockft.serving.head_shard import HeadShard

WHOLE = HeadShard()
"""All heads: there is one worker."""

MAX_CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""How many numbers of keys are shifted at once, by type of the device.

A GPU needs few launches. A CPU needs temporary tensors that fit into its cache: larger ones get new memory
from the system each time, whose page faults take longer than the shift.
"""


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
    context_len: int,
    slots: torch.Tensor,
    shape: KVShape,
    shard: HeadShard = WHOLE,
) -> None:
    """Write the last tokens of a context into their slots, with keys at their positions in the prompt.

    blocks: the last local blocks of the prompt in order, (L, n, 2, K, D) each, on the host or on the device.
    context_len: the number of tokens of all local blocks of the prompt.
    slots: of the last `len(slots)` tokens of the context. The tokens before them are in pages already.
    shape: of what the pages hold of a token. shard: which heads of a block that has all heads these are.
    """
    lengths = [block.shape[1] for block in blocks]
    starts = [*itertools.accumulate(lengths, initial=context_len - sum(lengths))]
    first = context_len - len(slots)
    assert starts[0] <= first < starts[1]
    device = layers[0].kv_cache.device
    slots, max_numbers = to_device(slots, device), MAX_CHUNK_NUMBERS[device.type]
    token_len = math.prod(blocks[0].shape[3:])
    cos_sin = _cos_sin_of_blocks(rotaries, starts[:-1], device)
    for chunk in _block_chunks(lengths, max_numbers // token_len):
        begin, end = max(starts[chunk[0]], first), starts[chunk[-1] + 1]
        chunk_slots = slots[begin - first : end - first]
        chunk_cos_sin = _cos_sin_of_tokens(cos_sin, chunk, lengths, end - begin)
        for group, rotary in _layer_groups(rotaries, max_numbers // ((end - begin) * token_len)):
            parts = [blocks[index][group].to(device, non_blocking=True) for index in chunk]
            parts = [part if part.shape[3] == shape.num_kv_heads else shard.take(part) for part in parts]
            kv_Gn2KD = torch.cat(parts, dim=1) if len(chunk) > 1 else parts[0]
            keys_GnKD, values_GnKD = kv_Gn2KD[:, begin - end :].unbind(2)
            keys_GnKD = rotate(keys_GnKD, *chunk_cos_sin[id(rotary)]).contiguous()
            values_GnKD = values_GnKD.contiguous()
            for layer, keys_nKD, values_nKD in zip(layers[group], keys_GnKD, values_GnKD, strict=True):
                layer.impl.do_kv_cache_update(layer, keys_nKD, values_nKD, layer.kv_cache, chunk_slots)


CosSin = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""The cosines and sines by which each rotary embedding, named by its `id`, rotates keys."""


def _cos_sin_of_blocks(
    rotaries: Sequence[RotaryEmbedding], starts: Sequence[int], device: torch.device
) -> CosSin:
    """Return the cosines and sines of blocks that begin at `starts`: (blocks, R / 2) each."""
    starts_on_device = to_device(torch.tensor(starts), device)
    distinct = {id(rotary): rotary for rotary in rotaries}
    return {kind: rotary.cos_sin(starts_on_device, device) for kind, rotary in distinct.items()}


def _cos_sin_of_tokens(
    cos_sin: CosSin, chunk: Sequence[int], lengths: Sequence[int], num_last: int
) -> CosSin:
    """Return those of the last tokens of a chunk's blocks: (n, 1, R / 2) each, or (1, 1, R / 2)."""
    if len(chunk) == 1:  # the tokens of one block have the same angles
        repeated = np.array(chunk)
    else:
        repeated = np.repeat(chunk, [lengths[k] for k in chunk])[-num_last:]
    index = to_device(torch.from_numpy(repeated), next(iter(cos_sin.values()))[0].device)
    return {kind: (cos[index, None], sin[index, None]) for kind, (cos, sin) in cos_sin.items()}


def _block_chunks(lengths: Sequence[int], max_tokens: int) -> Iterator[Sequence[int]]:
    """Return the blocks in consecutive chunks: at least one block, at most `max_tokens` tokens each."""
    chunk: list[int] = []
    num_tokens = 0
    for index, length in enumerate(lengths):
        if chunk and num_tokens + length > max_tokens:
            yield chunk
            chunk, num_tokens = [], 0
        chunk.append(index)
        num_tokens += length
    if chunk:
        yield chunk


def _layer_groups(
    rotaries: Sequence[RotaryEmbedding], max_layers: int
) -> Iterator[tuple[slice, RotaryEmbedding]]:
    """Return consecutive layers with the same rotary embedding: at least one, at most `max_layers`."""
    start = 0
    for end in range(1, len(rotaries) + 1):
        is_last = end == len(rotaries) or rotaries[end] is not rotaries[start]
        if is_last or end - start >= max_layers:
            yield slice(start, end), rotaries[start]
            start = end


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a small tensor on the device, without waiting for the work that runs there."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def read_blocks(
    layers: Sequence[AttentionLayer], shape: KVShape, page_len: int, slots: torch.Tensor
) -> torch.Tensor:
    """Return the keys and values in slots (n,), of any number of blocks: (L, n, 2, K, D) on the device."""
    device = layers[0].kv_cache.device
    layouts = [PageLayout(layer, shape, page_len) for layer in layers]
    numbers = slots.numpy()
    pages, row = map(torch.from_numpy, np.unique(numbers // layouts[0].page_len, return_inverse=True))
    pages, row = to_device(pages, device), to_device(row[:, None, None, None], device)
    column = to_device(torch.from_numpy(numbers % layouts[0].page_len), device)
    places = {kind: torch.stack(kind, dim=1)[column] for kind in {layout.places for layout in layouts}}
    size = (len(layers), *shape.layer_shape(len(slots)))
    kv_Ln2KD = torch.empty(size, dtype=layers[0].kv_cache.dtype, device=device)
    for kv_n2KD, layer, layout in zip(kv_Ln2KD, layers, layouts, strict=True):
        kv_n2KD.copy_(layer.kv_cache[pages].reshape(len(pages), -1)[row, places[layout.places]])
    return kv_Ln2KD


def move_keys(kv_Ln2KD: torch.Tensor, rotaries: Sequence[RotaryEmbedding], distance: int) -> torch.Tensor:
    """Return keys and values with their keys `distance` positions later."""
    moved = kv_Ln2KD.clone()
    for kv_n2KD, rotary in zip(moved, rotaries, strict=True):
        kv_n2KD[:, 0] = rotary.shift(kv_n2KD[:, 0], distance)
    return moved


class PageStrides(NamedTuple):
    """Distances in a layer's pages, counted in numbers: to the next page, token, head and number of a head,
    and from keys to values. start: of the first key of a page.
    """

    page: int
    token: int
    value: int
    head: int
    dim: int
    start: int


class PageLayout:
    """Where the keys and values of a page's tokens lie in a page.

    places: the place in a page of each number of its keys and of its values, (page_len, K, D) each.
    page_len: the number of tokens in a page of the backend. The argument is that of vLLM's scheduler.

    The attention backend is asked: it writes numbers into a scratch page, and the place of each number is the
    place from which it is read. The numbers are written as digits, because a digit is exact in bfloat16.

    Raises:
        UserError: a page holds something else than the keys and values of its tokens.
    """

    _BASE = 128
    _known: dict[Any, tuple[torch.Tensor, ...]] = {}

    def __init__(self, layer: AttentionLayer, shape: KVShape, page_len: int) -> None:
        page_shape = layer.kv_cache.shape[1:]
        # a backend may split each page of the scheduler into several pages
        self.page_len = page_shape.numel() // (2 * shape.num_kv_heads * shape.head_size)
        size = (self.page_len, shape.num_kv_heads, shape.head_size)
        if 2 * math.prod(size) != page_shape.numel() or page_len % self.page_len:
            raise UserError(_layout_error(layer, "holds more than keys and values"))
        device = layer.kv_cache.device
        kind = (type(layer.impl), tuple(page_shape), layer.kv_cache.dtype, device, size)
        if kind not in self._known:
            self._known[kind] = tuple(_find_places(layer, size, part).to(device) for part in (0, 1))
        self.places = self._known[kind]

    def strides(self, cache: torch.Tensor) -> "PageStrides | None":
        """Return the strides of a layer's pages, or None if they have no strides."""
        places_n2KD = torch.stack([part.cpu() for part in self.places], dim=1)
        offsets_n2KD = torch.zeros_like(places_n2KD)
        for index, stride in zip(
            torch.unravel_index(places_n2KD, cache.shape[1:]), cache.stride()[1:], strict=True
        ):
            offsets_n2KD += index * stride
        start = int(offsets_n2KD[0, 0, 0, 0])
        expected, found = torch.full_like(offsets_n2KD, start), []
        for axis, size in enumerate(offsets_n2KD.shape):
            along = offsets_n2KD.movedim(axis, 0).reshape(size, -1)[:, 0]
            found.append(int(along[-1] - along[0]) // max(size - 1, 1))
            shape = [size if other == axis else 1 for other in range(4)]
            expected += found[-1] * torch.arange(size).reshape(shape)
        if not torch.equal(offsets_n2KD, expected):
            return None
        token, value, head, dim = found
        return PageStrides(cache.stride(0), token, value, head, dim, start)


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
