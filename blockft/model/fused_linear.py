"""Projections of one input as one matrix product.

A question has few tokens, so a projection takes the time of reading its weights, and the small ones (keys and
values) do not even reach that. Side by side in one matrix they do.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

FUSED_PROJECTIONS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
"""Linear layers that read the same input, by their place in a decoder layer; Phi-3 has them joined."""


class FusedLinear:
    """Several linear layers whose weights stand in one matrix, multiplied once for all of them."""

    def __init__(self, linears: Sequence[torch.nn.Linear]) -> None:
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        self.bias = None
        if linears[0].bias is not None:
            self.bias = torch.cat([linear.bias.detach() for linear in linears])
        self.num_parts = len(linears)
        self._input: torch.Tensor | None = None
        self._product: torch.Tensor | None = None
        self._num_left = 0

    def part(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """The product with some rows; the whole is kept until every part has been asked for."""
        if self._product is None or self._input is not x:
            self._input, self._product = x, functional.linear(x, self.weight, self.bias)
            self._num_left = self.num_parts
        part = self._product[..., rows]
        self._num_left -= 1
        if not self._num_left:
            self._input = self._product = None
        return part


class FusedLinearSlice(torch.nn.Module):
    """One of the layers of a `FusedLinear`, in its place; its weights are rows of the joined ones."""

    def __init__(self, joined: FusedLinear, rows: slice) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(joined.weight[rows], requires_grad=False)
        self.bias = None
        if joined.bias is not None:
            self.bias = torch.nn.Parameter(joined.bias[rows], requires_grad=False)
        self._joined, self._rows = joined, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._joined.part(x, self._rows)


def fuse_projections(model: PreTrainedModel) -> None:
    """Put weights that multiply the same input side by side; no number changes, and no memory is taken."""
    for layer in model.base_model.get_submodule("layers").children():
        for place, names in FUSED_PROJECTIONS:
            module = getattr(layer, place)
            if all(type(getattr(module, name, None)) is torch.nn.Linear for name in names):
                _fuse(module, names)


def _fuse(module: torch.nn.Module, names: Sequence[str]) -> None:
    linears = [getattr(module, name) for name in names]
    joined, start = FusedLinear(linears), 0
    for name, linear in zip(names, linears, strict=True):
        setattr(module, name, FusedLinearSlice(joined, slice(start, start := start + linear.out_features)))
