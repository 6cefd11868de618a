"""Attention under the block mask, as functions that unmodified `transformers` models call.

`blockft.model.load` registers them with transformers under the names in `BACKENDS`. A model with such an
`attn_implementation` needs the argument `block_masks=AttentionMasks(...)` in its forward pass. Without it the
functions raise, because a forgotten or misspelt argument would silently give plain causal attention.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Protocol

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from blockft.attention.layout import AttentionMetadata
from blockft.attention.mask import KeyRanges, build_dense_mask, build_range_mask_mod, tile_occupancy

FLEX_TILE_LEN = 128
"""Side of a tile of FlexAttention's block-sparse mask, in tokens."""

FORWARD_OPTIONS = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4}
"""Options of FlexAttention's forward kernel. A pass over 8,192 tokens of SmolLM2's shape takes 0.12 ms with
them, and 2.77 ms with those that PyTorch 2.11 chooses on an H100."""

BACKWARD_OPTIONS = {
    "bwd_BLOCK_M1": 64,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 64,
    "bwd_num_stages": 2,
    "bwd_num_warps": 4,
}
"""Options of its backward kernel in 16 bits. On an H200, real rows take 5 % less time with them in the shape
of Llama-3-8B, and 8 % less in that of Llama-3.2-1B, than with those that PyTorch 2.11 chooses."""

RECOMPILE_LIMIT = 64
"""Combinations of shapes for which a function is compiled: both modes, both passes, lengths of rows, kinds of
layers. PyTorch's own limit of 8 is soon reached."""

COMPILE_OPTIONS: dict[str, Any] = {"dynamic": False, "options": {"deterministic": True}}
"""How PyTorch compiles. Dynamic shapes are slower and also recompile. `deterministic` keeps it from choosing
kernels of sums by measuring their time, so that a resumed run computes the digits of the run before. On an
H200, training steps in the shape of Llama-3.2-1B take as long as without it."""


class AttentionMasks:
    """The masks of one batch, built on its device at first use. Layers with the same window share a mask.

    `metadata` describes the S key tokens of each row. The T queries of a layer are the last of them.
    """

    def __init__(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata
        self._dense: dict[tuple[int | None, int], torch.Tensor] = {}
        self._flex: dict[int | None, BlockMask] = {}
        self._ranges: KeyRanges | None = None
        device = metadata.example_ids.device
        # read here, because compiled layers should not ask for it
        self.is_on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)

    def dense(self, window: int | None, num_queries: int) -> torch.Tensor:
        """Return the dense mask: (B, 1, T, S) bool, true where attention is allowed."""
        if (window, num_queries) not in self._dense:
            self._dense[window, num_queries] = build_dense_mask(self.metadata, window, num_queries)
        return self._dense[window, num_queries]

    def flex(self, window: int | None) -> BlockMask:
        """Return FlexAttention's block-sparse mask, for T = S tokens."""
        if window not in self._flex:
            num_tokens = self.metadata.example_ids.shape[1]
            self._ranges = ranges = self._ranges or KeyRanges.of_metadata(self.metadata)
            any_allowed, all_allowed = tile_occupancy(self.metadata, window, FLEX_TILE_LEN, ranges=ranges)
            self._flex[window] = BlockMask.from_kv_blocks(
                *_tile_indices(any_allowed & ~all_allowed),
                *_tile_indices(all_allowed),
                BLOCK_SIZE=FLEX_TILE_LEN,
                mask_mod=build_range_mask_mod(ranges, self.metadata, window),
                seq_lengths=(num_tokens, num_tokens),
            )
        return self._flex[window]

    def build(self, backend: str, windows: Iterable[int | None]) -> "AttentionMasks":
        """Build the masks of whole rows now, so that compiled layers do not build them. Returns self."""
        for window in windows:
            if backend == "block_flex":
                self.flex(window)
            else:
                self.dense(window, self.metadata.example_ids.shape[1])
        return self


