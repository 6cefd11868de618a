# mypy: ignore-errors
"""Triton kernels of attention by rotating queries; `triton_launch` launches them.

The G = H / K query heads of a key/value head are the rows of one matrix, so that a block's keys are read once
for all of them. A program reads some chunks of a prompt's context and rotates its queries for each chunk in
registers. The last program of a prompt also reads the final block. `merge` combines the partial results.

Shapes: see `rotate_queries`. Logarithms are binary, because GPUs compute exp2. mypy ignores this file,
because Triton's language has no types.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, cache, final, partial_outs, lses, slots, lengths, starts, offsets, program_bounds, query_start,
    pad_lens, position_shifts, cos, sin, scale, stride_qb, stride_qh, stride_qt, stride_fb, num_chunks,
    num_queries,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, REST: tl.constexpr, PADDED_REST: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    program, b = tl.program_id(0), tl.program_id(2)
    row_tiles = tl.num_programs(1) // KV_HEADS
    kv_head, row_tile = tl.program_id(1) // row_tiles, tl.program_id(1) % row_tiles
    TOKEN: tl.constexpr = 2 * KV_HEADS * HEAD_SIZE

    row = row_tile * ROWS + tl.arange(0, ROWS)
    is_row = row < GROUP * num_queries
    head, t = kv_head * GROUP + row // num_queries, row % num_queries
    query_column = tl.load(query_start) + t
    position = query_column + tl.load(position_shifts + b)

    # The two dimensions of a rotated pair are in two tiles, the dimensions that RoPE leaves unchanged in a
    # third. This takes 3.1 ms (8B shape, 32K tokens); a whole tile and a swapped copy of it take 4.2 ms.
    pair = tl.arange(0, PADDED_HALF)
    other = 2 * HALF + tl.arange(0, PADDED_REST)
    dim = tl.arange(0, PADDED)
    is_pair, is_other, is_dim = pair < HALF, other < HEAD_SIZE, dim < HEAD_SIZE
    rows_q = (q + b * stride_qb + head * stride_qh + t * stride_qt)[:, None]
    low = tl.load(rows_q + pair[None, :], mask=is_row[:, None] & is_pair[None, :], other=0.0)
    high = tl.load(rows_q + HALF + pair[None, :], mask=is_row[:, None] & is_pair[None, :], other=0.0)
    dtype = low.dtype
    low, high = low.to(tl.float32) * scale, high.to(tl.float32) * scale
    unrotated = tl.load(rows_q + other[None, :], mask=is_row[:, None] & is_other[None, :], other=0.0)
    unrotated = (unrotated.to(tl.float32) * scale).to(dtype)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED), tl.float32)

    bounds = program_bounds + b * (tl.num_programs(0) + 1) + program
    for n in range(tl.load(bounds), tl.load(bounds + 1)):
        entry = b * num_chunks + n
        first_position = tl.load(offsets + entry) + tl.load(starts + entry)
        begin = 0
        if WINDOW > 0:
            oldest = tl.load(query_start) + tl.load(position_shifts + b) - WINDOW + 1
            begin = tl.maximum(0, (oldest - first_position) // KEYS * KEYS)
        block_cos = tl.load(cos + entry * HALF + pair, mask=is_pair, other=0.0)[None, :]
        block_sin = tl.load(sin + entry * HALF + pair, mask=is_pair, other=0.0)[None, :]
        acc, total, highest = _attend_keys(
            (low * block_cos + high * block_sin).to(dtype),
            (high * block_cos - low * block_sin).to(dtype), unrotated, acc, total, highest,
            cache + tl.load(slots + entry).to(tl.int64) * TOKEN + kv_head * HEAD_SIZE, begin,
            tl.load(lengths + entry), position, 0, first_position, KV_HEADS, HEAD_SIZE, PADDED, HALF,
            PADDED_HALF, REST, PADDED_REST, False, WINDOW, PRECISION, KEYS,
        )  # fmt: skip

    if program == tl.num_programs(0) - 1:
        lowest = tl.load(pad_lens + b)
        acc, total, highest = _attend_keys(
            low.to(dtype), high.to(dtype), unrotated, acc, total, highest,
            final + b.to(tl.int64) * stride_fb + kv_head * HEAD_SIZE, (lowest // KEYS) * KEYS,
            tl.load(query_start) + num_queries, query_column, lowest, 0, KV_HEADS, HEAD_SIZE, PADDED, HALF,
            PADDED_HALF, REST, PADDED_REST, True, WINDOW, PRECISION, KEYS,
        )  # fmt: skip

    is_empty = total == 0.0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    lse = tl.where(is_empty, float("-inf"), highest + tl.log2(total))
    out = ((b * tl.num_programs(0) + program) * KV_HEADS * GROUP + head).to(tl.int64) * num_queries + t
    tl.store(lses + out, lse, mask=is_row)
    is_output = is_row[:, None] & is_dim[None, :]
    tl.store(partial_outs + out[:, None] * HEAD_SIZE + dim[None, :], acc, mask=is_output)


@triton.jit
def _attend_keys(
    low, high, rest, acc, total, highest, base, begin, end, query, lowest, first_position,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr, REST: tl.constexpr, PADDED_REST: tl.constexpr, IS_FINAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Update an online softmax with keys `begin` to `end - 1` after `base` (Milakov and Gimelshein 2018).

    In a final block a key's index is its column; columns from `lowest` to the query's own are allowed.
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
            allowed = allowed & (query[:, None] - (first_position + key)[None, :] < WINDOW)
        scores = tl.where(allowed, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        finite_highest = new_highest
        if IS_FINAL or WINDOW > 0:
            finite_highest = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - finite_highest[:, None])
        rescale = tl.exp2(highest - finite_highest)
        at_value = base + VALUES + key[:, None] * TOKEN + dim[None, :]
        if PADDED == HEAD_SIZE:
            values = tl.load(at_value)
        else:
            values = tl.load(at_value, mask=(dim < HEAD_SIZE)[None, :], other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
        total = total * rescale + tl.sum(weights, 1)
        highest = new_highest
    return acc, total, highest


@triton.jit
def merge(
    partial_outs, lses, out, num_programs, num_queries,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    b, t, head = tl.program_id(0) // num_queries, tl.program_id(0) % num_queries, tl.program_id(1)
    program, dim = tl.arange(0, PROGRAMS), tl.arange(0, PADDED)
    entry = ((b * num_programs + program) * HEADS + head).to(tl.int64) * num_queries + t
    is_program, is_dim = program < num_programs, dim < HEAD_SIZE
    lse = tl.load(lses + entry, mask=is_program, other=float("-inf"))
    highest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    values = tl.load(
        partial_outs + entry[:, None] * HEAD_SIZE + dim[None, :],
        mask=is_program[:, None] & is_dim[None, :],
        other=0.0,
    )
    merged = tl.sum(values * weights[:, None], 0)
    target = ((b * num_queries + t) * HEADS + head).to(tl.int64) * HEAD_SIZE
    tl.store(out + target + dim, merged.to(out.dtype.element_ty), mask=is_dim)


@triton.jit
def append(
    keys, values, final, query_start, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_fb, num_tokens,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    b, t, head = tl.program_id(0) // num_tokens, tl.program_id(0) % num_tokens, tl.program_id(1)
    dim = tl.arange(0, PADDED)
    is_dim = dim < HEAD_SIZE
    token_head = (tl.load(query_start) + t).to(tl.int64) * 2 * KV_HEADS + head
    target = final + b.to(tl.int64) * stride_fb + token_head * HEAD_SIZE + dim
    k = tl.load(keys + b * stride_kb + head * stride_kh + t * stride_kt + dim, mask=is_dim)
    v = tl.load(values + b * stride_vb + head * stride_vh + t * stride_vt + dim, mask=is_dim)
    tl.store(target, k, mask=is_dim)
    tl.store(target + KV_HEADS * HEAD_SIZE, v, mask=is_dim)
