"""Gradient checkpointing: which decoder layers recompute their activations in the backward pass."""

import warnings

from transformers import PreTrainedModel

EVERY = {"none": 0, "selective": 2, "full": 1}
"""Kinds of gradient checkpointing, from the least recomputation to the most: every nth layer, 0 is none."""


def list_checkpointed(kind: str, num_layers: int) -> tuple[bool, ...]:
    """Return for each decoder layer whether a kind of gradient checkpointing recomputes it.

    ::

        none       no layer
        selective  every second layer, beginning with the first
        full       every layer

    A checkpointed layer keeps only its input. Whole layers are chosen, rather than operations inside a layer,
    because the policies of torch.utils.checkpoint that keep the outputs of some operations do not reach into
    compiled layers. With an even number of layers `selective` does not checkpoint the last one: the backward
    pass frees its activations before the first recomputed layer needs memory.
    """
    every = EVERY[kind]
    return tuple(every > 0 and index % every == 0 for index in range(num_layers))


def checkpoint_layers(model: PreTrainedModel, kind: str) -> None:
    """Checkpoint exactly the decoder layers that `list_checkpointed` names.

    Losses and gradients do not change. Layers may be compiled before or after it.
    """
    layers = list(model.base_model.get_submodule("layers").children())
    chosen = list_checkpointed(kind, len(layers))
    if any(chosen):
        with warnings.catch_warnings():
            # the oldest supported transformers lacks the new name of this method
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer, is_checkpointed in zip(layers, chosen, strict=True):
        assert isinstance(getattr(layer, "gradient_checkpointing", None), bool)
        layer.gradient_checkpointing = is_checkpointed  # type: ignore[assignment]
