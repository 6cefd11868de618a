"""Weights in 4 bits: the data type NF4 with double quantisation (Dettmers et al.: QLoRA, 2023, section 3).

    weight = NF4_VALUES[code] * scale                      a code of 4 bits per weight
    scale  = DYNAMIC_VALUES[scale code] * group + offset   a code of 8 bits per 64 weights,
                                                           a float32 `group` per 256 scales

The values are those of bitsandbytes (`bnb_4bit_quant_type="nf4"`, `bnb_4bit_use_double_quant=True`), except
for the rounding of a few scales. Here the codes are the same on every device: each number comes from one
correctly rounded operation, from a comparison, or from a sum of integers. An export can therefore repeat on a
CPU the quantisation of a run on a GPU.

Tensor suffixes: N weights, G groups of scales.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from blockft.errors import UserError

BLOCK_LEN = 64
"""Number of weights with one scale."""

GROUP_LEN = 256
"""Number of scales with one scale of their own."""

BYTES_PER_WEIGHT = 1 / 2 + 1 / BLOCK_LEN + 4 / (BLOCK_LEN * GROUP_LEN)
"""Size of a quantised weight with its scales, without the offset of each matrix."""

NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The numbers of NF4: quantiles of a normal distribution (QLoRA, appendix E)."""


def _list_dynamic_values() -> tuple[float, ...]:
    """Return the 256 numbers of an 8-bit dynamic tree (Dettmers: 8-bit approximations, ICLR 2016).

    Between 10^-(e+1) and 10^-e, for e = 0 to 6, lie 2^(6-e) numbers at equal distances, of both signs.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2 ** (6 - exponent)
        for index in range(count):
            value = 10.0**-exponent * (0.1 + 0.9 * (index + 0.5) / count)
            values += [value, -value]
    return tuple(sorted(values))


DYNAMIC_VALUES = _list_dynamic_values()
"""The numbers of the 8-bit code of the scales."""


@dataclass(frozen=True)
class NF4Weights:
    """The weights of a matrix in 4 bits.

    codes    (N/2,) uint8, two codes each, the first one in the upper half
    scales   (N/64,) uint8
    groups   (1 + G,) int32: the bits of the offset and of the scales of the groups, which are float32. Code
             that converts the weights of a model to another float type leaves integers alone.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor


def quantize(weight: torch.Tensor, name: str = "weight") -> NF4Weights:
    """Return a matrix in 4 bits, on its device.

    Raises:
        UserError: the number of weights is not a multiple of 64, or a weight is not finite.
    """
    if weight.numel() % BLOCK_LEN:
        raise UserError(
            f"model.quantization=nf4 needs matrices of a multiple of {BLOCK_LEN} weights, {name} has "
            f"{weight.numel():,}: leave model.quantization out"
        )
    blocks = weight.detach().reshape(-1, BLOCK_LEN).float()
    absmax_N = blocks.abs().amax(dim=1)
    if not absmax_N.isfinite().all():
        raise UserError(f"{name} holds weights that are not finite: fetch the model again")
    codes = _nearest(_divide(blocks, absmax_N[:, None]), NF4_VALUES).reshape(-1, 2)
    scales, groups = _quantize_scales(absmax_N)
    return NF4Weights(codes[:, 0] << 4 | codes[:, 1], scales, groups)


def _quantize_scales(absmax_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales in 8 bits, and the bits of their offset and of their groups."""
    offset = absmax_N.new_tensor(_mean(absmax_N))
    centered = absmax_N - offset
    padded = functional.pad(centered, (0, -len(centered) % GROUP_LEN)).reshape(-1, GROUP_LEN)
    absmax_G = padded.abs().amax(dim=1)
    codes = _nearest(_divide(padded, absmax_G[:, None]), DYNAMIC_VALUES)
    groups = torch.cat([offset[None], absmax_G]).view(torch.int32)
    return codes.reshape(-1)[: len(absmax_N)], groups


def _mean(values: torch.Tensor) -> float:
    """Return the mean of numbers of at least 0, rounded to multiples of 2^-36 of the largest one.

    A sum of floats depends on its order, which is not the same on every device; one of integers does not.
    """
    exponent = math.frexp(float(values.max()))[1] - 36
    integers = torch.ldexp(values.double(), values.new_tensor(-exponent, dtype=torch.int32)).round().long()
    return math.ldexp(int(integers.sum()) / len(values), exponent)


def _divide(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return values relative to the largest one, and 0 where that is 0."""
    return torch.where(largest > 0, values / largest, 0)


def _nearest(values: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """Return for each value the index of the nearest number of a sorted table."""
    numbers = torch.tensor(table, dtype=torch.float64)
    midpoints = ((numbers[1:] + numbers[:-1]) / 2).to(values)
    return torch.bucketize(values, midpoints, out_int32=True).to(torch.uint8)


def dequantize(weights: NF4Weights, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix that 4-bit weights stand for: the reference for faster kernels."""
    scales_N = decode_scales(weights)
    codes = torch.stack([weights.codes >> 4, weights.codes & 15], dim=1).reshape(-1, BLOCK_LEN)
    values = torch.tensor(NF4_VALUES, device=codes.device)[codes.int()]
    return (values * scales_N[:, None]).reshape(shape).to(dtype)


def decode_scales(weights: NF4Weights) -> torch.Tensor:
    """Return the scale of each 64 weights as float32 (N/64,)."""
    offset, absmax_G = weights.groups.view(torch.float32).split([1, len(weights.groups) - 1])
    values = torch.tensor(DYNAMIC_VALUES, device=offset.device)[weights.scales.int()]
    return values * absmax_G.repeat_interleave(GROUP_LEN)[: len(values)] + offset


def round_to_nf4(weight: torch.Tensor, name: str = "weight") -> torch.Tensor:
    """Return the numbers that the weights of a matrix have after they were quantised, in their own type."""
    return dequantize(quantize(weight, name), tuple(weight.shape), weight.dtype)
