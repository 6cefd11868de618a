"""The query side on GPUs: launches the programs of `programs`, which compute `queryside.attend_reference`.

Shapes: as in `queryside`.
"""

from dataclasses import dataclass

import torch
import triton

from blockft.attention import triton_kernels
from blockft.attention.rotate_queries import SLACK, CachedContext, QueryRotation

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How the work is cut: rows and keys of a tile, warps of a program, tiles in flight."""

    rows: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        assert self.keys <= SLACK, "a tile of keys would reach beyond the cache"


FEW_ROWS_TILES = (
    TileConfig(rows=16, keys=64, warps=4, stages=3),
    TileConfig(rows=16, keys=32, warps=4, stages=2),
    TileConfig(rows=16, keys=16, warps=4, stages=1),
)
MANY_ROWS_TILES = (
    TileConfig(rows=128, keys=64, warps=8, stages=3),
    TileConfig(rows=128, keys=32, warps=8, stages=2),
    TileConfig(rows=64, keys=32, warps=4, stages=2),
    *FEW_ROWS_TILES[1:],
)
"""For decoding, and for a question of 64 tokens (256 rows). First what measured best on an H100 for heads of
128 in bfloat16; the others take less shared memory, for larger heads, float32 and smaller GPUs."""


def choose_tile_config(
    num_rows: int, head_size: int, half: int, dtype: torch.dtype, device: torch.device
) -> TileConfig:
    """The tiles for that many rows of a key/value head, of whose dimensions 2 x `half` turn: the first ones
    for which the device has the shared memory."""
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    # a key as the programs cut it, and a value; Triton takes at most so much for the tiles of keys in flight
    # and for the rows (seen in what it compiles for sm_80, sm_89 and sm_90)
    rest = head_size - 2 * half
    width = 2 * _padded_size(half) + (_padded_size(rest) if rest else 0) + _padded_size(head_size)
    choices = FEW_ROWS_TILES if num_rows <= FEW_ROWS_TILES[0].rows else MANY_ROWS_TILES
    for tiles in choices:
        if (tiles.stages * tiles.keys + tiles.rows) * width * dtype.itemsize + 1024 <= shared:
            return tiles
    return choices[-1]


def num_programs(
    num_rows: int, num_heads: int, head_size: int, half: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Among how many programs to share each prompt's blocks, if `num_heads` key/value heads of all prompts
    have that many rows each: as many as the GPU runs at once."""
    tiles = choose_tile_config(num_rows, head_size, half, dtype, device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    at_once = processors * (8 // tiles.warps)
    return int(max(1, min(64, at_once // (num_heads * triton.cdiv(num_rows, tiles.rows)))))


def attend_cached(
    q_BHTD: torch.Tensor,
    cache_S2KD: torch.Tensor,
    final_BS2KD: torch.Tensor,
    context: CachedContext,
    turned: QueryRotation,
    *,
    scaling: float,
    window: int | None,
    tiles: TileConfig | None = None,
) -> torch.Tensor:
    """See `queryside.attend_reference`. Returns (B, T, H, D)."""
    num_prompts, num_heads, num_queries, head_size = q_BHTD.shape
    kv_heads = cache_S2KD.shape[2]
    group = num_heads // kv_heads
    half = turned.cos.shape[-1]
    tiles = tiles or choose_tile_config(group * num_queries, head_size, half, q_BHTD.dtype, q_BHTD.device)
    row_tiles = triton.cdiv(group * num_queries, tiles.rows)
    num_parts = context.shares.shape[1] - 1
    rest = head_size - 2 * half
    parts = q_BHTD.new_empty((num_prompts, num_parts, num_heads, num_queries, head_size), dtype=torch.float32)
    lses = parts.new_empty(parts.shape[:-1])
    triton_kernels.attend[(num_parts, kv_heads * row_tiles, num_prompts)](
        q_BHTD,
        cache_S2KD,
        final_BS2KD,
        parts,
        lses,
        context.slots,
        context.lengths,
        context.starts,
        context.offsets,
        context.shares,
        context.column,
        context.first,
        context.shift,
        turned.cos,
        turned.sin,
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
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    out_BTHD = q_BHTD.new_empty((num_prompts, num_queries, num_heads, head_size))
    triton_kernels.merge[(num_prompts * num_queries, num_heads)](
        parts,
        lses,
        out_BTHD,
        num_parts,
        num_queries,
        HEADS=num_heads,
        HEAD_SIZE=head_size,
        PADDED=_padded_size(head_size),
        PARTS=triton.next_power_of_2(num_parts),
        num_warps=1,
    )
    return out_BTHD


def append_keys_values(
    keys_BKTD: torch.Tensor, values_BKTD: torch.Tensor, final_BS2KD: torch.Tensor, column: torch.Tensor
) -> None:
    """Write the keys and values of T new tokens into the columns of final blocks from `column` on."""
    num_prompts, kv_heads, num_tokens, head_size = keys_BKTD.shape
    triton_kernels.append[(num_prompts * num_tokens, kv_heads)](
        keys_BKTD,
        values_BKTD,
        final_BS2KD,
        column,
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
    """The size of a tile's side that holds `size` entries."""
    return max(16, 1 << (size - 1).bit_length())
