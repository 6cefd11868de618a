"""Low-rank adapters, by peft: added to a model for training, and put on it again for an export."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel, set_seed

from blockft.errors import UserError

# peft asks transformers for it under the name of before
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def add_adapter(
    model: PreTrainedModel, arguments: Mapping[str, Any], *, seed: int, revision: str | None = None
) -> PeftModel:
    """The model with an adapter, the same on every rank; only the adapter is trained.

    `arguments` are those of `peft.LoraConfig`; every linear layer is adapted unless they say otherwise.

    Raises:
        UserError: peft does not accept them.
    """
    set_seed(seed)
    try:
        given = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "revision": revision, **arguments}
        config = LoraConfig(**given)
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise UserError(f"train.lora cannot be used: {str(error).splitlines()[0]}") from error


def load_adapter(base: PreTrainedModel, checkpoint: Path, weights: Mapping[str, torch.Tensor]) -> PeftModel:
    """The base model under a checkpoint's adapter, whose `weights` are named as in the run."""
    config = LoraConfig.from_pretrained(str(checkpoint))
    config.inference_mode = False
    model = get_peft_model(base, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained - weights.keys()):
        raise RuntimeError(f"the checkpoint holds no weights for {', '.join(missing[:3])}")
    # DeepSpeed's stage 0 keeps frozen tied weights, too
    model.load_state_dict({name: weights[name] for name in trained}, strict=False, assign=True)
    return model


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base model with the adapter that a folder holds merged in.

    Raises:
        UserError: the adapter cannot be read.
    """
    try:
        adapted = PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter {str(folder)!r} cannot be opened: {str(error).splitlines()[0]}") from error
    model: PreTrainedModel = adapted.merge_and_unload()
    return model
