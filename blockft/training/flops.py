"""Model arithmetic of training: the floating point operations of examples, which utilization is based on.

Counted are the matrix products of the forward and backward pass that the model itself needs: the linear
layers at each token, attention at each allowed pair of tokens, and the head at each label. Copies of the
first block (see `Layout`) are counted like other tokens, because the run computes them. Not counted are
padding, recomputation by gradient checkpointing, masked pairs, the optimizer, and the forward pass of a
teacher. An addition and a multiplication are two operations.

Shapes: N examples.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel

from blockft.attention.pairs import LayoutArrays, count_pairs
from blockft.model.decoder_layers import layer_windows
from blockft.model.supported import head_size

FORWARD = 2
"""Operations of the forward pass for each weight and token."""

FROZEN = 2 * FORWARD
"""The same with the gradient of the input, which weights need that are not trained."""

TRAINED = 3 * FORWARD
"""The same with the gradients of the input and of the weight."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating point operations of a forward and backward pass of a model.

    per_token  of its linear layers without the head, for each token
    per_label  of its head, for each label token
    per_pair   of attention in all layers with the same sliding window, for each allowed pair, by window
    """

    per_token: int
    per_label: int
    per_pair: Mapping[int | None, int]

    @classmethod
    def of_model(cls, model: PreTrainedModel | PeftModel) -> "ModelFlops":
        """Return the operations of a model, which may be on the meta device; `requires_grad` decides.

        A weight that is trained takes 6 operations for each token, and one that is frozen takes 4. In the
        layers below the first trained weight there is no backward pass: 2. Attention takes 12 operations for
        each pair and dimension of each query head: two products forward, four backward.
        """
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        config, layers = base.config, base.base_model.get_submodule("layers").children()
        is_reached = any(parameter.requires_grad for parameter in base.get_input_embeddings().parameters())
        per_token = 0
        per_pair: Counter[int | None] = Counter()
        for layer, window in zip(layers, layer_windows(config), strict=True):
            is_reached |= any(parameter.requires_grad for parameter in layer.parameters())
            per_token += _count_linear(layer, FROZEN if is_reached else FORWARD)
            # of q k and p v; the gradients of q, k, p and v are four products
            dimensions = config.num_attention_heads * head_size(config)
            per_pair[window] += 2 * FORWARD * dimensions * (3 if is_reached else 1)
        return cls(per_token, _count_linear(base.get_output_embeddings(), FROZEN), dict(per_pair))

    def count(
        self,
        layouts: LayoutArrays,
        num_labels: NDArray[np.int64],
        *,
        reencoded: bool = True,
        local_sees_first: bool = False,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the operations of training on each example in block mode and in full mode: (N,) and (N,).

        `num_labels` (N,) counts the label tokens of each example. `reencoded` is an option of
        `build_metadata`, and `local_sees_first` one of `Layout`.
        """
        # a batch of a large model has more operations than int64 can count
        linear = float(self.per_token) * layouts.num_tokens + float(self.per_label) * num_labels
        block, full = linear.copy(), linear.copy()
        if local_sees_first:
            block += float(self.per_token) * layouts.copy_lens
        for window, per_pair in self.per_pair.items():
            block_pairs, full_pairs = count_pairs(
                layouts, window, reencoded=reencoded, local_sees_first=local_sees_first
            )
            block += float(per_pair) * block_pairs
            full += float(per_pair) * full_pairs
        return block, full


def _count_linear(root: torch.nn.Module, frozen: int) -> int:
    """Return the operations of a module's linear layers for a token; `frozen` is that of a frozen weight."""
    return sum(
        (TRAINED if weight.requires_grad else frozen) * weight.numel() for weight in _linear_weights(root)
    )


def _linear_weights(root: torch.nn.Module) -> Iterator[torch.Tensor]:
    for name, module in root.named_modules():
        # peft keeps the original of a module that is trained as a whole, and does not use it
        if isinstance(module, torch.nn.Linear) and "original_module" not in name.split("."):
            yield module.weight
