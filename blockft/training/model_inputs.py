"""The arguments of a model's forward pass for a collated row."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import AttentionMetadata
from blockft.model.decoder_layers import attention_windows


def build_model_inputs(
    row: Mapping[str, torch.Tensor], config: PreTrainedConfig, *, full: bool = False
) -> dict[str, Any]:
    """Return the arguments of a model's forward pass for a row of `collate_row`.

    Masks are built on the device of the row. With `full`, all examples attend in full mode; the row must have
    been collated `with_full`.
    """
    prefix = "full_" if full else ""
    metadata = AttentionMetadata(
        position_ids=row[f"{prefix}position_ids"],
        example_ids=row[f"{prefix}example_ids"],
        block_ids=row[f"{prefix}block_ids"],
        is_final=row[f"{prefix}is_final"],
        is_copy=row[f"{prefix}is_copy"],
    )
    return {
        "input_ids": row[f"{prefix}input_ids"],
        "position_ids": metadata.position_ids,
        "block_masks": AttentionMasks(metadata).build(config._attn_implementation, attention_windows(config)),
        "logits_to_keep": row[f"{prefix}logits_to_keep"],
        "use_cache": False,
    }
