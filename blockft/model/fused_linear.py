"""Fused projections: several linear layers with the same input as one matrix product.

A question has few tokens, so the time of a projection is the time to read its weights. Small projections
(keys and values) do not use the memory's full bandwidth; fused into one matrix they do.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

FUSED_PROJECTIONS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
"""Linear layers with the same input, by module of a decoder layer. Phi-3 models have them fused already."""


class FusedLinear:
    """Several linear layers whose weights are rows of one matrix, multiplied once for all of them."""

    def __init__(self, linears: Sequence[torch.nn.Linear]) -> None:
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        self.bias = None
        if linears[0].bias is not None:
            self.bias = torch.cat([linear.bias.detach() for linear in linears])
        self.num_slices = len(linears)
        self._input: torch.Tensor | None = None
        self._product: torch.Tensor | None = None
        self._num_unused = 0

    def slice_output(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the product of `x` with some rows. The whole product is kept until every slice was used."""
        if self._product is None or self._input is not x:
            self._input, self._product = x, functional.linear(x, self.weight, self.bias)
            self._num_unused = self.num_slices
        output = self._product[..., rows]
        self._num_unused -= 1
        if not self._num_unused:
            self._input = self._product = None
        return output


class FusedLinearSlice(torch.nn.Module):
    """Replaces one of the layers of a `FusedLinear`. Its weights are a view of rows of the fused weights."""

    def __init__(self, fused: FusedLinear, rows: slice) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(fused.weight[rows], requires_grad=False)
        self.bias = None
        if fused.bias is not None:
            self.bias = torch.nn.Parameter(fused.bias[rows], requires_grad=False)
        self._fused, self._rows = fused, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._fused.slice_output(x, self._rows)


def fuse_projections(model: PreTrainedModel) -> None:
    """Fuse the projections of every decoder layer. Weights keep their values and take no more memory."""
    for layer in model.base_model.get_submodule("layers").children():
        for module_name, names in FUSED_PROJECTIONS:
            module = getattr(layer, module_name)
            if all(type(getattr(module, name, None)) is torch.nn.Linear for name in names):
                _fuse(module, names)


def _fuse(module: torch.nn.Module, names: Sequence[str]) -> None:
    linears = [getattr(module, name) for name in names]
    fused, start = FusedLinear(linears), 0
    for name, linear in zip(names, linears, strict=True):
        setattr(module, name, FusedLinearSlice(fused, slice(start, start := start + linear.out_features)))
