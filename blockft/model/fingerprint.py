"""What tells models apart, wherever they lie and whatever they are called."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

_NOT_COMPUTED = ("_name_or_path", "transformers_version", "architectures", "block_attention", "dtype")
"""Entries of a configuration that change no number that the model computes."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers of as many bytes."""

_AT_ONCE = 2**18
"""Numbers that are hashed together; each takes 16 bytes meanwhile."""


def model_fingerprint(model: PreTrainedModel, tokenizer: str = "") -> str:
    """A hash of a model's configuration and of all its weights, as loaded: 64 hexadecimal digits.

    Every number counts, and its place, at the speed of a few passes over them on the device that holds them.
    `tokenizer` is what identifies the tokenizer, where token ids have to mean the same.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED}
    digest = hashlib.sha256((json.dumps(config, sort_keys=True, default=str) + tokenizer).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_row_hashes(weight.detach()).numpy().tobytes())
    return digest.hexdigest()


def _row_hashes(weight: torch.Tensor) -> torch.Tensor:
    """A hash of 64 bits of every row: the sum of its words, each times an odd number of its place's own."""
    rows = weight.contiguous().view(_WORDS[weight.element_size()]).reshape(-1, weight.shape[-1])
    width = rows.shape[1]
    factors = torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    factors = factors.to(weight.device)
    parts = rows.split(max(1, _AT_ONCE // width))
    return torch.cat([(part.long() * factors).sum(dim=1) for part in parts]).cpu()
