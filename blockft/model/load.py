"""Opening models and tokenizers for Block-Attention, and refusing those for which no law is shown."""

import json
import os
from collections.abc import Mapping
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
from blockft.attention.positions import RotaryEmbedding
from blockft.errors import UserError
from blockft.model.lora import merge_adapter
from blockft.progress import is_enabled
from blockft.run_folder import RECIPE

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
"""Values of `config.model_type` for which law 4 is tested."""

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE kinds whose frequencies do not depend on the length of the prompt."""

BLOCK_ATTENTION = "block_attention.json"
"""In the folder of an adapter: what other exports say in config.json, which an adapter must not have."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types in which a model's weights may be opened."""

Auto = TypeVar("Auto")

IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "version": (1,),
    "position_scheme": ("reencoded", "local"),
    "sink_tokens": (0,),
    "local_sees_first": (False,),
    "documents_in": ("system", "user"),
    "order": ("ascending", "descending", "shuffled", "given"),
}
"""What the entry `block_attention` of an export may say."""

for _name, _backend in BACKENDS.items():
    AttentionInterface.register(_name, _backend)
if not is_enabled():
    disable_progress_bar()


def parse_dtype(name: str, auto: Auto) -> torch.dtype | Auto:
    """The type of that name; `auto` if that is its name.

    Raises:
        UserError: there is none, or not for weights.
    """
    if name not in ("auto", *DTYPES):
        raise UserError(f"dtype is {name!r}, allowed are auto, {', '.join(DTYPES)}")
    return auto if name == "auto" else DTYPES[name]


def parse_device(name: str | None) -> torch.device:
    """The device of that name, as cpu or cuda:1; the GPU, if there is one, for None.

    Raises:
        UserError: there is none.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a spelling, a number, or a torch without GPUs
        raise UserError(f"there is no device {name!r}: {str(error).splitlines()[0]}") from error


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse a model whose cached keys cannot be moved exactly.

    Raises:
        UserError: another family, RoPE kind, or a variant of a family that attends differently.
    """
    name = config.name_or_path or config.model_type
    if config.model_type not in SUPPORTED_FAMILIES:
        raise UserError(
            f"{name}: model type {config.model_type!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    for kind in sorted({rope["rope_type"] for rope in _rope_parameters(config).values()}):
        if kind not in SUPPORTED_ROPE_TYPES:
            raise UserError(
                f"{name}: RoPE kind {kind!r} is not supported (its frequencies depend on the prompt's "
                f"length); supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
            )
    for setting in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, setting, None):
            raise UserError(
                f"{name}: {setting} is set in its config.json, and such attention is not supported"
            )


def load_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a supported model, given as a folder or a Hub id; of an adapter that of its base.

    Raises:
        UserError: there is no such model, or it is not supported; see `block_attention`.
    """
    base = adapter_base_model(path)
    config = _open(AutoConfig, *(base or (path, revision)))
    if base and (entry := Path(path) / BLOCK_ATTENTION).is_file():
        try:
            config.block_attention = json.loads(entry.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{entry} is not JSON: {error}") from error
        # what is wrong with it is not the base's fault
        config.name_or_path = path
    check_supported(config)
    block_attention_config(config)
    return config


def block_attention_config(config: PreTrainedConfig) -> Mapping[str, Any]:
    """What an export says of the blocks that it was trained on; nothing if the model is none.

    Raises:
        UserError: it is no export of blockft, or asks for what this version does not do.
    """
    entry = getattr(config, "block_attention", None)
    if entry is None:
        return {}
    at = f"{config.name_or_path}: its block_attention"
    if not isinstance(entry, dict):
        raise UserError(f"{at} is {entry!r}, it should be an object, as exports have it")
    for name, allowed in IMPLEMENTED.items():
        if name in entry and entry[name] not in allowed:
            raise UserError(
                f"{at} has {name} {entry[name]!r} (allowed: {', '.join(map(str, allowed))}): "
                "use the version of blockft that wrote it"
            )
    if "prompt" in entry:
        texts, wording = ("instruction", "document", "question"), entry["prompt"]
        is_whole = isinstance(wording, dict) and sorted(wording) == sorted(texts)
        if not is_whole or not all(isinstance(text, str) for text in wording.values()):
            raise UserError(f"{at} has a prompt that does not hold just the texts {', '.join(texts)}")
        for name in ("documents_in", "order"):
            if name not in entry:
                raise UserError(f"{at} has a prompt, but no {name}")
    return entry


def adapter_base_model(path: str) -> tuple[str, str | None] | None:
    """The model and revision under the adapter in a folder; None if the folder holds none.

    Raises:
        UserError: its configuration names no model.
    """
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        return None
    try:
        settings = json.loads(adapter.read_text(encoding="utf-8"))
        return settings["base_model_name_or_path"], settings.get("revision")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{adapter} is no configuration of an adapter: {error!r}") from error


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub id.

    Raises:
        UserError: there is none.
    """
    return _open(AutoTokenizer, path, revision)


