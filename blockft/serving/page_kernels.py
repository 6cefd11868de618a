# mypy: ignore-errors
"""The Triton kernel that copies blocks into pages and rotates their keys; `page_writer` launches it.

A program copies some tokens of one layer. Tokens of all blocks of a prompt, and all layers, are one launch.
mypy ignores this file, because Triton's language has no types.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])  # one compilation for all prompts
def copy_tokens(
    tokens, layers, cos, sin, num_tokens, num_blocks, stride_page, stride_token, stride_value, stride_head,
    stride_dim,
    DTYPE: tl.constexpr, PAGE_LEN: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """tokens (5, n): the address of a token's keys in the first layer; the distance, in numbers, to the next
    layer and to the token's values; the slot; the block. layers (2, L): the address of a layer's pages; the
    index of its rotary embedding. cos, sin (rotary embeddings, blocks, HALF). Strides are those of pages.
    The heads of a token begin at a multiple of 16 bytes everywhere, so that loads are wide.
    """
    layer = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    base = tl.load(tokens + token, mask=is_token, other=0).to(tl.pointer_type(DTYPE))
    source = base + layer * tl.load(tokens + num_tokens + token, mask=is_token, other=0)
    value_step = tl.load(tokens + 2 * num_tokens + token, mask=is_token, other=0)
    slot = tl.load(tokens + 3 * num_tokens + token, mask=is_token, other=0)
    block = tl.load(tokens + 4 * num_tokens + token, mask=is_token, other=0)
    pages = tl.load(layers + layer).to(tl.pointer_type(DTYPE))
    source = tl.multiple_of(source, 16)
    value_source = tl.multiple_of(source + value_step, 16)
    target = pages + slot // PAGE_LEN * stride_page + slot % PAGE_LEN * stride_token
    target = tl.multiple_of(target, 16)
    angle = (tl.load(layers + tl.num_programs(1) + layer) * num_blocks + block) * HALF

    pair, other, dim = tl.arange(0, PADDED_HALF), 2 * HALF + tl.arange(0, PADDED_REST), tl.arange(0, PADDED)
    is_pair = is_token[:, None] & (pair < HALF)[None, :]
    is_other = is_token[:, None] & (other < HEAD_SIZE)[None, :]
    is_dim = is_token[:, None] & (dim < HEAD_SIZE)[None, :]
    turn_cos = tl.load(cos + angle[:, None] + pair[None, :], mask=is_pair, other=0.0)
    turn_sin = tl.load(sin + angle[:, None] + pair[None, :], mask=is_pair, other=0.0)

    for head in range(KV_HEADS):
        keys = source[:, None] + head * HEAD_SIZE
        pages_of_head = target[:, None] + head * stride_head
        low = tl.load(keys + pair[None, :], mask=is_pair, other=0.0).to(tl.float32)
        high = tl.load(keys + HALF + pair[None, :], mask=is_pair, other=0.0).to(tl.float32)
        turned = low * turn_cos - high * turn_sin
        tl.store(pages_of_head + pair[None, :] * stride_dim, turned.to(DTYPE), mask=is_pair)
        turned = high * turn_cos + low * turn_sin
        tl.store(pages_of_head + (HALF + pair[None, :]) * stride_dim, turned.to(DTYPE), mask=is_pair)
        if 2 * HALF < HEAD_SIZE:
            rest = tl.load(keys + other[None, :], mask=is_other, other=0.0)
            tl.store(pages_of_head + other[None, :] * stride_dim, rest, mask=is_other)
        values_of_head = value_source[:, None] + head * HEAD_SIZE
        values = tl.load(values_of_head + dim[None, :], mask=is_dim, other=0.0)
        tl.store(pages_of_head + stride_value + dim[None, :] * stride_dim, values, mask=is_dim)
