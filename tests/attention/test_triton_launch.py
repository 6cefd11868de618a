"""The Triton kernels compute what `attend_reference` computes.

Without a GPU the kernels run in Triton's interpreter: see `tests/test_triton_interpreter.py`.
"""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blockft.attention.cached_context import TILE_PADDING
from blockft.attention.rotate_queries import attend_reference
from tests.attention.cases import Case, make_case

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")

pytestmark = [] if IS_INTERPRETED else pytest.mark.gpu

H100 = SimpleNamespace(shared_memory_per_block_optin=232448, multi_processor_count=132)

HALF = torch.float16 if IS_INTERPRETED else torch.bfloat16
"""The interpreter multiplies the bits of bfloat16 as if they were integers."""

LIMITS = {torch.float32: 1e-4, HALF: 2e-2}
"""The largest error relative to the norm of the output, by type."""

HEAD_SIZES = [{"head_size": 64}, {"head_size": 96}, {"head_size": 128}, {"head_size": 256}]
SHAPES = {
    "a quarter rotated": {"head_size": 128, "num_rotated": 32},
    "three quarters rotated": {"head_size": 128, "num_rotated": 96},
    "half of 96 rotated": {"head_size": 96, "num_rotated": 48},
    "one query head per key head": {"num_heads": 4, "num_kv_heads": 4},
    "eight query heads per key head": {"num_heads": 8, "num_kv_heads": 1},
    "one program": {"num_programs": 1},
    "many programs": {"num_programs": 40},
    "fifty blocks": {"max_blocks": 50, "num_programs": 8},
    "long blocks": {"max_len": 900, "max_query_start": 300},
}
"""Further shapes. Each one compiles the kernels once or twice."""


@pytest.fixture(autouse=True)
def tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter compute with the tiles of an H100."""
    if IS_INTERPRETED:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)


def relative_error(case: Case, device: torch.device, dtype: torch.dtype, **options: Any) -> float:
    from blockft.attention.triton_launch import attend_cached

    on_device = case.to(device).to(dtype)
    expected = on_device.to(torch.float32).attend(attend_reference)
    got = on_device.attend(partial(attend_cached, **options)).transpose(1, 2).float()
    assert got.isfinite().all()
    error = total = 0.0
    for b in range(len(got)):
        # the output of queries that are padding is undefined
        real = slice(max(0, int(case.context.pad_lens[b]) - int(case.context.query_start)), None)
        error += float((got[b, :, real] - expected[b, :, real]).square().sum())
        total += float(expected[b, :, real].square().sum())
    return (error / total) ** 0.5


def check(dtype: torch.dtype, **shape: Any) -> None:
    defaults = {"max_len": 70, "num_prompts": 2} if IS_INTERPRETED else {"max_len": 200}
    for seed in range(1 if IS_INTERPRETED else 3):
        error = relative_error(make_case(seed, **defaults | shape), DEVICE, dtype)
        assert error < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("num_queries", [1, 50])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("heads", HEAD_SIZES, ids=str)
def test_kernels_match_the_reference_for_every_head_size(
    heads: dict[str, int], window: int | None, num_queries: int, dtype: torch.dtype
) -> None:
    check(dtype, **heads, num_queries=num_queries, window=window)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_the_reference_for_every_shape(shape: str, dtype: torch.dtype) -> None:
    check(dtype, **{"head_size": 64, "num_queries": 20} | SHAPES[shape])


@pytest.mark.parametrize("shared_bytes", [101376, 166912, 232448], ids=["sm_89", "sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_tiles_fit_the_shared_memory(
    shared_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockft.attention import triton_launch

    properties = SimpleNamespace(shared_memory_per_block_optin=shared_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for head_size in (64, 96, 128, 256):
        for half in (head_size // 2, head_size // 4):
            for num_rows in (4, 256):
                tiles = triton_launch.choose_tile_config(num_rows, head_size, half, dtype, DEVICE)
                used_bytes = (tiles.num_stages * tiles.keys + tiles.rows) * 2 * head_size * dtype.itemsize
                assert used_bytes < shared_bytes


def test_tiles_longer_than_the_padding_of_the_cache_are_refused() -> None:
    from blockft.attention.triton_launch import TileConfig

    with pytest.raises(AssertionError, match="beyond the cache"):
        TileConfig(rows=16, keys=TILE_PADDING + 1, num_warps=4, num_stages=1)


@pytest.mark.parametrize("num_queries", [1, 50])
def test_kernels_match_the_reference_with_the_tiles_for_smaller_gpus(num_queries: int) -> None:
    from blockft.attention.triton_launch import FEW_ROWS_TILES, MANY_ROWS_TILES

    case = make_case(0, max_len=200, head_size=64, num_queries=num_queries)
    for tiles in {*FEW_ROWS_TILES, *MANY_ROWS_TILES}:
        error = relative_error(case, DEVICE, HALF, tiles=tiles)
        assert error < LIMITS[HALF]


@pytest.mark.parametrize("head_size", [64, 96, 128])
def test_new_keys_and_values_are_written_into_their_columns(head_size: int) -> None:
    check_append(head_size, DEVICE)


def check_append(head_size: int, device: torch.device) -> None:
    from blockft.attention.triton_launch import append_keys_values

    # the strides of a layer's keys and values: the heads of a token are contiguous
    keys, values = (torch.randn(3, 5, 2, head_size, device=device).transpose(1, 2) for _ in range(2))
    final = torch.zeros(3, 20, 2, 2, head_size, device=device)
    append_keys_values(keys, values, final, torch.tensor([4], dtype=torch.int32, device=device))
    assert torch.equal(final[:, 4:9, 0], keys.transpose(1, 2))
    assert torch.equal(final[:, 4:9, 1], values.transpose(1, 2))
    assert not final[:, :4].any() and not final[:, 9:].any()
