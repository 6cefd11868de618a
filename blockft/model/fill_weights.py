"""Give a model its weights on a device, one module at a time.

The weights lie on the device and nowhere else: the host's memory holds one matrix at a time, also if several
ranks of a host load the model, and a matrix that is quantised replaces its original before the next one.
"""

from collections.abc import Callable, Mapping

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel, set_seed

from blockft.model.nf4_linear import NF4Linear, quantized_linears
from blockft.model.weights import StoredTensor


def draw_model(
    config: PreTrainedConfig,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    quantize: bool,
) -> PreTrainedModel:
    """Return a model with random weights, drawn on the device by the initialisation of the model's family.

    Numbers depend on the kind of device: the same seed gives other weights on a CPU and on a GPU.
    """
    model = _build_without_weights(config, dtype, attention)
    set_seed(seed)

    def draw(name: str, module: torch.nn.Module) -> None:
        del name
        for key, weight in module.named_parameters(recurse=False):
            setattr(module, key, torch.nn.Parameter(torch.empty_like(weight, device=device)))
        model._init_weights(module)

    return _fill(model, draw, device=device, quantize=quantize)


def read_model(
    config: PreTrainedConfig,
    stored: Mapping[str, StoredTensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    quantize: bool,
    generation_config: GenerationConfig | None = None,
) -> PreTrainedModel:
    """Return a model with the weights of files, which `check_weights` has compared with the configuration."""

    def read(name: str, module: torch.nn.Module) -> None:
        for key, _ in module.named_parameters(recurse=False):
            weight = stored[f"{name}.{key}"].read().to(device, dtype)
            setattr(module, key, torch.nn.Parameter(weight))

    model = _build_without_weights(config, dtype, attention)
    if generation_config is not None:
        model.generation_config = generation_config
    return _fill(model, read, device=device, quantize=quantize)


def _build_without_weights(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Return a model with its buffers, whose parameters have no memory."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model


@torch.no_grad()
def _fill(
    model: PreTrainedModel,
    fill_module: Callable[[str, torch.nn.Module], None],
    *,
    device: torch.device,
    quantize: bool,
) -> PreTrainedModel:
    """Give each module the parameters that are its own, and quantise them; then tie the tied ones."""
    tied = {name.removesuffix(".weight") for name in model.all_tied_weights_keys}
    quantized = {name for name, _ in quantized_linears(model)} if quantize else set()
    for name, module in [*model.named_modules()]:
        if name in tied or not any(True for _ in module.parameters(recurse=False)):
            continue
        fill_module(name, module)
        if name in quantized:
            _replace(model, name, NF4Linear(module, name))
    model.tie_weights()
    torch.nn.Module.to(model, device)  # its buffers; PreTrainedModel.to hides the type of Module.to
    assert not any(weight.is_meta for weight in model.parameters()), "a module was given no weights"
    return model


def _replace(model: PreTrainedModel, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
