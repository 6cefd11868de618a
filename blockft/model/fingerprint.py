"""Fingerprints of models, which depend on configuration and weights and not on names or paths."""

import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from blockft.digest import digest_buffers, digest_json
from blockft.model.supported import local_sees_first

_IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version", "architectures", "block_attention", "dtype")
"""Entries of a configuration that do not change what the model computes."""


def model_fingerprint(model: PreTrainedModel, tokenizer: str = "") -> str:
    """Return a hash of a model's configuration and weights as loaded: 64 hexadecimal digits.

    Every bit of the weights counts, and no other weights with the same fingerprint can be constructed: see
    `blockft.digest`. So does whether local blocks see the first block, because the same weights then give
    other keys and values. The cost is one pass over the weights by all cores; weights of a GPU are copied to
    the host in chunks. `tokenizer` is the fingerprint of the tokenizer, for uses where the same token ids
    must mean the same text.
    """
    config = {
        name: value for name, value in model.config.to_dict().items() if name not in _IGNORED_CONFIG_KEYS
    }
    description = json.dumps(config, sort_keys=True, default=str)
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    digests = digest_buffers({name: _content(weight) for name, weight in parameters.items()})
    weights = [
        [name, list(weight.shape), str(weight.dtype), digests[name]] for name, weight in parameters.items()
    ]
    sees_first = ["local_sees_first"] if local_sees_first(model.config) else []
    return digest_json([description, tokenizer, weights, *sees_first])


def _content(weight: torch.Tensor) -> tuple[int, Callable[[int, int], Any]]:
    """Return the number of bytes of a tensor, and a function that copies a part of them to the host."""
    content = weight.contiguous().reshape(-1).view(torch.uint8)
    return len(content), lambda start, end: content[start:end].cpu().numpy()
