"""One experiment: training a model on the training part, and evaluation it the questions of validation."""

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import Queue
from typing import Any

import numpy as np
import torch

from llama import Cache, Llama, Weights
from objectives import DOCUMENT_TOKENS, Objective, row_loss, teacher_outputs
from prompts import (
    ANSWER,
    DOCUMENT,
    NUM_DOCUMENTS,
    QUESTION,
    Prompt,
    PromptOptions,
    Row,
    Sharing,
    build_chat,
    build_prompt,
    choose_documents,
    collate,
    index_questions,
    pack,
    recompute,
)
from scores import METRICS


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained; every experiment differs from another in the named fields alone.

    modes      `full`, `block`, `both` (of a question's two next draws one in each mode), `full-then-block`
               (the first `share` of the steps in full mode, then block mode alone), `full-then-both`,
               `some-block` (a draw is in block mode with the probability `share`), `dual` (every draw in both
               modes: a step has two rows, and own full mode may teach the other without a pass of its own)
    sharing    other questions in a question's prompt; None for none
    more_data  whether the reading tasks of `more_data.py` are among the questions
    extra_len  tokens by which a row is longer than what is packed into it, for tokens that the prompt options
               add: a row then holds the same questions as without them
    join       probability that neighbouring documents form one block, falling linearly to 0 at the end
    data_share of the training questions and chats, chosen by a hash of their ids
    recomputed shares of the context tokens that are computed once more in block mode, the first of their
               blocks; each draw takes one of the shares by lot. Empty for none
    dropout    probability with which an output of attention or of an MLP is set to 0
    init       `pretrained`, or the name of an earlier experiment whose weights are gone on from
    """

    modes: str = "both"
    share: float = 0.4
    join: float = 0.0
    extra_len: int = 0
    order: str = "mixed"
    sharing: Sharing | None = None
    more_data: bool = False
    prompt_options: PromptOptions = field(default_factory=PromptOptions)
    objective: Objective = field(default_factory=Objective)
    steps: int = 400
    data_share: float = 0.4
    learning_rate: float = 2.5e-4
    warmup_steps: int = 20
    recomputed: tuple[float, ...] = ()
    dropout: float = 0.0
    seed: int = 0
    init: str = "pretrained"


ROW_LEN = 32_768
BETAS, EPS, MAX_GRAD_NORM = (0.9, 0.95), 1e-8, 1.0


MORE_DATA = "t0"
"""The source of the questions that `more_data.py` adds."""


def part_of_data(data: dict[str, Any], share: float, more_data: bool = False) -> tuple[list[int], list[int]]:
    """The training questions and chats of a share of the data; a larger share holds a smaller one."""

    def takes(name: str) -> bool:
        return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32

    questions = [
        i
        for i, q in enumerate(data["questions"])
        if q["part"] == "train"
        and takes(f"{q['source']} {q['id']}")
        and (more_data or q["source"] != MORE_DATA)
    ]
    return questions, [i for i in range(len(data["chats"])) if takes(f"chat {i}")]


def training_rows(
    data: dict[str, Any], training: Training, row_len: int
) -> Iterator[list[tuple[Any, str, float]]]:
    """Rows of a run as lists of (item, mode, join probability), as many as it has steps.

    An epoch holds one draw of every item. Which items share a row depends on the seed and the prompt options
    alone: experiments that differ in modes or objective see the same rows.
    """
    questions, chats = part_of_data(data, training.data_share, training.more_data)
    data["asked_about"] = index_questions(data, questions)
    step = 0
    for epoch in range(1_000):
        items = [("question", i, epoch) for i in questions] + [("chat", i, epoch) for i in chats]
        # a prompt in full mode has no private tokens
        packed_in = "full" if training.extra_len else "block"
        lengths = [len(make_prompt(data, item, packed_in, training, 0.0)) for item in items]
        for row in pack(lengths, row_len, training.seed, epoch):
            join = training.join * (1 - step / training.steps)
            yield [(items[i], mode_of(items[i], step, training), join) for i in row]
            step += 1
            if step == training.steps:
                return


def mode_of(item: tuple[str, int, int], step: int, training: Training) -> str:
    kind, index, epoch = item
    alternates = ("block", "full")[
        (int(hashlib.sha256(f"{kind} {index}".encode()).hexdigest(), 16) + epoch) % 2
    ]
    is_early = step < training.share * training.steps
    match training.modes:
        case "full" | "block":
            return training.modes
        case "dual":
            return "block"
        case "both":
            return alternates
        case "full-then-block":
            return "full" if is_early else "block"
        case "full-then-both":
            return "full" if is_early else alternates
        case "some-block":
            drawn = int(hashlib.sha256(f"{kind} {index} {epoch}".encode()).hexdigest()[:8], 16)
            return "block" if drawn < training.share * 2**32 else "full"
    raise ValueError(f"no such modes: {training.modes}")


def make_prompt(
    data: dict[str, Any], item: tuple[str, int, int], mode: str, training: Training, join: float
) -> Prompt:
    kind, index, epoch = item
    if kind == "chat":
        return build_chat(data["chats"][index], mode)
    rng = random.Random(f"{training.seed}:{index}:{epoch}")
    prompt = build_prompt(
        data,
        index,
        mode=mode,
        order=training.order,
        rng=rng,
        prompt_options=training.prompt_options,
        join_probability=join if mode == "block" else 0.0,
        sharing=training.sharing,
    )
    if training.recomputed and mode == "block":
        share = random.Random(f"recomputed:{training.seed}:{index}:{epoch}").choice(training.recomputed)
        prompt = recompute(prompt, first_of_blocks([prompt], share)[0])
    return prompt


def predicts(objective: Objective, step: int) -> Callable[[Prompt], np.ndarray[Any, Any]] | None:
    """Which tokens of a prompt are predicted in training; None for the answers alone."""
    final = objective.question_weight or objective.distill_question or objective.hidden_weight
    if not final and not objective.document_weight:
        return None

    def choose(prompt: Prompt) -> np.ndarray[Any, Any]:
        chosen = prompt.kinds == ANSWER
        if prompt.number < 0:
            return chosen
        # the first token of a block follows another block
        inside = np.concatenate([[False], prompt.blocks[1:] == prompt.blocks[:-1]])
        inside &= np.concatenate([[False], prompt.kinds[1:] == prompt.kinds[:-1]])
        if final:
            chosen |= (prompt.kinds == QUESTION) & inside
        if objective.document_weight:
            rng = np.random.default_rng((step, prompt.number))
            share = DOCUMENT_TOKENS / ROW_LEN
            chosen |= (
                (prompt.kinds == DOCUMENT) & inside & ~prompt.is_private & (rng.random(len(prompt)) < share)
            )
        return chosen

    return choose


def ahead(items: Iterator[Any], depth: int = 8) -> Iterator[Any]:
    """The items, made by a thread that runs ahead."""
    queue: Queue[Any] = Queue(depth)
    end = object()

    def fill() -> None:
        try:
            for item in items:
                queue.put(item)
            queue.put(end)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the items are taken
            queue.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while (item := queue.get()) is not end:
        if isinstance(item, BaseException):
            raise item
        yield item


def train(
    llama: Llama,
    data: dict[str, Any],
    training: Training,
    start: torch.Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    row_len: int = ROW_LEN,
    teacher: torch.Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The weights after training (flat), and the log of the run.

    The forward pass uses weights in `dtype`; AdamW keeps weights and moments in float32 (no weight decay,
    cosine schedule to 0, gradient norm clipped to 1), as the recipe does.
    """
    objective = training.objective
    master = start.to(device, torch.float32).clone()
    weights = Weights(llama.shape, master.to(dtype, copy=True), trainable=True)
    taught_by = Weights(llama.shape, teacher.to(device, dtype)) if teacher is not None else None
    assert weights.flat_grad is not None
    master.requires_grad_()
    optimizer = torch.optim.AdamW(
        [master], lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.0, fused=device.type == "cuda"
    )

    def rows() -> Iterator[tuple[Row, Row | None, Row | None]]:
        for step, items in enumerate(training_rows(data, training, row_len)):
            choose = predicts(objective, step)

            def row(mode: str | None, items: Any = items, choose: Any = choose) -> Row:
                prompts = [make_prompt(data, i, mode or m, training, j) for i, m, j in items]
                length = row_len if mode and training.modes == "dual" else row_len + training.extra_len
                made = collate(
                    prompts,
                    length,
                    data["end_of_turn"],
                    is_predicted=choose,
                    causal_by_position=bool(training.recomputed),
                )
                return made.pinned() if device.type == "cuda" else made

            in_full = row("full") if objective.needs_teacher or training.modes == "dual" else None
            in_block = row("block") if objective.raised_weight else None
            yield row(None), in_full, in_block

    log: list[torch.Tensor] = []
    names: list[str] = []
    began = time.monotonic()
    num_steps = 0
    for step, made in enumerate(ahead(rows())):
        row, in_full, in_block = (one and one.to(device) for one in made)
        taught, raised = None, None
        if training.modes == "dual":
            assert in_full is not None
            assert not (objective.distill_question or objective.hidden_weight or objective.raised_weight)
            assert not training.dropout
            full_loss, full_parts, full_NV = row_loss(
                llama, weights, in_full, replace(objective, distill=0.0)
            )
            (0.5 * full_loss).backward()
            if objective.distill:
                taught = full_NV.detach(), {}
        elif in_full is not None:
            # without gradients, or compiled code would meet another kind of weights
            teaches = Weights(llama.shape, weights.flat) if objective.teacher == "self" else taught_by
            assert teaches is not None
            matched = objective.hidden_layers if objective.hidden_weight else ()
            taught = teacher_outputs(llama, teaches, in_full, matched)
            if in_block is not None:
                raised = raised_losses(llama, teaches, in_block, row, taught[0])
        loss, parts, _ = row_loss(
            llama, weights, row, objective, taught=taught, raised_N=raised, dropout=training.dropout
        )
        if training.modes == "dual":
            loss, parts = 0.5 * loss, {**parts, "answer_in_full_mode": full_parts["answer"]}
        loss.backward()
        gradient = weights.flat_grad.float()
        norm = gradient.norm()
        master.grad = gradient * (MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        optimizer.step()
        weights.flat.copy_(master.detach())
        weights.flat_grad.zero_()
        names = list(parts)
        log.append(torch.stack([*parts.values(), norm]))
        num_steps += 1
        if on_step:
            on_step(step)
    losses = torch.stack(log).double().cpu().numpy()
    seconds = time.monotonic() - began
    assert np.isfinite(losses).all(), "a loss is not finite"
    last = losses[-max(1, num_steps // 10) :].mean(axis=0)
    return master.detach().to(dtype), {
        "steps": num_steps,
        "tokens_per_step": row_len,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(num_steps * row_len / seconds),
        "mean_losses_of_last_tenth": dict(
            zip([*names, "gradient_norm"], last.round(4).tolist(), strict=True)
        ),
        "answer_loss_by_tenth": [
            round(float(part[:, 0].mean()), 4) for part in np.array_split(losses, min(10, num_steps))
        ],
    }


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up, then a half cosine to 0, as transformers' schedule of that name."""
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + float(np.cos(np.pi * progress)))


@torch.no_grad()
def raised_losses(
    llama: Llama, teacher: Weights, in_block: Row, row: Row, full_NV: torch.Tensor
) -> torch.Tensor:
    """By how much the block mask raises the teacher's loss of each predicted token."""
    block_NV, _ = teacher_outputs(llama, teacher, in_block, ())
    labels = row.shift_labels.clamp(min=0)
    full, block = (
        torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        for logits in (full_NV, block_NV)
    )
    return block - full


BATCH_PROMPTS = 280


@torch.no_grad()
def evaluate(
    llama: Llama,
    data: dict[str, Any],
    flat: torch.Tensor,
    questions: Sequence[int],
    detokenize: Callable[[list[list[int]]], list[str]],
    *,
    mode: str,
    order: str,
    prompt_options: PromptOptions,
    device: torch.device,
    row_len: int = ROW_LEN,
    max_new_tokens: int = 24,
    batch_prompts: int = BATCH_PROMPTS,
    choose: Callable[[list[Prompt]], list[np.ndarray[Any, Any]]] | None = None,
    arranged: dict[int, list[int]] | None = None,
) -> dict[str, Any]:
    """Greedy answers to questions and the loss of their gold answers, lists in the order of `questions`.

    Prompts stand in packed rows under the block mask; the keys and values that the final block may read go on
    into decoding. `choose` names the context tokens of prompts that are computed once more, see `recompute`.
    `arranged` gives the documents of each question in their order, see `arrange_documents`.
    """
    weights = Weights(llama.shape, flat)
    # questions are asked over ten documents, however many training draws
    prompt_options = replace(prompt_options, min_documents=NUM_DOCUMENTS)
    prompts = {
        number: build_prompt(
            data,
            number,
            mode=mode,
            order=order,
            rng=random.Random(f"evaluation:{number}"),
            prompt_options=prompt_options,
            places=arranged[number] if arranged else None,
        )
        for number in questions
    }
    if choose:
        chosen = choose([prompts[number] for number in questions])
        prompts = {n: recompute(prompts[n], mask) for n, mask in zip(questions, chosen, strict=True)}
    answers: dict[int, list[int]] = {}
    losses: dict[int, float] = {}
    agreeing = 0
    by_length = sorted(questions, key=lambda number: len(prompts[number]))
    for start in range(0, len(by_length), batch_prompts):
        batch = by_length[start : start + batch_prompts]
        some = [prompts[n] for n in batch]
        answers_BN, losses_B, predicted_gold_B = answer_batch(
            llama, weights, some, data["end_of_turn"], device, row_len, max_new_tokens, bool(choose)
        )
        agreeing += sum(
            predicted_gold == gold_is_decoded(prompt, answer, data["end_of_turn"])
            for prompt, answer, predicted_gold in zip(
                some, answers_BN.tolist(), predicted_gold_B.tolist(), strict=True
            )
        )
        for number, answer, loss in zip(batch, answers_BN.tolist(), losses_B.tolist(), strict=True):
            answers[number], losses[number] = answer, loss
    end = data["end_of_turn"]
    texts = detokenize([[i for i in answers[n] if i != end] for n in questions])
    golds = [data["questions"][number]["answers"] for number in questions]
    scores = {
        name: [metric(text, gold) for text, gold in zip(texts, golds, strict=True)]
        for name, metric in METRICS.items()
    }
    return {
        "scores": scores,
        "gold_loss": [losses[n] for n in questions],
        "texts": texts,
        "decoding_agrees": agreeing / len(questions),
    }


def gold_is_decoded(prompt: Prompt, answer: list[int], end_id: int) -> bool:
    """Whether a greedy answer is the gold answer as far as it could be decoded."""
    gold = prompt.ids[prompt.kinds == ANSWER].tolist()[: len(answer)]
    return answer == gold + [end_id] * (len(answer) - len(gold))


def answer_batch(
    llama: Llama,
    weights: Weights,
    prompts: Sequence[Prompt],
    end_id: int,
    device: torch.device,
    row_len: int,
    max_new_tokens: int,
    causal_by_position: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Greedy answers (B, max_new_tokens), the mean loss of each gold answer (B,), and a check (B,).

    The check is whether the masked forward pass over the gold answer predicts that decoding gives it.
    """
    # private tokens are read by nobody but their block, answers are not prompt
    readable = [np.flatnonzero(~p.is_private & (p.kinds != ANSWER)) for p in prompts]
    num_keys = max(map(len, readable)) + max_new_tokens
    num_keys += -num_keys % 128
    cache = Cache(llama.shape, len(prompts), num_keys, weights.flat.dtype, device)
    first_ids = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    losses_B = torch.zeros(len(prompts), dtype=torch.float64, device=device)
    num_wrong_B = torch.zeros(len(prompts), dtype=torch.float64, device=device)
    for row_numbers in pack([len(p) for p in prompts], row_len, 0, 0):
        row = collate(
            [prompts[i] for i in row_numbers], row_len, end_id, causal_by_position=causal_by_position
        ).to(device)
        starts = np.cumsum([0, *(len(prompts[i]) for i in row_numbers)])
        tokens = np.concatenate([readable[i] + s for i, s in zip(row_numbers, starts, strict=False)])
        slots = np.concatenate([np.arange(len(readable[i])) + i * num_keys for i in row_numbers])
        at, to = torch.from_numpy(tokens).to(device), torch.from_numpy(slots).to(device)
        hidden, _ = llama.hidden(
            weights,
            row.model_inputs,
            on_kv=lambda layer, k, v, at=at, to=to: cache.write(layer, k, v, at, to),
        )
        logits_NV = llama.logits(weights, hidden[row.logits_to_keep]).float()
        numbers = torch.tensor([*row_numbers, 0], device=device)[row.label_examples]
        is_label = row.label_examples >= 0
        losses_N = torch.nn.functional.cross_entropy(
            logits_NV, row.shift_labels.clamp(min=0), reduction="none"
        ).double()
        wrong_N = (logits_NV.argmax(-1) != row.shift_labels).double()
        sums = torch.zeros(len(prompts) + 1, 3, dtype=torch.float64, device=device)
        target = torch.where(is_label, numbers, len(prompts))
        sums.index_add_(0, target, torch.stack([losses_N, torch.ones_like(losses_N), wrong_N], dim=1))
        losses_B += sums[:-1, 0] / sums[:-1, 1].clamp(min=1)
        num_wrong_B += sums[:-1, 2]
        first_ids[numbers[row.is_first]] = logits_NV[row.is_first].argmax(-1)
    counts = torch.tensor([len(r) for r in readable], device=device)
    positions = torch.tensor(
        [int(p.positions[r[-1]]) + 1 for p, r in zip(prompts, readable, strict=True)], device=device
    )
    answers = cache.decode(weights, first_ids, counts, positions, max_new_tokens, end_id)
    return answers, losses_B, num_wrong_B == 0


@torch.no_grad()
def most_changed(
    llama: Llama,
    weights: Weights,
    prompts: Sequence[Prompt],
    share: float,
    end_id: int,
    device: torch.device,
    row_len: int,
) -> list[np.ndarray[Any, Any]]:
    """Of each prompt the context tokens whose values in the second layer differ most between the modes.

    That is CacheBlend's choice (Yao et al. 2025, section 4.2), with the whole prompt's first layer computed.
    """
    changes: dict[int, np.ndarray[Any, Any]] = {}
    for numbers in pack([len(p) for p in prompts], row_len, 0, 0):
        caught: list[torch.Tensor] = []

        def keep(
            layer: int, keys: torch.Tensor, values: torch.Tensor, caught: list[torch.Tensor] = caught
        ) -> None:
            if layer == 1:
                caught.append(values[0].float())

        in_block = [prompts[i] for i in numbers]
        # tokens that their own block alone sees have no place in full mode
        seen_T = np.concatenate([~p.is_private for p in in_block])
        for some, chosen_T in ((in_block, seen_T), ([as_full(p) for p in in_block], ...)):
            row = collate(some, row_len, end_id).to(device)
            llama.hidden(weights, row.model_inputs, on_kv=keep, num_layers=2)
            caught[-1] = caught[-1][:, : sum(map(len, some))]
            if chosen_T is not ...:
                caught[-1] = caught[-1][:, torch.from_numpy(chosen_T).to(device)]
        change_T = np.full(len(seen_T), -1.0)
        change_T[seen_T] = (caught[0] - caught[1]).pow(2).sum((0, 2)).cpu().numpy()
        starts = np.cumsum([0, *map(len, in_block)])
        for i, prompt, start in zip(numbers, in_block, starts, strict=False):
            changes[i] = np.where(prompt.is_final, -1.0, change_T[start : start + len(prompt)])
    return [largest(changes[i], prompt, share) for i, prompt in enumerate(prompts)]


def first_of_blocks(prompts: Sequence[Prompt], share: float) -> list[np.ndarray[Any, Any]]:
    """Of each prompt the share of context tokens that stand first in their blocks."""
    chosen = []
    for prompt in prompts:
        starts = np.flatnonzero(np.diff(prompt.blocks, prepend=-1))
        counted = np.cumsum(~prompt.is_private)
        # among the tokens of its block that others see
        place = counted - np.repeat((counted - ~prompt.is_private)[starts], np.diff([*starts, len(prompt)]))
        hidden = prompt.is_final | prompt.is_private
        chosen.append(largest(np.where(hidden, -1e9, -place.astype(float)), prompt, share))
    return chosen


def largest(values: np.ndarray[Any, Any], prompt: Prompt, share: float) -> np.ndarray[Any, Any]:
    """The context tokens with the largest values, a share of the context."""
    is_context = ~prompt.is_final & ~prompt.is_private
    num_chosen = round(share * int(is_context.sum()))
    chosen = np.zeros(len(prompt), np.bool_)
    chosen[np.argsort(-values, kind="stable")[:num_chosen]] = True
    return chosen & is_context


def as_full(prompt: Prompt) -> Prompt:
    """The tokens of a prompt in full mode, without those that only their own block sees."""
    seen = ~prompt.is_private
    taken = {name: getattr(prompt, name)[seen] for name in ("ids", "kinds", "support", "weights")}
    every, none = np.ones(seen.sum(), np.bool_), np.zeros(seen.sum(), np.bool_)
    return Prompt(
        number=prompt.number,
        positions=np.arange(len(every)),
        blocks=np.zeros(len(every), np.int64),
        is_final=every,
        is_link=none,
        is_private=none,
        is_bidirectional=none,
        **taken,
    )


@torch.no_grad()
def document_attention(
    llama: Llama,
    weights: Weights,
    prompts: Sequence[Prompt],
    places: Sequence[np.ndarray[Any, Any]],
    end_id: int,
    device: torch.device,
    row_len: int,
) -> np.ndarray[Any, Any]:
    """The attention (prompts, layers, heads, documents) of the last token of each question to each document.

    `places` has the place of every token's document, -1 outside. A head's attention to documents adds up to 1.
    """
    shape, group = llama.shape, llama.shape.num_heads // llama.shape.num_kv_heads
    found = np.zeros((len(prompts), shape.num_layers, shape.num_heads, NUM_DOCUMENTS), np.float32)
    for numbers in pack([len(p) for p in prompts], row_len, 0, 0):
        row = collate([prompts[i] for i in numbers], row_len, end_id).to(device)
        keys: list[torch.Tensor] = []
        _, inputs = llama.hidden(
            weights,
            row.model_inputs,
            kept_layers=range(shape.num_layers),
            on_kv=lambda _, k, __, keys=keys: keys.append(k[0]),
        )
        place_T = np.full(row_len, -1)
        place_T[: sum(len(prompts[i]) for i in numbers)] = np.concatenate([places[i] for i in numbers])
        one_hot_TP = torch.nn.functional.one_hot(
            torch.from_numpy(place_T + 1).to(device), NUM_DOCUMENTS + 1
        ).float()[:, 1:]
        at_R = row.logits_to_keep[row.is_first]
        assert len(at_R) == len(numbers)
        is_read_RT = row.example_ids[at_R][:, None] == row.example_ids
        is_read_RT &= one_hot_TP.sum(1) > 0
        for layer in range(shape.num_layers):
            q = llama.query(weights, layer, inputs[layer][:, at_R], row.position_ids[:, at_R])[0]
            k = keys[layer].repeat_interleave(group, dim=0)
            scores_HRT = torch.matmul(q, k.transpose(1, 2)).float() * shape.head_size**-0.5
            shares_HRT = scores_HRT.masked_fill(~is_read_RT, float("-inf")).softmax(-1)
            mass_HRP = shares_HRT @ one_hot_TP
            found[numbers, layer] = mass_HRP.transpose(0, 1).cpu().numpy()
    return found


NUM_HEADS_READ, NUM_QUESTIONS_READ = 8, 400


def arrange_documents(
    llama: Llama,
    data: dict[str, Any],
    flat: torch.Tensor,
    questions: Sequence[int],
    *,
    mode: str,
    order: str,
    prompt_options: PromptOptions,
    device: torch.device,
    row_len: int = ROW_LEN,
    num_chosen: int = NUM_QUESTIONS_READ,
) -> tuple[dict[int, list[int]], dict[str, Any]]:
    """The documents of each question by the attention of a first reading, the most read one last.

    Documents are sorted by the mean attention of the `NUM_HEADS_READ` heads which read the supporting document
    most often in training questions in shuffled order (after Attention Sorting, Peysakhovich and Lerer 2023).
    In block mode a second reading needs no new keys and values of documents, for they may stand anywhere.
    """
    weights = Weights(llama.shape, flat)

    def read(numbers: Sequence[int], order: str) -> tuple[np.ndarray[Any, Any], list[list[int]]]:
        prompts, places, chosen = [], [], []
        for number in numbers:
            of_mode = {
                m: build_prompt(
                    data,
                    number,
                    mode=m,
                    order=order,
                    rng=random.Random(f"evaluation:{number}"),
                    prompt_options=prompt_options,
                )
                for m in {mode, "block"}
            }
            prompts.append(of_mode[mode])
            places.append(document_places(of_mode["block"], keeps_private=mode == "block"))
            rng = random.Random(f"evaluation:{number}")
            chosen.append(choose_documents(data["questions"][number], order, rng, NUM_DOCUMENTS)[0])
        end = data["end_of_turn"]
        return document_attention(llama, weights, prompts, places, end, device, row_len), chosen

    trained_on = [
        i for i, q in enumerate(data["questions"]) if q["part"] == "train" and sum(q["supports"]) == 1
    ]
    trained_on.sort(key=lambda i: hashlib.sha256(f"heads {i}".encode()).hexdigest())
    mass, chosen = read(trained_on[:num_chosen], "shuffled")
    supports = [
        [data["questions"][n]["supports"][i] for i in some].index(True)
        for n, some in zip(trained_on, chosen, strict=False)
    ]
    hits = (mass.argmax(-1) == np.array(supports)[:, None, None]).mean(0)
    best = np.argsort(-hits.flatten(), kind="stable")[:NUM_HEADS_READ]
    mass, chosen = read(questions, order)
    scores = mass.reshape(len(mass), -1, NUM_DOCUMENTS)[:, best].mean(1)
    arranged = {
        n: [some[i] for i in np.argsort(score[: len(some)], kind="stable")]
        for n, some, score in zip(questions, chosen, scores, strict=True)
    }
    is_support = [data["questions"][n]["supports"][arranged[n][-1]] for n in questions]
    return arranged, {
        "heads": [[int(i) // llama.shape.num_heads, int(i) % llama.shape.num_heads] for i in best],
        "hits_of_heads_in_training": [round(float(h), 3) for h in hits.flatten()[best]],
        "last_document_supports": "".join(str(int(s)) for s in is_support),
    }


def document_places(in_block: Prompt, keeps_private: bool) -> np.ndarray[Any, Any]:
    """The place of each token's document among the documents, -1 outside; of a prompt in block mode."""
    is_document = (in_block.kinds == DOCUMENT) & ~in_block.is_private
    numbers = np.unique(in_block.blocks[is_document])
    places = np.where(is_document, np.searchsorted(numbers, in_block.blocks), -1)
    return places if keeps_private else places[~in_block.is_private]
