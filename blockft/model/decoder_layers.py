"""Read the sliding windows and rotary embeddings of decoder layers; compile the layers."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from blockft.attention.backends import COMPILE_OPTIONS, allow_recompiles
from blockft.attention.rope import RotaryEmbedding
from blockft.model.supported import rope_parameters


def layer_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, in tokens. None is no window."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def attention_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Return the different sliding windows of a model's layers."""
    return tuple(dict.fromkeys(layer_windows(config)))


def rotary_embeddings(model: PreTrainedModel) -> tuple[RotaryEmbedding, ...]:
    """Return the rotary embedding of each layer, with the frequencies that the model itself uses."""
    rotary, config = model.base_model.rotary_emb, model.config
    by_layer_type = {
        layer_type: RotaryEmbedding(
            getattr(rotary, f"{layer_type}_inv_freq" if layer_type else "inv_freq"),
        )
        for layer_type in rope_parameters(config)
    }
    if "" in by_layer_type:
        return (by_layer_type[""],) * config.num_hidden_layers
    return tuple(by_layer_type[layer_type] for layer_type in config.layer_types)


def restore_frequencies(model: PreTrainedModel) -> None:
    """Give the rotary embedding of a model the float32 frequencies of its configuration.

    A model that transformers 5.17 opens in bfloat16 while ZeRO-3 is enabled has frequencies in bfloat16,
    because DeepSpeed replaces the functions that create tensors. Training would use other angles than every
    later reader of the weights.
    """
    rotary: Any = model.base_model.rotary_emb
    for name, frequencies in type(rotary)(config=model.config).named_buffers():
        setattr(rotary, name, frequencies.to(rotary.get_buffer(name).device, torch.float32))


def compile_layers(model: PreTrainedModel, *, without_hooks: bool = False) -> None:
    """Compile each decoder layer at its first use. Layers of the same kind share the compiled code.

    `without_hooks` leaves the hooks of a layer outside of the compiled code, as ZeRO-3 needs it: the hooks
    gather the weights of the layer before its code runs. Modules inside a layer must have no such hooks.
    """
    allow_recompiles()
    for layer in list_layers(model):
        if without_hooks:
            layer.forward = torch.compile(layer.forward, **COMPILE_OPTIONS)
        else:
            layer.compile(**COMPILE_OPTIONS)


def list_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the decoder layers of a model, in order."""
    return list(model.base_model.get_submodule("layers").children())
