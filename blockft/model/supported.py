"""Check that a model or export is supported; read its RoPE parameters and its `block_attention` entry."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from blockft.errors import UserError

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
"""Values of `config.model_type` for which tests show that cached blocks give the masked forward's logits."""

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the prompt."""

_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""RoPE types whose frequencies do depend on it."""

_LARGEST_NUMBER = 1e30
"""Bound of numbers that are no sizes; it also excludes infinity."""

_OLD_ROPE_TYPES = {"su": "longrope"}
"""Present names of RoPE types by their old names."""

_LARGEST_SIZES = {
    "vocab_size": 2**31,
    "hidden_size": 2**31,
    "intermediate_size": 2**31,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**20,
    "num_key_value_heads": 2**20,
    "head_dim": 2**20,
    "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
}
"""Settings of config.json that are sizes, with bounds far beyond every model's."""

_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
"""Sizes that may be null."""

_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "partial_rotary_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
"""RoPE parameters that are numbers. Files hold further ones, such as `finetuned`, that no model reads."""

_MEDIA_TOKENS = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token")
"""Names under which a tokenizer lists tokens that stand for media. A model for text alone may lack them."""

SUPPORTED_EXPORT_VALUES: dict[str, tuple[Any, ...]] = {
    "version": (1,),
    "position_scheme": ("reencoded", "local"),
    "sink_tokens": (0,),
    "local_sees_first": (False, True),
    "documents_in": ("system", "user"),
    "order": ("ascending", "descending", "shuffled", "given"),
}
"""Allowed values in the entry `block_attention` of an export's config."""


