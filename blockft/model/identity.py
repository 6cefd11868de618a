"""What tells models apart, wherever they lie and whatever they are called."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

_NOT_COMPUTED = ("_name_or_path", "transformers_version", "architectures", "block_attention", "dtype")
"""Entries of a configuration that change no number that the model computes."""


def model_fingerprint(model: PreTrainedModel, tokenizer: str = "") -> str:
    """A hash of a model's configuration and of all its weights, as loaded: 64 hexadecimal digits.

    Every number counts, at the speed of one pass over them on the device that holds them. `tokenizer` is what
    identifies the tokenizer, where token ids have to mean the same.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED}
    digest = hashlib.sha256((json.dumps(config, sort_keys=True, default=str) + tokenizer).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        # row by row, for the order of what is hashed together does not count
        rows = torch.hash_tensor(weight.detach(), dim=-1) if weight.ndim > 1 else weight.detach()
        digest.update(rows.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
