"""Launch the Triton kernels, which compute the same attention as `rotate_queries.attend_reference`.

Shapes: see `rotate_queries`.
"""

from dataclasses import dataclass

import torch
import triton

from blockft.attention import triton_kernels
from blockft.attention.cached_context import TILE_PADDING, CachedContext, QueryRotation

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """The work of a program: query rows and keys of a tile, its warps, and the tiles of keys in flight."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        assert self.keys <= TILE_PADDING, "a tile of keys would reach beyond the cache"


FEW_ROWS_TILES = (
    TileConfig(rows=16, keys=64, num_warps=4, num_stages=3),
    TileConfig(rows=16, keys=32, num_warps=4, num_stages=2),
    TileConfig(rows=16, keys=16, num_warps=4, num_stages=1),
)
MANY_ROWS_TILES = (
    TileConfig(rows=128, keys=64, num_warps=8, num_stages=3),
    TileConfig(rows=128, keys=32, num_warps=8, num_stages=2),
    TileConfig(rows=64, keys=32, num_warps=4, num_stages=2),
    *FEW_ROWS_TILES[1:],
)
"""Choices for decoding (few rows) and for questions (64 tokens are 256 rows), in order of preference. The
first ones measured best on an H100 for heads of size 128 in bfloat16. The others need less shared memory, for
larger heads, float32 and smaller GPUs."""


def choose_tile_config(
    num_rows: int, head_size: int, half: int, dtype: torch.dtype, device: torch.device
) -> TileConfig:
    """Return the first choice of tiles for which the device has enough shared memory.

    A key/value head has `num_rows` rows of queries; RoPE rotates 2 * `half` of its `head_size` dimensions.
    """
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    # `width` is that of a key, as the kernels split it, and of a value. The estimate below is an upper bound
    # of what Triton takes for the tiles of keys in flight and for the rows (sm_80, sm_89 and sm_90).
    rest = head_size - 2 * half
    width = 2 * _padded_size(half) + (_padded_size(rest) if rest else 0) + _padded_size(head_size)
    choices = FEW_ROWS_TILES if num_rows <= FEW_ROWS_TILES[0].rows else MANY_ROWS_TILES
    for tiles in choices:
        if (tiles.num_stages * tiles.keys + tiles.rows) * width * dtype.itemsize + 1024 <= shared:
            return tiles
    return choices[-1]


def choose_num_programs(
    num_rows: int, num_heads: int, head_size: int, half: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Return the number of programs that share each prompt's context, so that the GPU runs all at once.

    `num_heads` counts the key/value heads of all prompts of the batch; each has `num_rows` rows of queries.
    """
    tiles = choose_tile_config(num_rows, head_size, half, dtype, device)
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    max_resident = num_processors * (8 // tiles.num_warps)
    return int(max(1, min(64, max_resident // (num_heads * triton.cdiv(num_rows, tiles.rows)))))


def attend_cached(
    q_BHTD: torch.Tensor,
    cache_S2KD: torch.Tensor,
    final_BS2KD: torch.Tensor,
    context: CachedContext,
    rotation: QueryRotation,
    *,
    scaling: float,
    window: int | None,
    tiles: TileConfig | None = None,
) -> torch.Tensor:
    """Return the attention of final blocks over cached blocks: (B, T, H, D). See `attend_reference`."""
    num_prompts, num_heads, num_queries, head_size = q_BHTD.shape
    kv_heads = cache_S2KD.shape[2]
    group = num_heads // kv_heads
    half = rotation.cos.shape[-1]
    tiles = tiles or choose_tile_config(group * num_queries, head_size, half, q_BHTD.dtype, q_BHTD.device)
    row_tiles = triton.cdiv(group * num_queries, tiles.rows)
    num_programs = context.program_bounds.shape[1] - 1
    rest = head_size - 2 * half
    partial_size = (num_prompts, num_programs, num_heads, num_queries, head_size)
    partial_outs = q_BHTD.new_empty(partial_size, dtype=torch.float32)
    lses = partial_outs.new_empty(partial_size[:-1])
    triton_kernels.attend[(num_programs, kv_heads * row_tiles, num_prompts)](
        q_BHTD,
        cache_S2KD,
        final_BS2KD,
        partial_outs,
        lses,
        context.slots,
        context.lengths,
        context.starts,
        context.offsets,
        context.program_bounds,
        context.query_start,
        context.pad_lens,
        context.position_shifts,
        rotation.cos,
        rotation.sin,
        scaling * LOG2_E,
        *q_BHTD.stride()[:3],
        final_BS2KD.stride(0),
        context.slots.shape[1],
        num_queries,
        GROUP=group,
        KV_HEADS=kv_heads,
        HEAD_SIZE=head_size,
        PADDED=_padded_size(head_size),
        HALF=half,
        PADDED_HALF=_padded_size(half),
        REST=rest,
        PADDED_REST=_padded_size(rest),
        WINDOW=window or 0,
        PRECISION="ieee" if q_BHTD.dtype == torch.float32 else "tf32",
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    out_BTHD = q_BHTD.new_empty((num_prompts, num_queries, num_heads, head_size))
    triton_kernels.merge[(num_prompts * num_queries, num_heads)](
        partial_outs,
        lses,
        out_BTHD,
        num_programs,
        num_queries,
        HEADS=num_heads,
        HEAD_SIZE=head_size,
        PADDED=_padded_size(head_size),
        PROGRAMS=triton.next_power_of_2(num_programs),
        num_warps=1,
    )
    return out_BTHD


def append_keys_values(
    keys_BKTD: torch.Tensor, values_BKTD: torch.Tensor, final_BS2KD: torch.Tensor, query_start: torch.Tensor
) -> None:
    """Write the keys and values of T new tokens into `final_BS2KD` in place.

    query_start: the first slot along S to write; a (1,) tensor shared by all prompts.
    """
    num_prompts, kv_heads, num_tokens, head_size = keys_BKTD.shape
    triton_kernels.append[(num_prompts * num_tokens, kv_heads)](
        keys_BKTD,
        values_BKTD,
        final_BS2KD,
        query_start,
        *keys_BKTD.stride()[:3],
        *values_BKTD.stride()[:3],
        final_BS2KD.stride(0),
        num_tokens,
        KV_HEADS=kv_heads,
        HEAD_SIZE=head_size,
        PADDED=_padded_size(head_size),
        num_warps=1,
    )


def _padded_size(size: int) -> int:
    """Return the side of a tile for `size` entries: the smallest power of two that is >= `size` and >= 16."""
    return max(16, 1 << (size - 1).bit_length())
