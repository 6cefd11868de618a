"""`blockft bench agreement`: greedy answers over cached blocks against those of the masked forward."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockft.attention.layout import Layout
from blockft.bench.timing import measurement_provenance
from blockft.config.choices import BadRecordPolicy, TooLongPolicy
from blockft.config.settings import Recipe
from blockft.errors import UserError
from blockft.evaluation.answers import encode_questions
from blockft.inference.engine import Engine
from blockft.model.load import parse_dtype
from blockft.model.masked_forward import masked_logits
from blockft.outputs import check_writable, write_atomic
from blockft.progress import track
from blockft.stages.questions import model_revision, read_questions

END = -1
"""Stands for whichever token ends an answer."""


def bench_agreement(
    model: str, recipe: Recipe, *, num_prompts: int, max_new_tokens: int, out: Path | None
) -> None:
    """Answer questions of the recipe, evenly spread over them, both ways, and count equal answers.

    The masked forward computes every token of an answer from the whole prompt again. Where answers part, the
    JSON says by how much it preferred its own token, beside the spread of its logits. How many of its
    answers another attention kernel would have given says how much rounding decides.

    Questions that do not fit into the model are left out and counted, as `blockft eval` does.

    Raises:
        UserError: fewer questions than prompts; `out` cannot be written; see `read_questions`, `revision_of`
            and `Engine.load`.
    """
    if out:
        check_writable(out)
    samples, _ = read_questions(recipe)
    if num_prompts > len(samples):
        raise UserError(f"the recipe has {len(samples)} questions, --num-prompts asks for {num_prompts}")
    engine = Engine.load(
        model, revision=model_revision(model, recipe), dtype=parse_dtype(recipe.model.dtype, None)
    )
    parted: list[dict[str, Any]] = []
    parted_by_kernel: list[dict[str, Any]] = []
    chosen = [samples[i * len(samples) // num_prompts] for i in range(num_prompts)]
    asked = encode_questions(
        engine,
        chosen,
        max_new_tokens,
        trim=recipe.data.too_long is TooLongPolicy.trim,
        skip_bad=recipe.data.on_bad_record is BadRecordPolicy.skip,
    )
    for sample, blocks in zip(track(asked.samples, "answers"), asked.prompts, strict=True):
        (answer,) = engine.generate_ids([blocks], max_new_tokens=max_new_tokens)
        ids = answer.ids if len(answer.ids) == max_new_tokens else (*answer.ids, END)
        masked, logits = _masked_answer(engine, blocks, max_new_tokens)
        with sdpa_kernel(SDPBackend.MATH):
            other = _tokens(engine, _masked_logits(engine, blocks, masked[:-1], len(masked)))
        for found, against in ((parted, ids), (parted_by_kernel, other)):
            if difference := _first_difference(masked, logits, against):
                found.append({"id": sample.id, "source": sample.source, **difference})
    number = len(asked.samples)
    result = measurement_provenance() | {
        "model": model,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "side": "query" if engine.runner.store.device is not None else "key",
        "prompts": number,
        "records dropped": dict(asked.dropped),
        "max_new_tokens": max_new_tokens,
        "equal_answers": number - len(parted),
        "equal_by_another_masked_kernel": number - len(parted_by_kernel),
        "parted": parted,
        "parted_by_another_masked_kernel": parted_by_kernel,
    }
    print(
        f"{number - len(parted)} of {number} greedy answers equal those of the masked forward; "
        f"{number - len(parted_by_kernel)} of its own are equal by another attention kernel"
    )
    if out:
        write_atomic(out, json.dumps(result, indent=2) + "\n")


def _masked_answer(
    engine: Engine, blocks: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[tuple[int, ...], torch.Tensor]:
    """The N tokens of a greedy answer, `END` for what ends it, and the logits (N, vocabulary) of each."""
    ids: tuple[int, ...] = ()
    logits: list[torch.Tensor] = []
    while len(ids) < max_new_tokens and END not in ids:
        logits.append(_masked_logits(engine, blocks, ids, 1))
        ids += _tokens(engine, logits[-1])
    return ids, torch.cat(logits)


@torch.inference_mode()
def _masked_logits(
    engine: Engine, blocks: Sequence[Sequence[int]], answer: Sequence[int], num_logits: int
) -> torch.Tensor:
    """The last logits (num_logits, vocabulary) of the masked forward over a prompt and its answer so far."""
    layout = Layout((*map(len, blocks[:-1]), len(blocks[-1]) + len(answer)))
    ids = [id for block in (*blocks, answer) for id in block]
    return masked_logits(engine.model, ids, [layout], num_logits)


def _tokens(engine: Engine, logits: torch.Tensor) -> tuple[int, ...]:
    return tuple(END if id in engine.ends else id for id in logits.argmax(dim=-1).tolist())


def _first_difference(
    masked: Sequence[int], logits: torch.Tensor, other: Sequence[int]
) -> dict[str, Any] | None:
    """Where another answer parts from the masked forward's, if anywhere."""
    for step, (id, row) in enumerate(zip(other, logits, strict=False)):
        if id != masked[step]:
            margin = float(row.max() - row[id]) if id != END else None
            return {"step": step, "margin": margin, "spread": float(row.float().std())}
    return None
