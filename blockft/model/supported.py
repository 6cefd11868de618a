"""Check that a model or export is supported; read its RoPE parameters and its `block_attention` entry."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from blockft.errors import UserError

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
"""Values of `config.model_type` for which tests show that cached blocks give the masked forward's logits."""

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the prompt."""

SUPPORTED_EXPORT_VALUES: dict[str, tuple[Any, ...]] = {
    "version": (1,),
    "position_scheme": ("reencoded", "local"),
    "sink_tokens": (0,),
    "local_sees_first": (False,),
    "documents_in": ("system", "user"),
    "order": ("ascending", "descending", "shuffled", "given"),
}
"""Allowed values in the entry `block_attention` of an export's config."""


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse a model whose cached keys cannot be re-encoded exactly.

    Raises:
        UserError: the family, the RoPE type or a setting of the attention is not supported.
    """
    name = config.name_or_path or config.model_type
    if config.model_type not in SUPPORTED_FAMILIES:
        raise UserError(
            f"{name}: model type {config.model_type!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    for rope_type in sorted({rope["rope_type"] for rope in rope_parameters(config).values()}):
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise UserError(
                f"{name}: RoPE type {rope_type!r} is not supported (its frequencies depend on the prompt's "
                f"length); supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
            )
    for setting in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, setting, None):
            raise UserError(
                f"{name}: {setting} is set in its config.json, and such attention is not supported"
            )


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
    if "prompt" in entry:
        texts, wording = ("instruction", "document", "question"), entry["prompt"]
        has_texts = isinstance(wording, dict) and sorted(wording) == sorted(texts)
        if not has_texts or not all(isinstance(text, str) for text in wording.values()):
            raise UserError(f"{name} has a prompt that does not have exactly the texts {', '.join(texts)}")
        for field in ("documents_in", "order"):
            if field not in entry:
                raise UserError(f"{name} has a prompt, but no {field}")
    return entry


def uses_reencoded_positions(config: PreTrainedConfig) -> bool:
    """Return whether blocks move to their positions in the prompt, as the model was trained.

    Raises:
        UserError: see `block_attention_config`.
    """
    return bool(block_attention_config(config).get("position_scheme", "reencoded") == "reencoded")
