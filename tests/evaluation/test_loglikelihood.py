"""Log-likelihoods of continuations do not depend on how requests are packed into rows."""

import random
from itertools import chain

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from blockft.attention.layout import Layout
from blockft.evaluation import loglikelihood
from blockft.evaluation.loglikelihood import LoglikelihoodRequest, compute_loglikelihoods
from blockft.model.masked_forward import masked_logits
from tests.tiny import build_model, random_ids


def build_requests(seed: int) -> list[LoglikelihoodRequest]:
    """Return requests of several contexts, two or three of which share each context."""
    rng = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(random_ids(rng, length).tolist())

    requests = []
    for num_blocks in (0, 1, 2, 5, 9):
        context = tuple(ids(rng.randint(1, 12)) for _ in range(num_blocks))
        requests += [LoglikelihoodRequest(context, ids(rng.randint(1, 6)), ids(3)) for _ in range(3)]
    return requests


def run_and_record_rows(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, mode: str, max_tokens: int
) -> tuple[torch.Tensor, list[int]]:
    """Return the log probabilities, and the number of tokens of each row that the model reads."""
    row_lens: list[int] = []
    forward = model.forward

    def record(*arguments: object, input_ids: torch.Tensor, **options: object) -> object:
        row_lens.append(input_ids.shape[1])
        return forward(*arguments, input_ids=input_ids, **options)

    monkeypatch.setattr(loglikelihood, "ROW_TOKENS", max_tokens)
    with monkeypatch.context() as context:
        context.setattr(model, "forward", record)
        scores = compute_loglikelihoods(model, build_requests(0), mode=mode)
    return torch.tensor([log_prob for log_prob, _ in scores]), row_lens


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("sees_first", [False, True])
def test_rows_have_at_most_the_planned_tokens_and_give_the_same_scores(
    monkeypatch: pytest.MonkeyPatch, mode: str, sees_first: bool
) -> None:
    """Copies of the first block count: a row is longer only if a single request is."""
    model = build_model("llama", "block_sdpa")
    model.config.block_attention = {"version": 1, "local_sees_first": sees_first}
    expected, (num_all,) = run_and_record_rows(monkeypatch, model, mode, 10**6)
    has_copies = sees_first and mode == "block"
    longest = max(
        Layout((*map(len, r.context), len(r.final)), local_sees_first=has_copies).num_row_tokens
        for r in build_requests(0)
    )
    for max_tokens in (longest, longest + 20, num_all // 2):
        scores, row_lens = run_and_record_rows(monkeypatch, model, mode, max_tokens)
        assert len(row_lens) > 1 and max(row_lens) <= max_tokens
        assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_scores_with_copies_are_those_of_each_prompt_alone() -> None:
    model = build_model("llama", "block_sdpa")
    model.config.block_attention = {"version": 1, "local_sees_first": True}
    requests = build_requests(1)
    scores = compute_loglikelihoods(model, requests, mode="block")
    for request, (log_prob, _) in zip(requests, scores, strict=True):
        ids = [*chain.from_iterable(request.context), *request.final]
        layout = Layout((*map(len, request.context), len(request.final)))
        log_probs = masked_logits(model, ids, [layout])[:-1].log_softmax(-1)
        found = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[-len(request.continuation) :]
        assert log_prob == pytest.approx(float(found.detach().sum()), abs=1e-4)