def block_sdpa(
    module: torch.nn.Module,
    q_BHTD: torch.Tensor,
    keys_BKSD: torch.Tensor,
    values_BKSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    block_masks: AttentionMasks | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return scaled dot product attention under a dense mask, on any device: (B, T, H, D) and None.

    Raises:
        ValueError: `block_masks` is missing.
    """
    mask = _check_masks(block_masks, keys_BKSD).dense(sliding_window, q_BHTD.shape[2])
    out_BHTD = torch.nn.functional.scaled_dot_product_attention(
        q_BHTD, keys_BKSD, values_BKSD, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


def block_flex(
    module: torch.nn.Module,
    q_BHTD: torch.Tensor,
    keys_BKSD: torch.Tensor,
    values_BKSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    block_masks: AttentionMasks | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return compiled block-sparse FlexAttention, which skips masked tiles: (B, T, H, D) and None.

    On a CPU, PyTorch has no backward pass for it.

    Raises:
        ValueError: `block_masks` is missing, `dropout` is not 0, or there are fewer queries than keys.
    """
    masks = _check_masks(block_masks, keys_BKSD)
    if dropout:
        raise ValueError("the flex backend has no attention dropout: set attention_dropout to 0 or use sdpa")
    if q_BHTD.shape[2] != keys_BKSD.shape[2]:
        raise ValueError("the flex backend attends within whole rows: use sdpa with cached keys")
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compile_once(flex_attention)
    out_BHTD = attend(
        q_BHTD,
        keys_BKSD,
        values_BKSD,
        block_mask=masks.flex(sliding_window),
        scale=scaling,
        enable_gqa=True,
        kernel_options=_kernel_options(q_BHTD, masks.is_on_hopper),
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


class LayerAttention(Protocol):
    """The attention of one forward pass, which every layer calls."""

    def attend(
        self,
        layer: int,
        q_BHTD: torch.Tensor,
        keys_BKTD: torch.Tensor,
        values_BKTD: torch.Tensor,
        scaling: float,
        window: int | None,
        /,
    ) -> torch.Tensor:
        """Return the attention output: (B, T, H, D)."""
        ...


@torch.compiler.disable  # type: ignore[untyped-decorator]
def block_cached(
    module: torch.nn.Module,
    q_BHTD: torch.Tensor,
    keys_BKSD: torch.Tensor,
    values_BKSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    cached_attention: LayerAttention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of final blocks over cached blocks: (B, T, H, D) and None.

    `cached_attention` computes it: `CachedAttention`, or `ScaledContextAttention` of an evaluation.

    Without `cached_attention` it is `block_sdpa`. It is never compiled: the layer's index would be compiled
    in as a constant, which gives a kernel per layer.
    """
    if cached_attention is None:
        return block_sdpa(
            module,
            q_BHTD,
            keys_BKSD,
            values_BKSD,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    return cached_attention.attend(layer, q_BHTD, keys_BKSD, values_BKSD, scaling, sliding_window), None


BACKENDS: dict[str, Callable[..., tuple[torch.Tensor, None]]] = {
    "block_sdpa": block_sdpa,
    "block_flex": block_flex,
    "block_cached": block_cached,
}
"""The backends, by the name that `attn_implementation` takes."""


def _check_masks(masks: AttentionMasks | None, keys_BKSD: torch.Tensor) -> AttentionMasks:
    if masks is None:
        raise ValueError(
            "block attention needs the argument block_masks=AttentionMasks(...) in the model's forward pass"
        )
    expected, found = (keys_BKSD.shape[0], keys_BKSD.shape[2]), tuple(masks.metadata.example_ids.shape)
    if found != expected:
        raise ValueError(f"block_masks describe {found} rows and keys, the layer has {expected}")
    return masks


def _kernel_options(q_BHTD: torch.Tensor, is_on_hopper: bool) -> dict[str, Any] | None:
    """Return the options of FlexAttention's kernels, or None where PyTorch chooses better ones."""
    head_dim, is_16_bit = q_BHTD.shape[3], q_BHTD.dtype.itemsize == 2
    if head_dim <= 64:
        return FORWARD_OPTIONS | (BACKWARD_OPTIONS if is_16_bit else {})
    # larger heads fit into the shared memory of Hopper, but not into that of every GPU
    if head_dim <= 128 and is_16_bit and is_on_hopper:
        return FORWARD_OPTIONS | BACKWARD_OPTIONS
    return None


def _tile_indices(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each row of tiles, the number of set tiles and their indices, set tiles first.

    `tiles` is (B, T, S) bool, counted in tiles. The results are (B, 1, T) and (B, 1, T, S) int32.
    """
    indices = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]


def allow_recompiles() -> None:
    """Let PyTorch compile a function for `RECOMPILE_LIMIT` combinations of shapes, instead of 8."""
    config = torch.compiler.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)


@cache
def _compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, compiled once per shape.

    `fullgraph` makes PyTorch raise an error after `RECOMPILE_LIMIT` shapes. It would otherwise run the
    function without compiling it, and FlexAttention would then compute all scores as one dense matrix.
    """
    allow_recompiles()
    return torch.compile(function, fullgraph=True, **COMPILE_OPTIONS)
