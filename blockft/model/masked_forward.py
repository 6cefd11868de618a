"""The masked forward pass: the reference for every way to read cached blocks."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.model.supported import uses_reencoded_positions


def masked_logits(
    model: PreTrainedModel,
    ids: torch.Tensor | Sequence[int],
    layouts: Sequence[Layout],
    logits_to_keep: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Return the logits (N, vocabulary) of one pass over a row of examples, given by their token ids (T,).

    `logits_to_keep` is a number of last tokens (0 for all), or the indices (N,) of tokens. The model uses its
    own attention backend and the positions that it was trained with.
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
