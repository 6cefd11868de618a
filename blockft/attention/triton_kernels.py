# mypy: ignore-errors
"""The query side as Triton programs, launched by `kernel`.

The G = H / K query heads of a key/value head stand as rows of one matrix, so that a block's keys are read
once for all of them. A program reads its share of a prompt's context, turning its queries to each block in
registers; the last program of a prompt reads the final block, too. `merge` joins their partial results.

Shapes: as in `queryside`. Logarithms are binary: exp2 is what the hardware has. (Triton's
language has no types to be checked.)
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, cache, final, parts, lses, slots, lengths, starts, offsets, shares, column, first, shift, cos,
    sin, scale, stride_qb, stride_qh, stride_qt, stride_fb, num_pieces, num_queries,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, REST: tl.constexpr, PADDED_REST: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
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

    share = shares + b * (tl.num_programs(0) + 1) + part
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
            (high * block_cos - low * block_sin).to(kind), unturned, acc, total, highest,
            cache + tl.load(slots + entry).to(tl.int64) * TOKEN + kv_head * HEAD_SIZE, begin,
            tl.load(lengths + entry), position, 0, first_position, KV_HEADS, HEAD_SIZE, PADDED, HALF,
            PADDED_HALF, REST, PADDED_REST, False, WINDOW, PRECISION, KEYS,
        )  # fmt: skip

    if part == tl.num_programs(0) - 1:
        lowest = tl.load(first + b)
        acc, total, highest = _read(
            low.to(kind), high.to(kind), unturned, acc, total, highest,
            final + b.to(tl.int64) * stride_fb + kv_head * HEAD_SIZE, (lowest // KEYS) * KEYS,
            tl.load(column) + num_queries, query_column, lowest, 0, KV_HEADS, HEAD_SIZE, PADDED, HALF,
            PADDED_HALF, REST, PADDED_REST, True, WINDOW, PRECISION, KEYS,
        )  # fmt: skip

    is_empty = total == 0.0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    lse = tl.where(is_empty, float("-inf"), highest + tl.log2(total))
    out = ((b * tl.num_programs(0) + part) * KV_HEADS * GROUP + head).to(tl.int64) * num_queries + t
    tl.store(lses + out, lse, mask=is_row)
    tl.store(parts + out[:, None] * HEAD_SIZE + dim[None, :], acc, mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def _read(
    low, high, rest, acc, total, highest, base, begin, end, query, lowest, key_shift,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr, REST: tl.constexpr, PADDED_REST: tl.constexpr, IS_FINAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax over keys `begin` to `end` after `base`, by tiles (Milakov, Gimelshein 2018).

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
def merge(
    parts, lses, out, num_parts, num_queries,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
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
def append(
    keys, values, final, column, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_fb, num_tokens,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    b, t, head = tl.program_id(0) // num_tokens, tl.program_id(0) % num_tokens, tl.program_id(1)
    dim = tl.arange(0, PADDED)
    is_dim = dim < HEAD_SIZE
    place = (tl.load(column) + t).to(tl.int64) * 2 * KV_HEADS + head
    to = final + b.to(tl.int64) * stride_fb + place * HEAD_SIZE + dim
    k = tl.load(keys + b * stride_kb + head * stride_kh + t * stride_kt + dim, mask=is_dim)
    v = tl.load(values + b * stride_vb + head * stride_vh + t * stride_vt + dim, mask=is_dim)
    tl.store(to, k, mask=is_dim)
    tl.store(to + KV_HEADS * HEAD_SIZE, v, mask=is_dim)
