"""The masked forward pass: the reference for every way to read cached blocks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata, token_indices
from blockft.model.supported import local_sees_first, uses_reencoded_positions


def masked_logits(
    model: PreTrainedModel,
    ids: torch.Tensor | Sequence[int],
    layouts: Sequence[Layout],
    logits_to_keep: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Return the logits (N, vocabulary) of one pass over a row of examples, given by their token ids (T,).

    `logits_to_keep` is a number of last tokens (0 for all), or the indices (N,) of tokens. The model uses its
    own attention backend and the positions that it was trained with. If it was trained so that local blocks
    see the first block, the pass adds the copies of the first block, whatever the layouts say. Copies have no
    logits, and `ids` and the indices leave them out.
    """
    ids = torch.as_tensor(ids)
    if local_sees_first(model.config):
        layouts = [replace(layout, local_sees_first=True) for layout in layouts]
    if any(layout.num_first_copies for layout in layouts):
        sources = token_indices(layouts)
        is_copy = build_metadata(layouts).is_copy[0]
        kept = torch.arange(len(ids))[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep
        logits_to_keep = (~is_copy).nonzero()[:, 0].to(kept.device)[kept].to(model.device)
        ids = ids[sources.to(ids.device)]
    metadata = build_metadata(layouts, reencoded=uses_reencoded_positions(model.config)).to(model.device)
    logits: torch.Tensor = model(
        input_ids=ids[None].to(model.device),
        position_ids=metadata.position_ids,
        block_masks=AttentionMasks(metadata),
        use_cache=False,
        logits_to_keep=logits_to_keep,
    ).logits
    return logits[0]
