"""What a benchmark measures: a model, or random weights of a well-known shape."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from blockft.errors import UserError
from blockft.inference.device_tier import free_bytes
from blockft.model.load import load_config, load_model, parse_device
from blockft.model.random_model import SHAPES, build_random_model, load_shape_config, weight_bytes
from blockft.units import format_bytes


def is_shape(target: str) -> bool:
    """Whether a target is meant as a shape's name; models are folders or Hub ids."""
    return target in SHAPES or not Path(target).exists() and "/" not in target


def target_config(target: str) -> PreTrainedConfig:
    """The configuration of a target.

    Raises:
        UserError: no such model or shape.
    """
    return load_shape_config(target) if is_shape(target) else load_config(target)


def open_target(target: str, config: PreTrainedConfig, *, copies: int = 1) -> PreTrainedModel:
    """The target's model with attention over cached blocks, in bfloat16 on the GPU or float32 on the CPU.

    copies: how many numbers each weight needs, with itself.

    Raises:
        UserError: there is too little memory for them.
    """
    device, host = parse_device(None), torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights, name = weight_bytes(config, dtype), str(dtype).removeprefix("torch.")
    # weights are drawn where they stay, but read on the host
    needs = {device: copies * weights} if is_shape(target) else {host: weights, device: copies * weights}
    for place, needed in needs.items():
        if needed > (free := free_bytes(place)):
            beside = f", and {copies - 1} numbers beside each" if copies > 1 else ""
            raise UserError(
                f"the weights of {target}{beside} take {format_bytes(needed)} in {name}, and "
                f"{format_bytes(free)} are free on the {place.type}: choose a smaller model"
            )
    if is_shape(target):
        return build_random_model(config, device=device, dtype=dtype)
    return load_model(target, backend="cached", dtype=dtype).to(device)  # type: ignore[arg-type]
