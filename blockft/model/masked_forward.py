"""The forward pass under the block mask, with which whatever reads cached blocks must agree."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.model.load import uses_reencoded_positions


def masked_logits(
    model: PreTrainedModel,
    ids: torch.Tensor | Sequence[int],
    layouts: Sequence[Layout],
    logits_to_keep: int | torch.Tensor = 0,
) -> torch.Tensor:
    """The logits (N, vocabulary) of one pass over the ids (T,) of examples that stand one after the other.

    They are those of the last `logits_to_keep` tokens, of all if it is 0, or of the positions (N,) that it
    lists. The model attends by its own backend, and positions are those that it was trained with.
    """
    metadata = build_metadata(layouts, reencoded=uses_reencoded_positions(model.config)).to(model.device)
    logits: torch.Tensor = model(
        input_ids=torch.as_tensor(ids)[None].to(model.device),
        position_ids=metadata.position_ids,
        block_masks=AttentionMasks(metadata),
        use_cache=False,
        logits_to_keep=logits_to_keep,
    ).logits
    return logits[0]
