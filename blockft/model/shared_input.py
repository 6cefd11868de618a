"""One product for the adapters of linear layers that read the same input: q, k and v; gate and up.

The product of an input with one matrix A of a low-rank adapter costs as much as reading the input. The
modules keep their names and parameters. The first module of a group computes the product for all of them.
Only training shares products: other passes may replace the weights of each module while it computes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import PreTrainedModel

from blockft.model.nf4_linear import NF4Linear

ATTENTION_GROUP = ("q_proj", "k_proj", "v_proj")
MLP_GROUP = ("gate_proj", "up_proj")
"""Modules that read the same input, in the order in which the model calls them."""


class AdapterGroup:
    """Linear layers with an adapter that read the same input, and their products between two calls."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = tuple(modules)
        self._input: torch.Tensor | None = None
        self._products: tuple[torch.Tensor, ...] = ()

    def product(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return A(x) of the module `index`. The first module computes all; the last one forgets them."""
        if index == 0:
            matrices = [module.lora_A[module.active_adapters[0]].weight for module in self._modules]
            product = F.linear(x.to(matrices[0].dtype), torch.cat(matrices))
            self._input, self._products = x, product.split([len(matrix) for matrix in matrices], dim=-1)
        assert self._input is x, "the modules of a group read different inputs, or in another order"
        product = self._products[index]
        if index == len(self._modules) - 1:
            self._input, self._products = None, ()
        return product


class SharedAdapterLinear(LoraLinear):
    """A linear layer with an adapter in a group."""

    input_group: AdapterGroup
    index_in_group: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.disable_adapters or self.merged:
            return super().forward(x)
        (name,) = self.active_adapters
        base: torch.Tensor = self.base_layer(x)
        product = self.input_group.product(self.index_in_group, x)
        return (base + self.lora_B[name](product) * self.scaling[name]).to(base.dtype)


def share_products(model: PreTrainedModel) -> int:
    """Let the adapters of each group in a model's layers compute one product; return the number of groups.

    Groups with dropout, with other kinds of adapters, or with an adapter on some modules only stay as they
    are. The parameters of a group are read together, so ZeRO-3, which gathers them module by module, cannot
    be used.
    """
    num_groups = 0
    for parent in model.base_model.get_submodule("layers").modules():
        for names in (ATTENTION_GROUP, MLP_GROUP):
            modules: list[Any] = [parent._modules.get(name) for name in names]
            if not all(type(module) is LoraLinear and _is_plain(module) for module in modules):
                continue
            group = AdapterGroup(modules)
            for index, module in enumerate(modules):
                # for another `forward` of each instance, each layer would be compiled alone
                module.__class__ = SharedAdapterLinear
                module.input_group, module.index_in_group = group, index
            num_groups += 1
    return num_groups


def _is_plain(module: Any) -> bool:
    """Return whether an adapted module computes base(x) + B(A(x)) * scaling, without dropout or variants."""
    if len(module.active_adapters) != 1:
        return False
    (name,) = module.active_adapters
    return (
        type(module.base_layer) in (torch.nn.Linear, NF4Linear)
        and name in module.lora_A
        and name not in module.lora_variant
        and isinstance(module.lora_dropout[name], torch.nn.Identity)
        and module.lora_A[name].bias is None
    )
