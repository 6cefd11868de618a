"""Log probabilities of texts behind cached blocks: many continuations in one masked forward pass.

Shapes: N scored tokens, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from blockft.attention.layout import Layout
from blockft.errors import UserError
from blockft.model.masked_forward import masked_logits

ROW_TOKENS = 4096
"""Contexts with their continuations are scored in rows of about this many tokens."""

Ids = tuple[int, ...]
Score = tuple[float, bool]
"""The log probability of a continuation, and whether it is the greedy one."""


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """A continuation to be scored: the local blocks, what the final block has before it, its own ids."""

    context: tuple[Ids, ...]
    before: Ids
    continuation: Ids

    @property
    def final(self) -> Ids:
        return self.before + self.continuation


def compute_loglikelihoods(
    model: PreTrainedModel, scored: Sequence[LoglikelihoodRequest], *, mode: str, shows_progress: bool = False
) -> list[Score]:
    """The score of each continuation in block or full mode; those that share a context are scored together.

    One without tokens is certain.

    Raises:
        UserError: a prompt is longer than the model's positions.
    """
    results: dict[LoglikelihoodRequest, Score] = {one: (0.0, True) for one in scored if not one.continuation}
    limit = model.config.max_position_embeddings
    for one in scored:
        num_tokens = sum(map(len, one.context)) + len(one.final) - 1
        if num_tokens > limit:
            raise UserError(
                f"a prompt has {num_tokens} tokens, the model has {limit} positions: use fewer examples"
            )
    rows = list(_rows(one for one in dict.fromkeys(scored) if one.continuation))
    for row in tqdm(rows, disable=not shows_progress):
        results |= _score_row(model, row, mode)
    return [results[one] for one in scored]


@torch.inference_mode()
def _score_row(
    model: PreTrainedModel, row: Sequence[Sequence[LoglikelihoodRequest]], mode: str
) -> dict[LoglikelihoodRequest, Score]:
    """One forward pass over groups of continuations, each group behind its context."""
    results: dict[LoglikelihoodRequest, Score] = {}
    ids: list[int] = []
    layouts, places = [], []
    for group in row:
        context = group[0].context
        ids += [id for block in context for id in block]
        finals = [one.final[:-1] for one in group]
        for one, final in zip(group, finals, strict=True):
            start = len(ids) + len(one.before) - 1
            places.append(range(start, start + len(one.continuation)))
            ids += final
        layout = Layout((*map(len, context), *map(len, finals)), len(finals))
        layouts.append(layout if mode == "block" else layout.full())
    kept_N = torch.tensor([place for some in places for place in some], device=model.device)
    log_probs_NV = masked_logits(model, ids, layouts, kept_N).float().log_softmax(dim=-1)
    start = 0
    for one in (one for group in row for one in group):
        targets = torch.tensor(one.continuation, device=model.device)
        own = log_probs_NV[start : start + len(targets)]
        total = own.gather(1, targets[:, None]).sum()
        results[one] = (float(total), bool((own.argmax(dim=-1) == targets).all()))
        start += len(targets)
    return results


def _rows(scored: Iterable[LoglikelihoodRequest]) -> Iterator[list[list[LoglikelihoodRequest]]]:
    """Rows of about `ROW_TOKENS`: continuations of one context share it."""
    groups: dict[tuple[Ids, ...], list[LoglikelihoodRequest]] = defaultdict(list)
    for one in scored:
        groups[one.context].append(one)
    row: list[list[LoglikelihoodRequest]] = []
    filled = 0
    for context, members in groups.items():
        context_len = sum(map(len, context))
        for one in members:
            joins = bool(row) and row[-1][0].context == context
            added = len(one.final) + (0 if joins else context_len)
            if row and filled + added > ROW_TOKENS:
                yield row
                row, filled, joins, added = [], 0, False, len(one.final) + context_len
            if joins:
                row[-1].append(one)
            else:
                row.append([one])
            filled += added
    if row:
        yield row
