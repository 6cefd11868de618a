"""Tiny random models that cover every supported family and RoPE type, and random layouts for them."""

import random

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

import blockft.model.load  # noqa: F401  registers the attention backends
from blockft.attention.layout import Layout

WINDOW = 9
SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZE),
    "llama-linear": lambda: LlamaConfig(**SIZE, rope_parameters=LINEAR),
    "llama-llama3": lambda: LlamaConfig(**SIZE, rope_parameters=LLAMA3),
    "llama-yarn": lambda: LlamaConfig(**SIZE, rope_parameters=YARN),
    "mistral": lambda: MistralConfig(**SIZE, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SIZE, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**SIZE),
    "qwen2-window": lambda: Qwen2Config(
        **SIZE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SIZE, head_dim=16),
    "qwen3-yarn": lambda: Qwen3Config(**SIZE, head_dim=16, rope_parameters=YARN),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZE,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    ),
    "phi3": lambda: Phi3Config(**SIZE, eos_token_id=2, sliding_window=None),
    "phi3-partial": lambda: Phi3Config(
        **SIZE,
        eos_token_id=2,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
}
"""Configs by name. Together they cover every supported family and every supported RoPE type."""


def build_model(name: str, attention: str = "block_sdpa") -> PreTrainedModel:
    """Build the model of a named config with fixed random weights, in evaluation mode."""
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention).eval()


def random_layout(
    rng: random.Random,
    num_tokens: int,
    num_blocks: int,
    num_final: int = 1,
    *,
    local_sees_first: bool = False,
) -> Layout:
    """Return blocks of random lengths whose sum is `num_tokens`."""
    starts = [0, *sorted(rng.sample(range(1, num_tokens), num_blocks - 1))]
    ends = [*starts[1:], num_tokens]
    lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return Layout(lengths, num_final, local_sees_first)


def random_ids(rng: random.Random, num_tokens: int) -> torch.Tensor:
    """Return token ids without the padding id."""
    return torch.tensor([rng.randrange(1, SIZE["vocab_size"]) for _ in range(num_tokens)])
