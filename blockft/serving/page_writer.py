"""Write cached blocks into pages by one Triton kernel; `pages.write_blocks` is the reference.

Shapes: n tokens, L layers, K key/value heads, D head size, R rotated dimensions of a head.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import torch

from blockft.attention.rope import RotaryEmbedding
from blockft.errors import UserError, first_line
from blockft.inference.block_key import KVShape
from blockft.serving.head_shard import HeadShard
from blockft.serving.pages import WHOLE, AttentionLayer, PageLayout, PageStrides, to_device

MAX_STAGED_BYTES = 1 << 29
"""Size of the blocks on the host that are copied to the device before one launch."""

TOKENS_OF_PROGRAM = 16

ALIGNMENT = 16
"""Bytes to whose multiples the kernel's addresses are aligned."""

_log = logging.getLogger("blockft.serving")


class PageWriter:
    """Copies blocks into the pages of all layers, and rotates their keys to their positions.

    Raises:
        UserError: the kernel cannot write the pages of this attention backend or the keys of this model.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        rotaries: Sequence[RotaryEmbedding],
        shape: KVShape,
        page_len: int,
        shard: HeadShard = WHOLE,
    ) -> None:
        layouts = {PageLayout(layer, shape, page_len).strides(layer.kv_cache) for layer in layers}
        strides = next(iter(layouts))
        self._rotaries = list({id(rotary): rotary for rotary in rotaries}.values())
        item, num_kinds = shape.torch_dtype.itemsize, len({r.inv_freq.shape for r in self._rotaries})
        if len(layouts) != 1 or strides is None:
            raise UserError(_refusal(layers, "whose numbers do not lie at regular distances"))
        if num_kinds != 1:
            raise UserError(_refusal(layers, "of layers that rotate different numbers of dimensions"))
        if not _is_aligned(strides, shape):
            raise UserError(
                _refusal(layers, f"in which a head does not take a multiple of {ALIGNMENT} bytes")
            )
        self._shape, self._shard, self._strides = shape, shard, strides
        self._page_len = PageLayout(layers[0], shape, page_len).page_len
        self._device = layers[0].kv_cache.device
        addresses = [layer.kv_cache.data_ptr() + strides.start * item for layer in layers]
        kind_of = {id(rotary): kind for kind, rotary in enumerate(self._rotaries)}
        kinds = [kind_of[id(rotary)] for rotary in rotaries]
        self._layers = torch.tensor([addresses, kinds], device=self._device)
        self._kernels = _import_kernels()

    def warm_up(self) -> None:
        """Compile the kernel, which takes a second. This writes slot 0, which no request may use yet."""
        size = (self._shape.num_layers, *self._shape.layer_shape(1))
        block = torch.zeros(size, dtype=self._shape.torch_dtype, device=self._device)
        self.write([block], 1, torch.zeros(1, dtype=torch.int64))
        torch.cuda.synchronize(self._device)  # an error of the kernel shows here, and not in a later step

    def write(self, blocks: Sequence[torch.Tensor], context_len: int, slots: torch.Tensor) -> None:
        """Write the last tokens of a context; see `pages.write_blocks`."""
        lengths = [block.shape[1] for block in blocks]
        starts = [*itertools.accumulate(lengths, initial=context_len - sum(lengths))]
        first = context_len - len(slots)
        assert starts[0] <= first < starts[1]
        for chunk in self._chunks(blocks):
            on_device = [self._heads(blocks[index]) for index in chunk]
            begin = max(starts[chunk[0]], first)
            chunk_slots = slots[begin - first : starts[chunk[-1] + 1] - first]
            self._launch(on_device, [starts[index] for index in chunk], chunk_slots)

    def _heads(self, block: torch.Tensor) -> torch.Tensor:
        on_device = block.to(self._device, non_blocking=True)
        return on_device if block.shape[3] == self._shape.num_kv_heads else self._shard.take(on_device)

    def _chunks(self, blocks: Sequence[torch.Tensor]) -> Iterator[list[int]]:
        """Return consecutive blocks, of which those on the host have a limited size: at least one block."""
        chunk: list[int] = []
        staged = 0
        for index, block in enumerate(blocks):
            num_bytes = 0 if block.device == self._device else block.nbytes
            if chunk and staged + num_bytes > MAX_STAGED_BYTES:
                yield chunk
                chunk, staged = [], 0
            chunk.append(index)
            staged += num_bytes
        yield chunk

    def _launch(self, blocks: Sequence[torch.Tensor], starts: Sequence[int], slots: torch.Tensor) -> None:
        """Write the last `len(slots)` tokens of blocks on the device, which begin at `starts`."""
        num_tokens = len(slots)
        tokens = to_device(_describe_tokens(blocks, slots), self._device)
        starts_on_device = to_device(torch.tensor(starts), self._device)
        cos_sin = [rotary.cos_sin(starts_on_device, self._device) for rotary in self._rotaries]
        cos, sin = (torch.stack(parts) for parts in zip(*cos_sin, strict=True))
        half, head_size = cos.shape[-1], self._shape.head_size
        strides = self._strides
        grid = (-(-num_tokens // TOKENS_OF_PROGRAM), self._shape.num_layers)
        self._kernels.copy_tokens[grid](
            *(tokens, self._layers, cos, sin, num_tokens, len(blocks)),
            *(strides.page, strides.token, strides.value, strides.head, strides.dim),
            DTYPE=_triton_dtype(self._shape.torch_dtype),
            PAGE_LEN=self._page_len,
            KV_HEADS=self._shape.num_kv_heads,
            HEAD_SIZE=head_size,
            PADDED=_power_of_2(head_size),
            HALF=half,
            PADDED_HALF=_power_of_2(half),
            PADDED_REST=_power_of_2(max(head_size - 2 * half, 1)),
            TOKENS=TOKENS_OF_PROGRAM,
        )


def open_page_writer(
    choice: str,
    layers: Sequence[AttentionLayer],
    rotaries: Sequence[RotaryEmbedding],
    shape: KVShape,
    page_len: int,
    shard: HeadShard = WHOLE,
) -> tuple[PageWriter | None, str]:
    """Return the kernel, or None where PyTorch writes the pages (`pages.write_blocks`), and the reason.

    choice: torch, triton, or auto: the kernel on a GPU whose pages suit it, otherwise PyTorch. A kernel that
        suits the pages and fails, such as one that Triton cannot compile, is also a warning.

    Raises:
        UserError: the kernel was asked for and cannot be used.
    """
    if choice == "torch":
        return None, "--page-writer torch"
    try:
        device = layers[0].kv_cache.device
        if device.type != "cuda":
            raise UserError(f"the Triton kernel cannot write pages on a {device.type.upper()}")
        writer = PageWriter(layers, rotaries, shape, page_len, shard)
        writer.warm_up()
    except Exception as error:  # Triton has classes of its own for what it cannot compile
        if choice == "triton":
            raise UserError(f"{first_line(error)}: use --page-writer torch") from error
        if isinstance(error, UserError):
            return None, first_line(error)
        _log.warning("the Triton kernel that writes pages fails, and PyTorch takes longer", exc_info=error)
        return None, f"the Triton kernel fails ({first_line(error)})"
    return writer, "--page-writer triton" if choice == "triton" else "the pages suit its kernel"


def _describe_tokens(blocks: Sequence[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
    """Return what the kernel needs to know of the last `len(slots)` tokens of blocks: (5, n) int64.

    By NumPy, because operations of PyTorch on the CPU wake all its threads, which takes milliseconds.
    """
    facts = []
    for block in blocks:
        assert block.stride()[3:] == (block.shape[4], 1), "the heads of a token are contiguous"
        assert block.data_ptr() % ALIGNMENT == block.stride(2) * block.element_size() % ALIGNMENT == 0
        token_bytes = block.stride(1) * block.element_size()
        facts.append((block.data_ptr(), token_bytes, block.stride(0), block.stride(2)))
    lengths = np.array([block.shape[1] for block in blocks])
    index = np.repeat(np.arange(len(blocks)), lengths)
    token = np.arange(len(index)) - (np.cumsum(lengths) - lengths)[index]
    address, token_bytes, layer_step, value_step = np.array(facts).T
    start = len(index) - len(slots)
    described = (address[index] + token * token_bytes[index], layer_step[index], value_step[index])
    return torch.from_numpy(np.stack([*(part[start:] for part in described), slots.numpy(), index[start:]]))


def _refusal(layers: Sequence[AttentionLayer], reason: str) -> str:
    return f"the Triton kernel cannot write pages of {type(layers[0].impl).__name__} {reason}"


def _is_aligned(strides: PageStrides, shape: KVShape) -> bool:
    """Return whether the heads of a token begin at a multiple of `ALIGNMENT`, in pages and in blocks."""
    steps = (strides.start, strides.page, strides.token, shape.head_size)
    return all(step * shape.torch_dtype.itemsize % ALIGNMENT == 0 for step in steps)


def _import_kernels() -> ModuleType:
    """Return the kernels, for which Triton is needed."""
    from blockft.serving import page_kernels

    return page_kernels


def _triton_dtype(dtype: torch.dtype) -> object:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
