"""Linear layers with weights in 4 bits, which are computed in the type of the run.

The layer is an operator of its own: forward and backward both compute the matrix from its codes, so that no
activation memory holds it. `torch.compile` takes the operator as it is; otherwise it would compute the matrix
once and keep it until the backward pass.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from blockft.errors import UserError
from blockft.model.nf4 import BLOCK_LEN, DYNAMIC_VALUES, GROUP_LEN, quantize


def check_bitsandbytes(setting: str) -> None:
    """Check that bitsandbytes is installed; `setting` is what needs it.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{setting} needs the package bitsandbytes, which is not installed: "
            "pip install 'blockft[quantization]'"
        )


def quantized_linears(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yield names and layers whose weights are quantised: the linear layers of all decoder layers.

    Embeddings, head and norms are not among them.
    """
    layers = model.base_model.get_submodule("layers")
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for name, module in layers.named_modules(prefix=prefix):
        if isinstance(module, torch.nn.Linear):
            yield name, module


class NF4Linear(torch.nn.Linear):
    """A linear layer with the weights of another one in 4 bits, and with its bias.

    Codes and scales are frozen parameters of whole numbers: DeepSpeed sends them to all ranks, leaves them
    out of checkpoints, and does not round them with the other weights.
    """

    def __init__(self, linear: torch.nn.Linear, name: str) -> None:
        """Quantise `linear`, on its device; `name` is for errors.

        Raises:
            UserError: see `quantize`.
        """
        # the parameters are assigned below
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight_dtype, self.bias = linear.weight.dtype, linear.bias
        parts = quantize(linear.weight, name)
        self.weight = torch.nn.Parameter(parts.codes, requires_grad=False)
        self.weight_scales = torch.nn.Parameter(parts.scales, requires_grad=False)
        self.weight_groups = torch.nn.Parameter(parts.groups, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.blockft.nf4_linear(
            x, self.weight, self.weight_scales, self.weight_groups, self.out_features, self.weight_dtype
        )
        return out if self.bias is None else out + self.bias


def decode_matrix(
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    shape: tuple[int, int],
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the matrix in `dtype`, rounded to `weight_dtype` first; equals `nf4.dequantize`."""
    import bitsandbytes  # noqa: F401  registers its operators

    values = groups.view(torch.float32)
    table = torch.tensor(DYNAMIC_VALUES, device=codes.device)
    kernels = torch.ops.bitsandbytes
    decoded = kernels.dequantize_blockwise(scales, values[1:], table, GROUP_LEN, torch.float32)
    decoded += values[0]
    # given the matrix's own shape, bitsandbytes 0.50 takes wrong scales on CPUs if rows are shorter than 64
    blocks = (len(scales), BLOCK_LEN)
    matrix: torch.Tensor = kernels.dequantize_4bit(codes, decoded, BLOCK_LEN, "nf4", blocks, weight_dtype)
    return matrix.reshape(shape).to(dtype)


@torch.library.custom_op("blockft::nf4_linear", mutates_args=())
def _nf4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    out_features: int,
    weight_dtype: torch.dtype,
) -> torch.Tensor:
    shape = (out_features, x.shape[-1])
    return functional.linear(x, decode_matrix(codes, scales, groups, shape, weight_dtype, x.dtype))


@torch.library.custom_op("blockft::nf4_linear_backward", mutates_args=())
def _nf4_linear_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    in_features: int,
    weight_dtype: torch.dtype,
) -> torch.Tensor:
    shape = (grad.shape[-1], in_features)
    return grad @ decode_matrix(codes, scales, groups, shape, weight_dtype, grad.dtype)


@_nf4_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    out_features: int,
    weight_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@_nf4_linear_backward.register_fake
def _(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    in_features: int,
    weight_dtype: torch.dtype,
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, codes, scales, groups, _, weight_dtype = inputs
    ctx.save_for_backward(codes, scales, groups)
    ctx.in_features, ctx.weight_dtype = x.shape[-1], weight_dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    codes, scales, groups = ctx.saved_tensors
    grad_x = torch.ops.blockft.nf4_linear_backward(
        grad.contiguous(), codes, scales, groups, ctx.in_features, ctx.weight_dtype
    )
    return grad_x, None, None, None, None, None


_nf4_linear.register_autograd(_backward, setup_context=_save_for_backward)
