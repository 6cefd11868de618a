"""Fingerprints of models, which depend on configuration and weights and not on names or paths."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

_IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version", "architectures", "block_attention", "dtype")
"""Entries of a configuration that do not change what the model computes."""

_INTEGER_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by the number of bytes of an element."""

_CHUNK_NUMBERS = 2**18
"""Numbers that are hashed together. Each takes 16 bytes of memory for the time."""


def model_fingerprint(model: PreTrainedModel, tokenizer: str = "") -> str:
    """Return a hash of a model's configuration and weights as loaded: 64 hexadecimal digits.

    Every number and its index count. The cost is a few passes over the weights on their device. `tokenizer`
    is the fingerprint of the tokenizer, for uses where the same token ids must mean the same text.
    """
    config = {
        name: value for name, value in model.config.to_dict().items() if name not in _IGNORED_CONFIG_KEYS
    }
    digest = hashlib.sha256((json.dumps(config, sort_keys=True, default=str) + tokenizer).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_row_hashes(weight.detach()).numpy().tobytes())
    return digest.hexdigest()


def _row_hashes(weight: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit hash of every row: the sum of its numbers, each times an odd factor of its column."""
    rows = weight.contiguous().view(_INTEGER_TYPES[weight.element_size()]).reshape(-1, weight.shape[-1])
    width = rows.shape[1]
    factors = torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    factors = factors.to(weight.device)
    chunks = rows.split(max(1, _CHUNK_NUMBERS // width))
    return torch.cat([(chunk.long() * factors).sum(dim=1) for chunk in chunks]).cpu()