def check_settings(settings: Any, name: str) -> None:
    """Refuse a config.json that transformers cannot read, or would read as another model than it describes.

    Raises:
        UserError: the file is no object, the model is quantised, or a RoPE type or a number cannot be used.
    """
    place = f"{name}: its config.json"
    if not isinstance(settings, dict):
        raise UserError(f"{place} is {_shorten(settings)}, it should be an object")
    if not isinstance(model_type := settings.get("model_type"), str):
        raise UserError(
            f"{place} has model_type {_shorten(model_type)}; supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    if settings.get("quantization_config") is not None:
        raise UserError(
            f"{place} describes quantised weights (quantization_config), which are not supported: use the "
            "model's version in 16 or 32 bits"
        )
    if settings.get("transformers_weights") is not None:
        raise UserError(f"{place} names other weights (transformers_weights), which is not supported")
    for field, largest in _LARGEST_SIZES.items():
        value = settings.get(field, 1)
        is_size = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest
        if not is_size and not (value is None and field in _OPTIONAL_SIZES):
            raise UserError(
                f"{place} has {field} {_shorten(value)}, it should be a number from 1 to {largest}"
            )
    for field in ("rope_theta", "rms_norm_eps"):
        if field in settings:
            _check_number(settings[field], field, place)
    for field in ("dtype", "torch_dtype"):
        value = settings.get(field)
        is_type = isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
        if not is_type and value is not None:
            raise UserError(
                f"{place} has {field} {_shorten(value)}, it should be the name of a type such as bfloat16"
            )
    for field in ("rope_scaling", "rope_parameters"):
        _check_rope(settings.get(field), field, name)


def _check_rope(rope: Any, field: str, name: str) -> None:
    """Check the RoPE parameters of a config.json, or those of each of its types of layers."""
    place = f"{name}: its config.json"
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise UserError(f"{place} has {field} {_shorten(rope)}, it should be an object")
    if rope and all(isinstance(value, dict) for value in rope.values()):
        for layer_type, parameters in rope.items():
            _check_rope(parameters, f"{field}.{layer_type}", name)
        return
    _check_rope_type(rope.get("rope_type", rope.get("type", "default")), name)
    for key in _ROPE_NUMBERS:
        # a zero mscale means that there is none
        if (value := rope.get(key)) is not None and not (key.startswith("mscale") and value == 0):
            _check_number(value, f"{field}.{key}", place)
    for smaller, larger in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        low, high = rope.get(smaller), rope.get(larger)
        if low is not None and high is not None and not low < high:
            raise UserError(f"{place} has {field}.{smaller} {low}, it should be less than {larger} {high}")


def _check_rope_type(rope_type: Any, name: str) -> None:
    rope_type = _OLD_ROPE_TYPES.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    if rope_type not in SUPPORTED_ROPE_TYPES:
        reason = " (its frequencies depend on the prompt's length)" if rope_type in _LENGTH_DEPENDENT else ""
        raise UserError(
            f"{name}: RoPE type {_shorten(rope_type)} is not supported{reason}; "
            f"supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )


def _check_number(value: Any, field: str, place: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < _LARGEST_NUMBER:
        raise UserError(f"{place} has {field} {_shorten(value)}, it should be a number greater than 0")


def _shorten(value: Any) -> str:
    """Return a value of a config.json as text that is short whatever the file holds."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse a model whose cached keys cannot be re-encoded exactly, or whose settings contradict each other.

    Raises:
        UserError: the family, the RoPE type or a setting of the attention is not supported, or the heads
            cannot share the keys.
    """
    name = config.name_or_path or config.model_type
    if config.model_type not in SUPPORTED_FAMILIES:
        raise UserError(
            f"{name}: model type {config.model_type!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    for rope in rope_parameters(config).values():
        _check_rope_type(rope["rope_type"], name)
    for setting in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, setting, None):
            raise UserError(
                f"{name}: {setting} is set in its config.json, and such attention is not supported"
            )
    num_heads, num_key_heads = config.num_attention_heads, config.num_key_value_heads or 1
    if num_heads % num_key_heads:
        raise UserError(
            f"{name}: its config.json has num_attention_heads {num_heads}, it should be a multiple of "
            f"num_key_value_heads {num_key_heads}"
        )


def check_special_ids(settings: PreTrainedConfig | GenerationConfig, vocab_size: int, place: str) -> None:
    """Refuse ids of special tokens (pad, bos, eos) for which the model has no embedding.

    Raises:
        UserError: an id is no number from 0 to `vocab_size` - 1. `place` names the file.
    """
    for setting in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(settings, setting, None)
        for id in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab_size:
                raise UserError(
                    f"{place} has {setting} {_shorten(value)}, but the model's vocab_size is {vocab_size}: "
                    f"ids are 0 to {vocab_size - 1}, or null"
                )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Refuse a tokenizer with ids for which the model has no embedding.

    Tokens that stand for images and other media are an exception: a tokenizer shared with a larger family has
    them, and `check_token_ids` refuses them where they occur.

    Raises:
        UserError: the tokenizer has such ids.
    """
    media = {getattr(tokenizer, name, None) for name in _MEDIA_TOKENS}
    beyond = {
        id: token
        for token, id in tokenizer.get_vocab().items()
        if id >= config.vocab_size and token not in media
    }
    if beyond:
        first = min(beyond)
        raise UserError(
            f"{name}: its tokenizer has {len(beyond)} tokens that the model has no embedding for (the first "
            f"is {_shorten(beyond[first])} with id {first}; vocab_size is {config.vocab_size}): use the "
            "model's own tokenizer, or call resize_token_embeddings and save the model"
        )


def check_token_ids(ids: Collection[int], vocab_size: int, name: str) -> None:
    """Refuse token ids for which a model has no embedding. `name` says what has them.

    Raises:
        UserError: an id is not from 0 to `vocab_size` - 1.
    """
    for id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= id < vocab_size:
            raise UserError(
                f"{name} has token id {id}, but the model has embeddings for ids 0 to {vocab_size - 1}: use "
                "the tokenizer of this model"
            )


def head_size(config: PreTrainedConfig) -> int:
    """Return the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the RoPE parameters by layer type. The type is '' if all layers have the same parameters."""
    parameters = config.rope_parameters
    return {"": parameters} if "rope_type" in parameters else parameters


def block_attention_config(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Return the entry `block_attention` of an export's config, which says how the model was trained.

    It is empty for a model that is no export.

    Raises:
        UserError: the entry is malformed, or needs another version of blockft.
    """
    entry = getattr(config, "block_attention", None)
    if entry is None:
        return {}
    name = f"{config.name_or_path}: its block_attention"
    if not isinstance(entry, dict):
        raise UserError(f"{name} is {entry!r}, it should be an object, as in exports of blockft")
    for field, allowed in SUPPORTED_EXPORT_VALUES.items():
        if field in entry and entry[field] not in allowed:
            raise UserError(
                f"{name} has {field} {entry[field]!r} (allowed: {', '.join(map(str, allowed))}): "
                "use the version of blockft that wrote it"
            )
    if entry.get("local_sees_first") and entry.get("position_scheme") == "local":
        raise UserError(
            f"{name} has local_sees_first true with position_scheme local, but no position is left before a "
            "block that starts at 0: train with reencoded positions"
        )
    if "prompt" in entry:
        texts, wording = ("instruction", "document", "question"), entry["prompt"]
        has_texts = isinstance(wording, dict) and sorted(wording) == sorted(texts)
        if not has_texts or not all(isinstance(text, str) for text in wording.values()):
            raise UserError(f"{name} has a prompt that does not have exactly the texts {', '.join(texts)}")
        for field in ("documents_in", "order"):
            if field not in entry:
                raise UserError(f"{name} has a prompt, but no {field}")
    return entry


def local_sees_first(config: PreTrainedConfig) -> bool:
    """Return whether local blocks see the first block, as the model was trained (see `Layout`).

    Raises:
        UserError: see `block_attention_config`.
    """
    return bool(block_attention_config(config).get("local_sees_first", False))


def uses_reencoded_positions(config: PreTrainedConfig) -> bool:
    """Return whether blocks move to their positions in the prompt, as the model was trained.

    Raises:
        UserError: see `block_attention_config`.
    """
    return bool(block_attention_config(config).get("position_scheme", "reencoded") == "reencoded")
