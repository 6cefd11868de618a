"""Low-rank adapters of peft: add one for training, load one from a checkpoint, or merge one."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel, set_seed

from blockft.errors import UserError

# peft uses a name that transformers deprecates
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def add_adapter(
    model: PreTrainedModel, arguments: Mapping[str, Any], *, seed: int, revision: str | None = None
) -> PeftModel:
    """Return the model with a new adapter, which is the same on every rank; only the adapter is trained.

    `arguments` are those of `peft.LoraConfig`; by default every linear layer is adapted. `revision` is that
    of the base model.

    Raises:
        UserError: peft does not accept the arguments.
    """
    set_seed(seed)
    try:
        defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "revision": revision}
        return get_peft_model(model, LoraConfig(**{**defaults, **arguments}))
    except (TypeError, ValueError) as error:
        raise UserError(f"train.lora cannot be used: {str(error).splitlines()[0]}") from error


def load_adapter(base: PreTrainedModel, checkpoint: Path, weights: Mapping[str, torch.Tensor]) -> PeftModel:
    """Return the base model with the adapter of a checkpoint; `weights` have the names of the run's model."""
    config = LoraConfig.from_pretrained(str(checkpoint))
    config.inference_mode = False
    model = get_peft_model(base, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained - weights.keys()):
        raise RuntimeError(f"the checkpoint holds no weights for {', '.join(missing[:3])}")
    # under ZeRO-0 DeepSpeed also saves frozen weights that are tied
    model.load_state_dict({name: weights[name] for name in trained}, strict=False, assign=True)
    return model


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the base model with the adapter of a folder merged into its weights.

    Raises:
        UserError: the adapter cannot be read.
    """
    try:
        adapted = PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter {str(folder)!r} cannot be opened: {str(error).splitlines()[0]}") from error
    model: PreTrainedModel = adapted.merge_and_unload()
    return model
