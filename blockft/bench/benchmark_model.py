"""The model that a benchmark measures: a saved model, or random weights of a well-known shape."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from blockft.errors import UserError
from blockft.inference.device_tier import free_bytes
from blockft.model.load import load_config, load_model, parse_device
from blockft.model.random_model import SHAPES, build_random_model, load_shape_config, weight_bytes
from blockft.units import format_memory


def is_shape(model_or_shape: str) -> bool:
    """Return whether the text names a shape; a model is an existing folder or a Hub id with a slash."""
    return model_or_shape in SHAPES or not Path(model_or_shape).exists() and "/" not in model_or_shape


def load_benchmark_config(model_or_shape: str) -> PreTrainedConfig:
    """Return the configuration of a model or a shape.

    Raises:
        UserError: no model or shape has that name.
    """
    return load_shape_config(model_or_shape) if is_shape(model_or_shape) else load_config(model_or_shape)


def load_benchmark_model(
    model_or_shape: str, config: PreTrainedConfig, *, copies: int = 1
) -> PreTrainedModel:
    """Load a model, or draw random weights of a shape, with attention over cached blocks.

    The dtype is bfloat16 on the GPU and float32 on the CPU.

    copies: how many numbers the benchmark stores per weight, the weight included (training stores 4).

    Raises:
        UserError: there is too little memory for the weights and their copies.
    """
    device, host = parse_device(None), torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    num_bytes, dtype_name = weight_bytes(config, dtype), str(dtype).removeprefix("torch.")
    # random weights are drawn on the device itself, saved weights pass through the host's memory
    if is_shape(model_or_shape):
        needed_bytes = {device: copies * num_bytes}
    else:
        needed_bytes = {host: num_bytes, device: copies * num_bytes}
    for place, needed in needed_bytes.items():
        if needed > (free := free_bytes(place)):
            extra = f" with {copies - 1} more numbers per weight" if copies > 1 else ""
            raise UserError(
                f"the weights of {model_or_shape}{extra} take {format_memory(needed)} in {dtype_name}, but "
                f"only {format_memory(free)} are free on the {place.type}: choose a smaller model"
            )
    if is_shape(model_or_shape):
        return build_random_model(config, device=device, dtype=dtype)
    return load_model(model_or_shape, backend="cached", dtype=dtype).to(device)  # type: ignore[arg-type]
