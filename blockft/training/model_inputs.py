"""From a collated row to a model's forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from blockft.attention.backends import BlockMasks
from blockft.attention.layout import Vectors
from blockft.model.load import attention_windows


def forward_words(
    row: Mapping[str, torch.Tensor], config: PreTrainedConfig, *, full: bool = False
) -> dict[str, Any]:
    """What a model's forward pass takes of a row, see `collate_row`; masks are built where the row is.

    `full` takes all examples in their full view, of a row that was collated `with_full`.
    """
    view = "full_" if full else ""
    vectors = Vectors(
        position_ids=row[f"{view}position_ids"],
        example_ids=row["example_ids"],
        block_ids=row[f"{view}block_ids"],
        is_final=row[f"{view}is_final"],
    )
    return {
        "input_ids": row["input_ids"],
        "position_ids": vectors.position_ids,
        "block_masks": BlockMasks(vectors).build(config._attn_implementation, attention_windows(config)),
        "logits_to_keep": row["logits_to_keep"],
        "use_cache": False,
    }
