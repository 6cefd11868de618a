"""What tells models apart, wherever they lie and whatever they are called."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

NUM_PROBES = 1024
"""Numbers of each weight that are looked at."""

_NOT_COMPUTED = ("_name_or_path", "transformers_version")


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's configuration and of a sample of every weight, as loaded.

    Weights that were trained differ nearly everywhere, so a sample tells them apart, in a moment at any size.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        # an odd step visits all columns of a matrix
        step = weight.numel() // NUM_PROBES | 1
        probes = weight.detach().flatten()[::step].contiguous().cpu()
        digest.update(probes.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