def load_model(
    path: str,
    *,
    backend: str,
    dtype: torch.dtype,
    revision: str | None = None,
    random_seed: int | None = None,
) -> PreTrainedModel:
    """A causal language model that attends by `backend` ('sdpa' or 'flex'), on the CPU, in eval mode.

    With `random_seed` its weights are drawn afresh instead of read. The folder of an adapter gives its base
    with the adapter merged in.

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
    """The model as plain transformers opens it, with full attention.

    Raises:
        UserError: there is no such model.
    """
    return _open(AutoModelForCausalLM, path, revision, dtype=dtype)


def attention_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The different sliding windows of a model's layers; None is full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return tuple(dict.fromkeys(window if kind == "sliding_attention" else None for kind in kinds))


def uses_reencoded_positions(config: PreTrainedConfig) -> bool:
    """Whether cached keys are moved to where their block stands; exports say how the model was trained.

    Raises:
        UserError: see `block_attention`.
    """
    return bool(block_attention_config(config).get("position_scheme", "reencoded") == "reencoded")


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer when it is first used; layers of one kind share their code."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.base_model.get_submodule("layers").children():
        layer.compile(dynamic=False)


def rotary_embeddings(model: PreTrainedModel) -> tuple[RotaryEmbedding, ...]:
    """The rotary embedding of each layer, with the frequencies that the model itself computes with."""
    rotary, config = model.base_model.rotary_emb, model.config
    ropes = _rope_parameters(config)
    per_kind = {
        kind: RotaryEmbedding(getattr(rotary, f"{kind}_inv_freq" if kind else "inv_freq")) for kind in ropes
    }
    if "" in per_kind:
        return (per_kind[""],) * config.num_hidden_layers
    return tuple(per_kind[kind] for kind in config.layer_types)


def _rope_parameters(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """RoPE parameters by kind of layer; the kind is '' where all layers share them."""
    parameters = config.rope_parameters
    return {"": parameters} if "rope_type" in parameters else parameters


def _open(kind: Any, path: str, revision: str | None, **settings: Any) -> Any:
    """`from_pretrained`, with its many ways to say that nothing is there turned into one sentence."""
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"model {path!r} is no folder, and no id on the Hub (owner/name) either")
    if (Path(path) / RECIPE).is_file() and not (Path(path) / "config.json").exists():
        raise UserError(f"{path} is a run, not a model: blockft export {path} FOLDER makes one of it")
    try:
        return kind.from_pretrained(path, revision=revision or "main", **settings)
    except (OSError, ValueError, SafetensorError) as error:
        is_offline = os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(path).is_dir()
        offline = " (HF_HUB_OFFLINE is set)" if is_offline else ""
        raise UserError(f"model {path!r} cannot be opened{offline}: {str(error).splitlines()[0]}") from error
