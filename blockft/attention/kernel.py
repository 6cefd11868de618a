"""The query side as fused Triton kernels, for GPUs; `queryside.attend_plainly` is what they compute.

The G = H / K query heads of a key/value head stand as rows of one matrix, so that a block's keys are read once
for all of them. A program reads its share of a prompt's blocks, turning its queries to each of them in
registers; the first program of a prompt reads the final block. A second kernel merges their partial results.

Shapes: as in `queryside`; R = G * T rows of a key/value head, P programs that share a prompt's blocks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from blockft.attention.queryside import CachedContext, Turns

LOG2_E = 1.4426950408889634

SLACK = 128
"""Tokens that have to follow the last one in a cache and in a final block: tiles are loaded whole."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work is cut: rows and keys of a tile, warps of a program, tiles in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


FEW_ROWS = Tiles(rows=16, keys=64, warps=4, stages=3)
MANY_ROWS = Tiles(rows=128, keys=64, warps=8, stages=3)
"""What measured best on an H100 for heads of size 128: decoding, and the 256 rows of a question of 64 tokens."""


def tiles_for(num_rows: int) -> Tiles:
    """The tiles for that many rows of a key/value head."""
    return FEW_ROWS if num_rows <= FEW_ROWS.rows else MANY_ROWS


def num_programs(num_rows: int, num_heads: int, device: torch.device) -> int:
    """Among how many programs to share each prompt's blocks, if `num_heads` key/value heads of all prompts
    have that many rows each: as many as the GPU runs at once."""
    tiles = tiles_for(num_rows)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    at_once = processors * (8 // tiles.warps)
    return max(1, min(64, at_once // (num_heads * triton.cdiv(num_rows, tiles.rows))))


def attend(
    q_BHTD: torch.Tensor,
    cache_S2KD: torch.Tensor,
    final_BS2KD: torch.Tensor,
    context: CachedContext,
    turned: Turns,
    *,
    scaling: float,
    window: int | None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """See `queryside.attend_plainly`. Returns (B, T, H, D)."""
    num_prompts, num_heads, num_queries, head_size = q_BHTD.shape
    kv_heads = cache_S2KD.shape[2]
    group = num_heads // kv_heads
    tiles = tiles or tiles_for(group * num_queries)
    row_tiles = triton.cdiv(group * num_queries, tiles.rows)
    num_parts = context.shares.shape[1]  # the shares of the context, and the final block
    half = turned.cos.shape[-1]
    rest = head_size - 2 * half
    parts = q_BHTD.new_empty((num_prompts, num_parts, num_heads, num_queries, head_size), dtype=torch.float32)
    lses = parts.new_empty(parts.shape[:-1])
    _attend[(num_parts, kv_heads * row_tiles, num_prompts)](
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
        PADDED=_padded(head_size),
        HALF=half,
        PADDED_HALF=_padded(half),
        REST=rest,
        PADDED_REST=_padded(rest),
        WINDOW=window or 0,
        PRECISION="ieee" if q_BHTD.dtype == torch.float32 else "tf32",
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    out_BTHD = q_BHTD.new_empty((num_prompts, num_queries, num_heads, head_size))
    _merge[(num_prompts * num_queries, num_heads)](
        parts,
        lses,
        out_BTHD,
        num_parts,
        num_queries,
        HEADS=num_heads,
        HEAD_SIZE=head_size,
        PADDED=_padded(head_size),
        PARTS=triton.next_power_of_2(num_parts),
        num_warps=1,
    )
    return out_BTHD


def append(
    keys_BKTD: torch.Tensor, values_BKTD: torch.Tensor, final_BS2KD: torch.Tensor, column: torch.Tensor
) -> None:
    """Write the keys and values of T new tokens into the columns of final blocks from `column` on."""
    num_prompts, kv_heads, num_tokens, head_size = keys_BKTD.shape
    _append[(num_prompts * num_tokens, kv_heads)](
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
        PADDED=_padded(head_size),
        num_warps=1,
    )


def _padded(size: int) -> int:
    """The size of a tile's side that holds `size` entries."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _attend(
    q,
    cache,
    final,
    parts,
    lses,
    slots,
    lengths,
    starts,
    offsets,
    shares,
    column,
    first,
    shift,
    cos,
    sin,
    scale,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_fb,
    num_pieces,
    num_queries,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    REST: tl.constexpr,
    PADDED_REST: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    part, b = tl.program_id(0), tl.program_id(2)
    row_tiles = tl.num_programs(1) // KV_HEADS
    kv_head, row_tile = tl.program_id(1) // row_tiles, tl.program_id(1) % row_tiles
    TOKEN: tl.constexpr = 2 * KV_HEADS * HEAD_SIZE

    row = row_tile * ROWS + tl.arange(0, ROWS)
    is_row = row < GROUP * num_queries
    head, t = kv_head * GROUP + row // num_queries, row % num_queries
    query_column = tl.load(column) + t
    position = query_column + tl.load(shift + b)

    # the pairs of dimensions that turn together stand in two tiles of their own, what RoPE leaves alone in a
    # third: as one tile and its partner they take 4.2 ms where so they take 3.1 (8B shape, 32K tokens)
    pair = tl.arange(0, PADDED_HALF)
    other = 2 * HALF + tl.arange(0, PADDED_REST)
    dim = tl.arange(0, PADDED)
    is_pair, is_other, is_dim = pair < HALF, other < HEAD_SIZE, dim < HEAD_SIZE
    rows_q = (q + b * stride_qb + head * stride_qh + t * stride_qt)[:, None]
    low = tl.load(rows_q + pair[None, :], mask=is_row[:, None] & is_pair[None, :], other=0.0)
    high = tl.load(rows_q + HALF + pair[None, :], mask=is_row[:, None] & is_pair[None, :], other=0.0)
    kind = low.dtype
    low, high = low.to(tl.float32) * scale, high.to(tl.float32) * scale
    unturned = tl.load(rows_q + other[None, :], mask=is_row[:, None] & is_other[None, :], other=0.0)
    unturned = (unturned.to(tl.float32) * scale).to(kind)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED), tl.float32)

    if part == 0:
        lowest = tl.load(first + b)
        acc, total, highest = _read(
            low.to(kind),
            high.to(kind),
            unturned,
            acc,
            total,
            highest,
            final + b.to(tl.int64) * stride_fb + kv_head * HEAD_SIZE,
            (lowest // KEYS) * KEYS,
            tl.load(column) + num_queries,
            query_column,
            lowest,
            0,
            KV_HEADS,
            HEAD_SIZE,
            PADDED,
            HALF,
            PADDED_HALF,
            REST,
            PADDED_REST,
            True,
            WINDOW,
            PRECISION,
            KEYS,
        )
    else:
        share = shares + b * tl.num_programs(0) + part - 1
        for n in range(tl.load(share), tl.load(share + 1)):
            entry = b * num_pieces + n
            first_position = tl.load(offsets + entry) + tl.load(starts + entry)
            begin = 0
            if WINDOW > 0:
                oldest = tl.load(column) + tl.load(shift + b) - WINDOW + 1
                begin = tl.maximum(0, (oldest - first_position) // KEYS * KEYS)
            block_cos = tl.load(cos + entry * HALF + pair, mask=is_pair, other=0.0)[None, :]
            block_sin = tl.load(sin + entry * HALF + pair, mask=is_pair, other=0.0)[None, :]
            acc, total, highest = _read(
                (low * block_cos + high * block_sin).to(kind),
                (high * block_cos - low * block_sin).to(kind),
                unturned,
                acc,
                total,
                highest,
                cache + tl.load(slots + entry).to(tl.int64) * TOKEN + kv_head * HEAD_SIZE,
                begin,
                tl.load(lengths + entry),
                position,
                0,
                first_position,
                KV_HEADS,
                HEAD_SIZE,
                PADDED,
                HALF,
                PADDED_HALF,
                REST,
                PADDED_REST,
                False,
                WINDOW,
                PRECISION,
                KEYS,
            )

    is_empty = total == 0.0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    lse = tl.where(is_empty, float("-inf"), highest + tl.log2(total))
    out = ((b * tl.num_programs(0) + part) * KV_HEADS * GROUP + head).to(tl.int64) * num_queries + t
    tl.store(lses + out, lse, mask=is_row)
    tl.store(parts + out[:, None] * HEAD_SIZE + dim[None, :], acc, mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def _read(
    low,
    high,
    rest,
    acc,
    total,
    highest,
    base,
    begin,
    end,
    query,
    lowest,
    key_shift,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    REST: tl.constexpr,
    PADDED_REST: tl.constexpr,
    IS_FINAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Go on with the softmax over keys `begin` to `end` behind `base`, tile by tile (Milakov and Gimelshein 2018).

    In a final block keys count as columns, from `lowest` on and up to the query's own.
    """
    TOKEN: tl.constexpr = 2 * KV_HEADS * HEAD_SIZE
    VALUES: tl.constexpr = KV_HEADS * HEAD_SIZE
    pair, dim = tl.arange(0, PADDED_HALF), tl.arange(0, PADDED)
    other = 2 * HALF + tl.arange(0, PADDED_REST)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        at_key = base + key[None, :] * TOKEN
        if PADDED_HALF == HALF:
            scores = tl.dot(low, tl.load(at_key + pair[:, None]), input_precision=PRECISION)
            scores = tl.dot(high, tl.load(at_key + HALF + pair[:, None]), scores, input_precision=PRECISION)
        else:
            is_pair = (pair < HALF)[:, None]
            low_keys = tl.load(at_key + pair[:, None], mask=is_pair, other=0.0)
            high_keys = tl.load(at_key + HALF + pair[:, None], mask=is_pair, other=0.0)
            scores = tl.dot(low, low_keys, input_precision=PRECISION)
            scores = tl.dot(high, high_keys, scores, input_precision=PRECISION)
        if REST > 0:
            is_other = (other < HEAD_SIZE)[:, None]
            rest_keys = tl.load(at_key + other[:, None], mask=is_other, other=0.0)
            scores = tl.dot(rest, rest_keys, scores, input_precision=PRECISION)
        allowed = (key < end)[None, :]
        if IS_FINAL:
            allowed = (key[None, :] <= query[:, None]) & (key >= lowest)[None, :]
        if WINDOW > 0:
            allowed = allowed & (query[:, None] - (key_shift + key)[None, :] < WINDOW)
        scores = tl.where(allowed, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        reference = new_highest
        if IS_FINAL or WINDOW > 0:
            reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - reference[:, None])
        fade = tl.exp2(highest - reference)
        at_value = base + VALUES + key[:, None] * TOKEN + dim[None, :]
        if PADDED == HEAD_SIZE:
            values = tl.load(at_value)
        else:
            values = tl.load(at_value, mask=(dim < HEAD_SIZE)[None, :], other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        highest = new_highest
    return acc, total, highest


@triton.jit
def _merge(
    parts,
    lses,
    out,
    num_parts,
    num_queries,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    b, t, head = tl.program_id(0) // num_queries, tl.program_id(0) % num_queries, tl.program_id(1)
    part, dim = tl.arange(0, PARTS), tl.arange(0, PADDED)
    entry = ((b * num_parts + part) * HEADS + head).to(tl.int64) * num_queries + t
    is_part, is_dim = part < num_parts, dim < HEAD_SIZE
    lse = tl.load(lses + entry, mask=is_part, other=float("-inf"))
    highest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    values = tl.load(
        parts + entry[:, None] * HEAD_SIZE + dim[None, :], mask=is_part[:, None] & is_dim[None, :], other=0.0
    )
    merged = tl.sum(values * weights[:, None], 0)
    to = ((b * num_queries + t) * HEADS + head).to(tl.int64) * HEAD_SIZE
    tl.store(out + to + dim, merged.to(out.dtype.element_ty), mask=is_dim)


@triton.jit
def _append(
    keys,
    values,
    final,
    column,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_fb,
    num_tokens,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    b, t, head = tl.program_id(0) // num_tokens, tl.program_id(0) % num_tokens, tl.program_id(1)
    dim = tl.arange(0, PADDED)
    is_dim = dim < HEAD_SIZE
    place = (tl.load(column) + t).to(tl.int64) * 2 * KV_HEADS + head
    to = final + b.to(tl.int64) * stride_fb + place * HEAD_SIZE + dim
    k = tl.load(keys + b * stride_kb + head * stride_kh + t * stride_kt + dim, mask=is_dim)
    v = tl.load(values + b * stride_vb + head * stride_vh + t * stride_vt + dim, mask=is_dim)
    tl.store(to, k, mask=is_dim)
    tl.store(to + KV_HEADS * HEAD_SIZE, v, mask=is_dim)
