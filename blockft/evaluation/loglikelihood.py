"""Log-likelihoods of continuations after a prompt of blocks, many in one masked forward pass.

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
from blockft.model.supported import check_token_ids, local_sees_first

ROW_TOKENS = 4096
"""Requests are scored in rows of about this many tokens."""

Ids = tuple[int, ...]
Score = tuple[float, bool]
"""The log probability of a continuation, and whether it is the greedy one."""


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """A continuation to score.

    context: the token ids of each local block.
    final_prefix: the token ids of the final block before the continuation; at least one.
    continuation: the token ids to score.
    """

    context: tuple[Ids, ...]
    final_prefix: Ids
    continuation: Ids

    @property
    def final(self) -> Ids:
        """The token ids of the final block."""
        return self.final_prefix + self.continuation


Row = list[list[LoglikelihoodRequest]]
"""The requests of one forward pass, grouped by context."""


def compute_loglikelihoods(
    model: PreTrainedModel,
    requests: Sequence[LoglikelihoodRequest],
    *,
    mode: str,
    shows_progress: bool = False,
) -> list[Score]:
    """Return the score of each request in block or full mode.

    Requests with the same context share it in a row. An empty continuation scores (0.0, True).

    Raises:
        UserError: a prompt is longer than the model's positions.
    """
    scores: dict[LoglikelihoodRequest, Score] = {
        request: (0.0, True) for request in requests if not request.continuation
    }
    num_positions = model.config.max_position_embeddings
    for request in requests:
        for ids in (*request.context, request.final):
            check_token_ids(ids, model.config.vocab_size, "a prompt or its continuation")
        # the last token is predicted, not read
        num_tokens = sum(map(len, request.context)) + len(request.final) - 1
        if num_tokens > num_positions:
            raise UserError(
                f"a prompt has {num_tokens} tokens, but the model has only {num_positions} positions: "
                "use fewer few-shot examples"
            )
    different = (request for request in dict.fromkeys(requests) if request.continuation)
    has_copies = mode == "block" and local_sees_first(model.config)
    rows = list(_pack_rows(different, has_copies))
    for row in tqdm(rows, disable=not shows_progress):
        scores |= _score_row(model, row, mode)
    return [scores[request] for request in requests]


@torch.inference_mode()
def _score_row(model: PreTrainedModel, row: Row, mode: str) -> dict[LoglikelihoodRequest, Score]:
    """Score the requests of a row in one forward pass; each group has its context once."""
    scores: dict[LoglikelihoodRequest, Score] = {}
    ids: list[int] = []
    layouts: list[Layout] = []
    logit_positions: list[int] = []
    for group in row:
        context = group[0].context
        ids += [id for block in context for id in block]
        # the last token of a continuation is predicted, not read
        finals = [request.final[:-1] for request in group]
        for request, final in zip(group, finals, strict=True):
            start = len(ids) + len(request.final_prefix) - 1
            logit_positions += range(start, start + len(request.continuation))
            ids += final
        layout = Layout((*map(len, context), *map(len, finals)), len(finals))
        layouts.append(layout if mode == "block" else layout.full())
    positions_N = torch.tensor(logit_positions, device=model.device)
    log_probs_NV = masked_logits(model, ids, layouts, positions_N).float().log_softmax(dim=-1)
    start = 0
    for request in (request for group in row for request in group):
        targets = torch.tensor(request.continuation, device=model.device)
        log_probs = log_probs_NV[start : start + len(targets)]
        total = log_probs.gather(1, targets[:, None]).sum()
        scores[request] = (float(total), bool((log_probs.argmax(dim=-1) == targets).all()))
        start += len(targets)
    return scores


def _pack_rows(requests: Iterable[LoglikelihoodRequest], has_copies: bool) -> Iterator[Row]:
    """Pack requests into rows of about `ROW_TOKENS` tokens; requests with the same context share it.

    With `has_copies`, a row also holds the copies of first blocks (see `Layout`), which count.
    """
    groups: dict[tuple[Ids, ...], list[LoglikelihoodRequest]] = defaultdict(list)
    for request in requests:
        groups[request.context].append(request)
    row: Row = []
    num_tokens = 0
    for context, members in groups.items():
        for request in members:
            layout = Layout((*map(len, context), len(request.final)), local_sees_first=has_copies)
            shares_context = bool(row) and row[-1][0].context == context
            num_added = len(request.final) if shares_context else layout.num_row_tokens
            if row and num_tokens + num_added > ROW_TOKENS:
                yield row
                row, num_tokens = [], 0
                shares_context, num_added = False, layout.num_row_tokens
            if shares_context:
                row[-1].append(request)
            else:
                row.append([request])
            num_tokens += num_added
    if row:
        yield row
