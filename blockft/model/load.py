"""Load models, configurations and tokenizers from folders and from the Hub."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from blockft.attention.backends import BACKENDS
from blockft.errors import UserError
from blockft.model.lora import merge_adapter
from blockft.model.model_files import verify_model_files
from blockft.model.supported import block_attention_config, check_supported
from blockft.progress import is_enabled
from blockft.run_folder import RECIPE

BLOCK_ATTENTION = "block_attention.json"
"""The file of an adapter's export with the entry `block_attention`, because an adapter has no config.json."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types in which weights can be loaded, by name."""

Auto = TypeVar("Auto")  # the result for "auto"

for _name, _backend in BACKENDS.items():
    AttentionInterface.register(_name, _backend)
if not is_enabled():
    disable_progress_bar()


def parse_dtype(name: str, auto: Auto) -> torch.dtype | Auto:
    """Return the type with this name, or the value of `auto` for the name "auto".

    Raises:
        UserError: weights cannot have this type.
    """
    if name not in ("auto", *DTYPES):
        raise UserError(f"dtype is {name!r}, allowed are auto, {', '.join(DTYPES)}")
    return auto if name == "auto" else DTYPES[name]


def parse_device(name: str | None) -> torch.device:
    """Return the device with this name, such as cpu or cuda:1. None is the GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # RuntimeError: an unknown name or index; AssertionError: a build of PyTorch without GPUs
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r}: {str(error).splitlines()[0]}") from error


def load_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Return the configuration of a folder or Hub id; for an adapter, that of its base model.

    Raises:
        UserError: there is no such model, or it is not supported; see `blockft.model.supported`.
    """
    base = adapter_base_model(path)
    config = _open(AutoConfig, *(base or (path, revision)))
    if base and (entry := Path(path) / BLOCK_ATTENTION).is_file():
        try:
            config.block_attention = json.loads(entry.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{entry} is not JSON: {error}") from error
        # errors about the entry should name the adapter, not the base
        config.name_or_path = path
    check_supported(config)
    block_attention_config(config)
    return config


def adapter_base_model(path: str) -> tuple[str, str | None] | None:
    """Return the base model and revision of the adapter in a folder, or None if the folder has no adapter.

    Raises:
        UserError: the adapter is damaged, or its configuration does not name a base model.
    """
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        return None
    verify_model_files(path, weights=True)
    try:
        settings = json.loads(adapter.read_text(encoding="utf-8"))
        return settings["base_model_name_or_path"], settings.get("revision")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{adapter} is not the configuration of an adapter: {error!r}") from error


def verify_model(path: str, revision: str | None = None) -> None:
    """Check the weights of a model with digests, and of the base model of an adapter, before they are read.

    Raises:
        UserError: a file is damaged or missing, or was added.
    """
    verify_model_files(*(adapter_base_model(path) or (path, revision)), weights=True)


def load_tokenizer(
    path: str, revision: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder or Hub id.

    chat_template: a file with the chat template that replaces that of the tokenizer.

    Raises:
        UserError: there is no tokenizer, or the file cannot be read.
    """
    tokenizer: PreTrainedTokenizerBase = _open(AutoTokenizer, path, revision)
    if chat_template is not None:
        tokenizer.chat_template = _read_chat_template(Path(chat_template))
    return tokenizer


def _read_chat_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(f"model.chat_template {path} cannot be read: {error}") from error
    if not text.strip():
        raise UserError(f"model.chat_template {path} is empty: it should hold a Jinja template")
    return text


def load_model(
    path: str,
    *,
    backend: str,
    dtype: torch.dtype,
    revision: str | None = None,
    random_seed: int | None = None,
) -> PreTrainedModel:
    """Return a causal language model on the CPU, in eval mode.

    backend      attention backend: "sdpa", "flex" or "cached"
    random_seed  initialise random weights with this seed instead of reading weights

    For the folder of an adapter it is the base model with the adapter merged in.

    Raises:
        UserError: there is no such model, or it is not supported.
    """
    config = load_config(path, revision)
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": f"block_{backend}"}
    if random_seed is not None:
        set_seed(random_seed)
        return AutoModelForCausalLM.from_config(config, **settings).eval()
    base = adapter_base_model(path)
    model = _open(AutoModelForCausalLM, *(base or (path, revision)), config=config, **settings)
    return (merge_adapter(model, Path(path)) if base else model).eval()


def load_full_attention_model(path: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model as plain transformers opens it, with full attention.

    Raises:
        UserError: there is no such model.
    """
    return _open(AutoModelForCausalLM, path, revision, dtype=dtype)


def _open(kind: Any, path: str, revision: str | None, **settings: Any) -> Any:
    """Return `kind.from_pretrained(path)` of a verified model, with its many errors as one UserError.

    `settings` are further arguments of `from_pretrained`.
    """
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"model {path!r} is neither a folder nor an id on the Hub (owner/name)")
    if (Path(path) / RECIPE).is_file() and not (Path(path) / "config.json").exists():
        raise UserError(f"{path} is a run, not a model: export it with blockft export {path} FOLDER")
    verify_model_files(path, revision, weights=kind is AutoModelForCausalLM)
    try:
        return kind.from_pretrained(path, revision=revision or "main", **settings)
    except (OSError, ValueError, SafetensorError) as error:
        is_offline = os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(path).is_dir()
        offline = " (HF_HUB_OFFLINE is set)" if is_offline else ""
        raise UserError(f"model {path!r} cannot be opened{offline}: {str(error).splitlines()[0]}") from error
