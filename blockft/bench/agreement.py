"""`blockft bench agreement`: greedy answers over cached blocks compared with the masked forward pass.

Shapes: N tokens of an answer, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockft.attention.layout import Layout
from blockft.bench.measurement import write_measurement
from blockft.console import PlainConsole
from blockft.data.sample import Sample
from blockft.inference.engine import Engine
from blockft.model.masked_forward import masked_logits
from blockft.outputs import check_writable

END = -1
"""Stands for every token that ends an answer."""

BlockIds = Sequence[Sequence[int]]
"""The token ids of each block of a prompt."""


def bench_agreement(
    engine: Engine,
    samples: Iterable[Sample],
    prompts: Sequence[BlockIds],
    *,
    max_new_tokens: int,
    record: Mapping[str, Any],
    out: Path | None,
) -> None:
    """Answer each prompt over cached blocks and with the masked forward pass, and count equal answers.

    The masked forward pass computes each token of an answer from the whole prompt. Where two answers differ,
    the JSON holds the first differing step, the margin by which the masked forward pass preferred its own
    token, and the standard deviation of its logits. The masked answers of a second attention kernel show how
    much rounding alone changes.

    samples: the questions, in the order of `prompts`; their ids appear in the JSON.
    record: further entries of the JSON, such as the model's name.

    Raises:
        UserError: `out` cannot be written, or a prompt with its answer exceeds the model's positions.
    """
    if out:
        check_writable(out)
    different: list[dict[str, Any]] = []
    different_by_kernel: list[dict[str, Any]] = []
    for sample, blocks in zip(samples, prompts, strict=True):
        (answer,) = engine.generate_ids([blocks], max_new_tokens=max_new_tokens)
        cached_ids = answer.ids if len(answer.ids) == max_new_tokens else (*answer.ids, END)
        masked_ids, logits_NV = _masked_answer(engine, blocks, max_new_tokens)
        with sdpa_kernel(SDPBackend.MATH):
            other_kernel_logits_NV = _masked_logits(engine, blocks, masked_ids[:-1], len(masked_ids))
        other_kernel_ids = _greedy_ids(engine, other_kernel_logits_NV)
        for differences, ids in ((different, cached_ids), (different_by_kernel, other_kernel_ids)):
            if difference := _first_difference(masked_ids, logits_NV, ids):
                differences.append({"id": sample.id, "source": sample.source, **difference})
    num_equal, num_equal_by_kernel = len(prompts) - len(different), len(prompts) - len(different_by_kernel)
    PlainConsole().print(
        f"{num_equal} of {len(prompts)} greedy answers over cached blocks equal those of the masked forward "
        f"pass; with another attention kernel the masked forward pass repeats {num_equal_by_kernel} of its "
        "own answers",
        soft_wrap=True,
    )
    result = {
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "rotate": "queries" if engine.runner.block_cache.device is not None else "keys",
        "num_prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "num_equal": num_equal,
        "num_equal_with_another_kernel": num_equal_by_kernel,
        "different": different,
        "different_with_another_kernel": different_by_kernel,
    }
    write_measurement(out, {**record, **result})


def _masked_answer(
    engine: Engine, blocks: BlockIds, max_new_tokens: int
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Return the N ids of the greedy answer of the masked forward pass, and its logits (N, V).

    An answer that stopped by itself ends in `END`.
    """
    ids: tuple[int, ...] = ()
    logits: list[torch.Tensor] = []
    while len(ids) < max_new_tokens and END not in ids:
        logits.append(_masked_logits(engine, blocks, ids, 1))
        ids += _greedy_ids(engine, logits[-1])
    return ids, torch.cat(logits)


@torch.inference_mode()
def _masked_logits(
    engine: Engine, blocks: BlockIds, answer_ids: Sequence[int], num_logits: int
) -> torch.Tensor:
    """Return the last logits (num_logits, V) of the masked forward pass over a prompt and its answer."""
    layout = Layout((*map(len, blocks[:-1]), len(blocks[-1]) + len(answer_ids)))
    ids = [id for block in (*blocks, answer_ids) for id in block]
    return masked_logits(engine.model, ids, [layout], num_logits)


def _greedy_ids(engine: Engine, logits_NV: torch.Tensor) -> tuple[int, ...]:
    return tuple(END if id in engine.eos_token_ids else id for id in logits_NV.argmax(dim=-1).tolist())


def _first_difference(
    masked_ids: Sequence[int], logits_NV: torch.Tensor, other_ids: Sequence[int]
) -> dict[str, Any] | None:
    """Return the first step at which another answer differs from the masked one; None if it does not."""
    for step, (id, logits_V) in enumerate(zip(other_ids, logits_NV, strict=False)):
        if id != masked_ids[step]:
            margin = float(logits_V.max() - logits_V[id]) if id != END else None
            return {"step": step, "margin": margin, "logits_std": float(logits_V.float().std())}
    return None
