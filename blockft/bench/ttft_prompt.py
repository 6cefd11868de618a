"""The prompts that `blockft bench ttft` asks, and what their lengths alone decide."""

from typing import Any

import numpy as np
from transformers import PreTrainedModel

from blockft.attention.layout import Layout
from blockft.inference.block_key import BlockKey, block_key
from blockft.inference.runner import kv_shape


class Prompt:
    """A prompt's token ids on the host: blocks of at most `block_len` tokens, then the question."""

    def __init__(self, ids: np.ndarray, question_len: int, block_len: int) -> None:
        self.ids, self.length, self.question = ids, len(ids), ids[len(ids) - question_len :].tolist()
        context = ids[: len(ids) - question_len].astype("<i4")
        self.blocks = [context[i : i + block_len] for i in range(0, len(context), block_len)]

    def keys(self) -> list[BlockKey]:
        return [block_key(block) for block in self.blocks]

    @property
    def layout(self) -> Layout:
        return Layout((*map(len, self.blocks), len(self.question)))


def derived_figures(prompt: Prompt, model: PreTrainedModel, bandwidth: float) -> dict[str, Any]:
    """What follows from the numbers of tokens and parameters alone (Ma et al. 2025, table 2)."""
    length, asked, config = prompt.length, len(prompt.question), model.config
    # the rows of the embedding are looked up, not read, unless they are the output's too
    num_read = model.num_parameters(exclude_embeddings=not config.tie_word_embeddings)
    weight_bytes = num_read * model.dtype.itemsize
    cache_bytes = (length - asked) * kv_shape(model).token_bytes
    # QK and PV are two products of two operations for each pair of tokens, head and dimension
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * kv_shape(model).head_size
    own = asked * (asked + 1) / 2
    full_flops = 2 * model.num_parameters() * length + per_pair * length * (length + 1) / 2
    block_flops = 2 * model.num_parameters() * asked + per_pair * (asked * (length - asked) + own)
    return {
        "num_blocks": len(prompt.blocks),
        "flops_saved_percent": 100 * (1 - asked / length),
        "flops_saved_with_attention_percent": 100 * (1 - block_flops / full_flops),
        "bytes_moved": weight_bytes + cache_bytes,
        "floor_ms": (weight_bytes + cache_bytes) / bandwidth * 1000,
    }
