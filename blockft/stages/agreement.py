"""`blockft bench agreement`: greedy answers over cached blocks against those of the masked forward."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from blockft.attention.backends import BlockMasks
from blockft.attention.layout import Layout, lay_out
from blockft.config import Precision, Recipe
from blockft.errors import UserError
from blockft.inference.engine import Engine
from blockft.rundir import write_whole
from blockft.stages.bench import provenance
from blockft.stages.questions import read_questions


def bench_agreement(
    model: str, recipe: Recipe, *, num_prompts: int, max_new_tokens: int, out: Path | None
) -> None:
    """Answer questions of the recipe, evenly spread over them, both ways, and count equal answers.

    The masked forward computes every token of an answer from the whole prompt again. Where the two part, the
    JSON says by how much the masked forward preferred its own token, beside the spread of its logits.

    Raises:
        UserError: fewer questions than prompts; see `read_questions` and `Engine`.
    """
    if out and not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}")
    samples, _ = read_questions(recipe)
    if num_prompts > len(samples):
        raise UserError(f"the recipe has {len(samples)} questions, --num-prompts asks for {num_prompts}")
    dtype = None if recipe.model.dtype is Precision.auto else getattr(torch, recipe.model.dtype.value)
    engine = Engine.load(model, dtype=dtype)
    parted = []
    chosen = [samples[i * len(samples) // num_prompts] for i in range(num_prompts)]
    console = Console(stderr=True)
    for sample in track(chosen, "answers", console=console, disable=not console.is_terminal):
        blocks = engine.encode(sample, max_new_tokens)
        (answer,) = engine.generate_ids([blocks], max_new_tokens=max_new_tokens)
        if difference := _first_difference(engine, blocks, answer.ids, max_new_tokens):
            parted.append({"id": sample.id, "source": sample.source, **difference})
    result = provenance() | {
        "model": model,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "side": "query" if engine.runner.store.device is not None else "key",
        "prompts": num_prompts,
        "max_new_tokens": max_new_tokens,
        "equal_answers": num_prompts - len(parted),
        "parted": parted,
    }
    print(f"{num_prompts - len(parted)} of {num_prompts} greedy answers equal those of the masked forward")
    if out:
        write_whole(out, json.dumps(result, indent=2) + "\n")


@torch.inference_mode()
def _first_difference(
    engine: Engine, blocks: Sequence[Sequence[int]], answer: Sequence[int], max_new_tokens: int
) -> dict[str, Any] | None:
    """Where the masked forward writes another token than `answer` does, if anywhere."""
    ids = [id for block in blocks for id in block]
    for step in range(min(len(answer) + 1, max_new_tokens)):
        lengths = [*map(len, blocks[:-1]), len(blocks[-1]) + step]
        vectors = lay_out([Layout(tuple(lengths))]).to(engine.model.device)
        logits = engine.model(
            input_ids=torch.tensor([[*ids, *answer[:step]]], device=engine.model.device),
            position_ids=vectors.position_ids,
            block_masks=BlockMasks(vectors),
            use_cache=False,
            logits_to_keep=1,
        ).logits[0, -1]
        best = int(logits.argmax())
        if step == len(answer):
            # the answer ended here
            return None if best in engine.ends else {"step": step, "margin": None}
        if best != answer[step]:
            margin = float(logits[best] - logits[answer[step]])
            return {"step": step, "margin": margin, "spread": float(logits.float().std())}
    return None
