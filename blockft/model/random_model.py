"""Models with the shape of a known model and random weights, for measuring speed without its weights."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, set_seed

from blockft.errors import UserError, list_allowed

LLAMA_3 = {"vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        **LLAMA_3,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        **LLAMA_3,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""Arguments of `LlamaConfig` by name of the shape. Every shape has 131,072 positions."""

INIT_STD = 0.02


def load_shape_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a shape.

    Raises:
        UserError: there is no shape with this name.
    """
    if name not in SHAPES:
        raise UserError(
            f"there is no shape {name!r}: give a model, or a shape ({list_allowed(name, SHAPES)})"
        )
    return LlamaConfig(**SHAPES[name], max_position_embeddings=131072)


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the size of a model's weights, without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def build_random_model(
    config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model on the device, with attention over cached blocks.

    The outputs of deeper layers are scaled by 1 / sqrt(2 * depth), and embeddings have variance 1, as in the
    initialisation for training. With equal variances everywhere, rounding to 16 bits alone changes the logits
    by 7 % of their norm.
    """
    set_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="block_cached")
    with torch.no_grad():
        for depth, layer in enumerate(model.base_model.layers, start=1):
            for linear in (layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.weight.normal_(std=INIT_STD / (2 * depth) ** 0.5)
        if not config.tie_word_embeddings:
            model.get_output_embeddings().weight.normal_(std=config.hidden_size**-0.5)
            model.get_input_embeddings().weight.normal_(std=1)
    return model.eval()
