"""From a collated row to a model's forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import AttentionMetadata
from blockft.model.load import attention_windows


def build_model_inputs(
    row: Mapping[str, torch.Tensor], config: PreTrainedConfig, *, full: bool = False
) -> dict[str, Any]:
    """What a model's forward pass takes of a row, see `collate_row`; masks are built where the row is.

    `full` takes all examples in their full view, of a row that was collated `with_full`.
    """
    mode = "full_" if full else ""
    metadata = AttentionMetadata(
        position_ids=row[f"{mode}position_ids"],
        example_ids=row["example_ids"],
        block_ids=row[f"{mode}block_ids"],
        is_final=row[f"{mode}is_final"],
    )
    return {
        "input_ids": row["input_ids"],
        "position_ids": metadata.position_ids,
        "block_masks": AttentionMasks(metadata).build(config._attn_implementation, attention_windows(config)),
        "logits_to_keep": row["logits_to_keep"],
        "use_cache": False,
    }
