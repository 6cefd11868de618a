"""`blockft eval`: held-out questions answered in block and full mode, and scored."""

import json
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from blockft.config import Precision, Recipe
from blockft.data.sample import Sample
from blockft.data.sources import Tally
from blockft.errors import UserError
from blockft.evaluation.metrics import METRICS
from blockft.evaluation.report import Prediction, build_report
from blockft.inference.engine import Engine
from blockft.rundir import refuse_existing, whole_folder
from blockft.stages.prompt import read_source

REPORT = "report.json"
GROUPS = ("type", "level")
"""Entries of a sample's meta data by which questions are also counted apart."""


def evaluate(model: str, recipe: Recipe) -> Path:
    """Answer the questions of `eval.sources`; write the report and each mode's predictions to `eval.out`.

    Raises:
        UserError: the recipe has no `eval`; `eval.out` exists; a question without answers; see `Engine.load`.
    """
    settings = recipe.eval
    if settings is None:
        raise UserError("the recipe has no eval: add eval.out and eval.sources")
    out = Path(settings.out)
    refuse_existing(out, "choose another eval.out")
    samples = _questions(recipe)
    revision = recipe.model.revision if model == recipe.model.path else None
    dtype = None if recipe.model.dtype is Precision.auto else getattr(torch, recipe.model.dtype.value)
    engine = Engine.load(model, revision=revision, dtype=dtype)
    predictions = {}
    for mode in settings.modes:
        predictions[mode.value] = _answer(
            engine,
            samples,
            mode.value,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
        )
    options = {
        "max_new_tokens": settings.max_new_tokens,
        "order": recipe.data.order.value,
        "num_documents": recipe.data.num_documents,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "sources": [source.path for source in settings.sources],
    }
    report = build_report(model, predictions, options)
    with whole_folder(out) as draft:
        (draft / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for mode, answered in predictions.items():
            lines = (json.dumps(p.to_record(), ensure_ascii=False) for p in answered)
            (draft / f"predictions-{mode}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _print(report)
    return out


def _questions(recipe: Recipe) -> list[Sample]:
    assert recipe.eval is not None
    sources = [read_source(source, recipe.data, Tally()) for source in recipe.eval.sources]
    samples = list(islice(chain.from_iterable(sources), recipe.eval.max_samples))
    if not samples:
        raise UserError("eval.sources hold no question")
    for sample in samples:
        if not sample.answers:
            raise UserError(f"question {sample.id} of {sample.source} has no answers to be scored against")
    return samples


def _answer(
    engine: Engine, samples: list[Sample], mode: str, *, batch_size: int, max_new_tokens: int
) -> list[Prediction]:
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    console = Console(stderr=True)
    predictions = []
    for batch in track(batches, f"{mode} mode", console=console, disable=not sys.stderr.isatty()):
        answers = engine.generate(batch, mode=mode, max_new_tokens=max_new_tokens)
        for sample, answer in zip(batch, answers, strict=True):
            groups = dict.fromkeys(
                [sample.source, *(str(sample.meta[k]) for k in GROUPS if k in sample.meta)]
            )
            predictions.append(Prediction(sample.id, answer.text, sample.answers, tuple(groups)))
    return predictions


def _print(report: dict[str, Any]) -> None:
    table = Table("mode", "group", "questions", *METRICS, title=report["model"])
    for mode, groups in report["modes"].items():
        for group, scores in groups.items():
            table.add_row(mode, group, str(scores["questions"]), *(f"{scores[name]:.1f}" for name in METRICS))
    Console().print(table)
