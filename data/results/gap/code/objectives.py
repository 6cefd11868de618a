"""Losses of the study. Shapes: N predicted tokens, V vocabulary, T tokens of a row, R ranked positions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama import Llama, Weights
from prompts import ANSWER, DOCUMENT, NO_LABEL, QUESTION, Row


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training minimises; the plain recipe is the cross entropy of the answers.

    question_weight   of the cross entropy of the question's tokens, given the documents
    document_weight   of the cross entropy of documents' tokens, over a sample of them
    distill           the teacher's part in the loss of answers: `(1 - w) CE + w KL(teacher || student)`
    distill_question  weight of the KL over the question's tokens
    hidden_weight     of the distance to the teacher's layer inputs over the final block, relative
    raised_weight     an answer's weight grows by so much times the loss that the block mask adds to it in the
                      teacher (clipped to 0 and 2)
    ranking_weight    of `ranking_loss`, on the layers `ranking_layers`
    teacher           `full`: a frozen full fine-tuned model in full mode; `self`: the model's own full mode
    """

    question_weight: float = 0.0
    document_weight: float = 0.0
    distill: float = 0.0
    distill_question: float = 0.0
    hidden_weight: float = 0.0
    raised_weight: float = 0.0
    ranking_weight: float = 0.0
    ranking_layers: tuple[int, ...] = (11, 15, 19, 23)
    hidden_layers: tuple[int, ...] = (8, 14, 20, 26)
    teacher: str = "full"

    @property
    def needs_teacher(self) -> bool:
        return any((self.distill, self.distill_question, self.hidden_weight, self.raised_weight))


DOCUMENT_TOKENS = 2048
"""Tokens of documents of a row whose loss is computed: a sample, so that the head stays cheap."""


RANKING_HEADS = 3


@torch.no_grad()
def teacher_outputs(
    llama: Llama, teacher: Weights, row: Row, layers: tuple[int, ...]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits (N, V) and the layer inputs of a teacher at the predicted positions."""
    # the layer that returns keys is compiled without gradients for the evaluation anyway
    hidden, inputs = llama.hidden(teacher, row.model_inputs, kept_layers=layers, on_kv=lambda *_: None)
    at = {layer: x[0, row.logits_to_keep] for layer, x in inputs.items()}
    return llama.logits(teacher, hidden[row.logits_to_keep]), at


def row_loss(
    llama: Llama,
    weights: Weights,
    row: Row,
    objective: Objective,
    *,
    taught: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None,
    raised_N: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The loss of a row, its parts for the log, and the logits (N, V).

    Every part is a mean over its own tokens.
    """
    ranking = objective.ranking_layers if objective.ranking_weight else ()
    matched = objective.hidden_layers if objective.hidden_weight else ()
    hidden, inputs = llama.hidden(
        weights, row.model_inputs, kept_layers=(*ranking, *matched), dropout=dropout
    )
    logits_NV = llama.logits(weights, hidden[row.logits_to_keep]).float()
    losses_N = F.cross_entropy(logits_NV, row.shift_labels, ignore_index=NO_LABEL, reduction="none")
    is_answer = row.label_kinds == ANSWER
    parts = {"answer": mean_of(losses_N, is_answer)}
    answers_N = losses_N
    if taught is not None and (objective.distill or objective.distill_question):
        teacher_NV = taught[0].float().log_softmax(-1)
        divergences_N = (teacher_NV.exp() * (teacher_NV - logits_NV.log_softmax(-1))).sum(-1)
        if objective.distill:
            answers_N = answers_N.lerp(divergences_N, objective.distill)
        if objective.distill_question:
            parts["distill_question"] = mean_of(divergences_N, row.label_kinds == QUESTION)
    if raised_N is not None:
        weights_N = 1 + objective.raised_weight * raised_N.clamp(0, 2)
        weights_N = weights_N / mean_of(weights_N, is_answer)
        answers_N = answers_N * weights_N
    # several questions of a prompt weigh as much as one
    loss = mean_of(answers_N, is_answer * row.label_weights)
    if objective.distill_question:
        loss = loss + objective.distill_question * parts["distill_question"]
    for kind, weight, name in (
        (QUESTION, objective.question_weight, "question"),
        (DOCUMENT, objective.document_weight, "document"),
    ):
        if weight:
            parts[name] = mean_of(losses_N, row.label_kinds == kind)
            loss = loss + weight * parts[name]
    if matched:
        assert taught is not None
        parts["hidden"] = hidden_distance(inputs, taught[1], row, matched)
        loss = loss + objective.hidden_weight * parts["hidden"]
    if ranking:
        parts["ranking"] = torch.stack(
            [ranking_loss(llama, weights, row, layer, inputs[layer]) for layer in ranking]
        ).mean()
        loss = loss + objective.ranking_weight * parts["ranking"]
    return loss, {name: part.detach() for name, part in parts.items()}, logits_NV


def mean_of(values_N: torch.Tensor, chosen_N: torch.Tensor) -> torch.Tensor:
    """The mean of the chosen values, or their weighted mean, 0 if there is none."""
    return (values_N * chosen_N).sum() / chosen_N.sum().clamp(min=1)


def hidden_distance(
    inputs: dict[int, torch.Tensor], taught: dict[int, torch.Tensor], row: Row, layers: tuple[int, ...]
) -> torch.Tensor:
    """Mean over layers and final-block positions of |student - teacher|^2 / |teacher|^2."""
    chosen = row.label_kinds >= QUESTION
    distances = []
    for layer in layers:
        student, teacher = inputs[layer][0, row.logits_to_keep].float(), taught[layer].float()
        distances.append(mean_of((student - teacher).pow(2).sum(-1) / teacher.pow(2).sum(-1), chosen))
    return torch.stack(distances).mean()


def ranking_loss(llama: Llama, weights: Weights, row: Row, layer: int, x_1TC: torch.Tensor) -> torch.Tensor:
    """The ranking loss: how little the first answer token's position attends to the supporting documents.

    Attention of one layer, restricted to the tokens of the example's documents: minus the logarithm of the
    share on supporting documents (after BlockRank's contrastive loss). The share is the mean over the
    `RANKING_HEADS` heads that attend most to them, so that the other heads stay free.
    """
    # padded entries are positions without an example: no shape depends on the data
    num_ranked = 64
    order = row.is_first.to(torch.int8).argsort(descending=True, stable=True)[:num_ranked]
    is_ranked, positions = row.is_first[order], row.logits_to_keep[order]
    position_ids = row.position_ids
    q = llama.query(weights, layer, x_1TC[:, positions], position_ids[:, positions])
    k = llama.keys(weights, layer, x_1TC, position_ids)
    group = llama.shape.num_heads // llama.shape.num_kv_heads
    scores_HRT = torch.matmul(q[0], k[0].repeat_interleave(group, dim=0).transpose(1, 2)).float()
    scores_HRT = scores_HRT * llama.shape.head_size**-0.5
    own = (row.example_ids[positions][:, None] == row.example_ids) & (row.support >= 0)
    supports = own & (row.support == 1)
    usable = is_ranked & supports.any(1)
    # where nothing is left the softmax would be NaN, and so its gradient
    allowed = own | ~usable[:, None]
    shares = scores_HRT.masked_fill(~allowed, float("-inf")).softmax(-1)
    mass_HR = (shares * supports).sum(-1)
    mass_R = mass_HR.topk(min(RANKING_HEADS, len(mass_HR)), dim=0).values.mean(0)
    return mean_of(-(mass_R.clamp(min=1e-6)).log(), usable)
