"""Attention under the block mask, as functions that stock `transformers` models call.

Registered with transformers under the names in `BACKENDS` (see `blockft.model.load`); a model with that
`attn_implementation` needs `block_masks=AttentionMasks(...)` among the keywords of its forward pass
and raises
without: a forgotten or misspelt keyword would otherwise train on as plain causal attention.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from blockft.attention.layout import AttentionMetadata
from blockft.attention.mask import build_dense_mask, build_mask_mod, tile_occupancy
from blockft.attention.rotate_queries import CachedAttention

TILE = 128
"""Tokens of a tile of flex's block-sparse mask, either way."""

SMALL_TILES = {"BLOCK_M": 64, "BLOCK_N": 64}
"""Tiles of flex's forward kernel for heads of size 64. With those that PyTorch 2.11 chooses on an H100 a pass
over 8,192 tokens of SmolLM2's shape takes 2.77 ms, with these 0.12 ms."""


class AttentionMasks:
    """The masks of one batch, built on its device when first asked for; layers of one window share them.

    `vectors` describe the S key tokens of each row; the T queries of a layer are the last of them.
    """

    def __init__(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata
        self._dense: dict[tuple[int | None, int], torch.Tensor] = {}
        self._flex: dict[int | None, BlockMask] = {}

    def dense(self, window: int | None, num_queries: int) -> torch.Tensor:
        """(B, 1, T, S) bool, true where attention is allowed."""
        if (window, num_queries) not in self._dense:
            self._dense[window, num_queries] = build_dense_mask(self.metadata, window, num_queries)
        return self._dense[window, num_queries]

    def flex(self, window: int | None) -> BlockMask:
        """FlexAttention's block-sparse mask of T = S tokens."""
        if window not in self._flex:
            num_tokens = self.metadata.example_ids.shape[1]
            some, every = tile_occupancy(self.metadata, window, TILE)
            self._flex[window] = BlockMask.from_kv_blocks(
                *_tile_indices(some & ~every),
                *_tile_indices(every),
                BLOCK_SIZE=TILE,
                mask_mod=build_mask_mod(self.metadata, window),
                seq_lengths=(num_tokens, num_tokens),
            )
        return self._flex[window]

    def build(self, backend: str, windows: Iterable[int | None]) -> "AttentionMasks":
        """Build the masks of whole rows for a backend now, so that compiled layers find them made."""
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
    """Scaled dot product attention under a dense mask: the reference, on any device. Returns (B, T, H, D).

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
    """Compiled block-sparse FlexAttention: tiles that nobody may attend to are skipped. Returns (B, T, H, D).

    On a CPU PyTorch has its forward pass only.

    Raises:
        ValueError: `block_masks` is missing; attention dropout; fewer queries than keys.
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
        kernel_options=SMALL_TILES if q_BHTD.shape[3] <= 64 else None,
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


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
    cached: CachedAttention | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of final blocks over cached blocks where they lie; without `cached`, as `block_sdpa`.

    Compiled layers are left for it: which layer calls would else be compiled in, a kernel for each.
    """
    if cached is None:
        return block_sdpa(
            module,
            q_BHTD,
            keys_BKSD,
            values_BKSD,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **given,
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    return cached.attend(layer, q_BHTD, keys_BKSD, values_BKSD, scaling, sliding_window), None


BACKENDS: dict[str, Callable[..., tuple[torch.Tensor, None]]] = {
    "block_sdpa": block_sdpa,
    "block_flex": block_flex,
    "block_cached": block_cached,
}
"""The backends by the name that `attn_implementation` takes."""


def _check_masks(masks: AttentionMasks | None, keys_BKSD: torch.Tensor) -> AttentionMasks:
    if masks is None:
        raise ValueError(
            "block attention needs block_masks=AttentionMasks(...) among the model's forward keywords"
        )
    rows_and_keys = (keys_BKSD.shape[0], keys_BKSD.shape[2])
    if tuple(masks.metadata.example_ids.shape) != rows_and_keys:
        raise ValueError(
            f"block_masks describe {tuple(masks.metadata.example_ids.shape)} tokens, not {rows_and_keys}"
        )
    return masks


def _tile_indices(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of tiles how many are set (B, 1, T), and their numbers (B, 1, T, S), set ones first."""
    numbers = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1, dtype=torch.int32)[:, None], numbers.to(torch.int32)[:, None]


@cache
def _compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once per process and shape: dynamic shapes would be slower and compile again all the same."""
    return torch.compile(function, dynamic=False)
