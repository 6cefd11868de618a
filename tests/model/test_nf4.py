"""Weights in 4 bits: their numbers are those of bitsandbytes, and the same on every device."""

import pytest
import torch
from torch.testing import assert_close

from blockft.errors import UserError
from blockft.model.nf4 import (
    BYTES_PER_WEIGHT,
    DYNAMIC_VALUES,
    decode_scales,
    dequantize,
    quantize,
    round_to_nf4,
)

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = ((16, 32), (48, 32), (512, 384), (64, 100), (4, 16), (1, 64))


def random_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    weights = quantize(weight)
    assert torch.equal(weights.codes, codes.flatten())
    # its division by multiplication rounds a few scales to the next code
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert_close(decode_scales(weights), scales.flatten(), rtol=0, atol=0.01 * float(scales.max()))
    if len(weights.scales) > 1:  # one scale is its own offset
        assert (weights.scales == state.absmax.flatten()).float().mean() > 0.98


def test_the_code_of_scales_is_that_of_bitsandbytes() -> None:
    assert_close(torch.tensor(DYNAMIC_VALUES), functional.create_dynamic_map(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_rounded_to_a_tenth_of_their_norm(shape: tuple[int, int]) -> None:
    weight = random_weight(shape)
    rounded = round_to_nf4(weight)
    assert rounded.shape == weight.shape and rounded.dtype == weight.dtype
    assert 0 < (rounded - weight).norm() / weight.norm() < 0.12
    # numbers that came from a code keep it
    assert torch.equal(quantize(rounded).codes, quantize(weight).codes)


def test_a_weight_takes_half_a_byte_and_a_part_of_its_scales() -> None:
    weights = quantize(random_weight((1024, 1024)))
    tensors = (weights.codes, weights.scales, weights.groups)
    assert sum(tensor.nbytes for tensor in tensors) == 4 + BYTES_PER_WEIGHT * 1024**2


@pytest.mark.parametrize(
    "weight", [torch.zeros(2, 64), torch.ones(2, 64), torch.tensor([[0.0] * 64, [1.0] * 64])]
)
def test_equal_weights_keep_their_values(weight: torch.Tensor) -> None:
    assert_close(round_to_nf4(weight), weight, rtol=0, atol=1e-6)


def test_blocks_of_very_different_sizes_stay_finite() -> None:
    weight = torch.full((4, 64), 1e-30)
    weight[0], weight[1] = 3e38, -1e-38
    assert round_to_nf4(weight).isfinite().all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight = random_weight((16, 32))
    weight[3, 5] = bad
    with pytest.raises(UserError, match=r"^layers\.0\.q_proj holds weights that are not finite"):
        quantize(weight, "layers.0.q_proj")


def test_a_matrix_of_a_size_that_does_not_divide_into_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"multiple of 64 weights, q has 36: leave model\.quantization out$"):
        quantize(random_weight((6, 6)), "q")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_codes_and_numbers_of_a_cpu(dtype: torch.dtype) -> None:
    weight = random_weight((512, 384), dtype)
    on_cpu, on_gpu = quantize(weight), quantize(weight.cuda())
    for name in ("codes", "scales", "groups"):
        assert torch.equal(getattr(on_cpu, name), getattr(on_gpu, name).cpu()), name
    decoded = dequantize(on_gpu, (512, 384), dtype).cpu()
    assert torch.equal(decoded, dequantize(on_cpu, (512, 384), dtype))
