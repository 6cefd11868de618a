"""`blockft eval`: held-out questions answered in block and full mode, and scored."""

import hashlib
import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from blockft import __version__
from blockft.config import Precision, Recipe
from blockft.data.sample import Sample, to_record
from blockft.data.sources import LAYOUTS
from blockft.data.tokenizer import fingerprint
from blockft.errors import UserError
from blockft.evaluation.answers import AnswerFile, answer_batch, plan_batches, predictions
from blockft.evaluation.metrics import METRICS
from blockft.evaluation.render import cell, draw, markdown
from blockft.evaluation.report import DIFFERENCE, Prediction, build_report, histogram
from blockft.inference.engine import Engine
from blockft.inference.runner import CacheOptions
from blockft.model.identity import model_fingerprint
from blockft.model.load import reencodes
from blockft.rundir import partial_folder, refuse_existing, save_figure, whole_folder
from blockft.stages.questions import read_questions

REPORT = "report.json"
METRIC = "substring_match"
"""What is drawn: the paper's accuracy."""


def evaluate(model: str, recipe: Recipe, *, as_json: bool = False) -> Path:
    """Answer the questions of `eval.sources`; write the report and each mode's predictions to `eval.out`.

    Answers are kept beside it batch by batch: after a kill the same command goes on, and the report is that
    of an evaluation that was never killed.

    Raises:
        UserError: the recipe has no `eval`; `eval.out` exists, or was begun otherwise; a question without
            answers; see `Engine.load`.
    """
    settings = recipe.eval
    if settings is None:
        raise UserError("the recipe has no eval: add eval.out and eval.sources")
    out = Path(settings.out)
    refuse_existing(out, "choose another eval.out")
    samples, dropped = read_questions(recipe)
    revision = recipe.model.revision if model == recipe.model.path else None
    dtype = None if recipe.model.dtype is Precision.auto else getattr(torch, recipe.model.dtype.value)
    # blocks are used within a batch, which the first tier holds
    cache = CacheOptions(host_bytes=0) if torch.cuda.is_available() else None
    engine = Engine.load(model, revision=revision, dtype=dtype, cache=cache)
    options = {**_options(recipe, engine, samples, revision), "records dropped": dropped}
    with partial_folder(out, {"model": model, **options}) as partial:
        answered = {
            mode.value: _answer(engine, samples, mode.value, recipe, partial)
            for mode in dict.fromkeys(settings.modes)
        }
        report = build_report(model, answered, options)
        _write(out, report, answered)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return out


def _options(recipe: Recipe, engine: Engine, samples: list[Sample], revision: str | None) -> dict[str, Any]:
    """Everything that decides an answer."""
    settings, data = recipe.eval, recipe.data
    assert settings
    worded = any(LAYOUTS[source.format].question for source in settings.sources)
    questions = "".join(json.dumps(to_record(sample), sort_keys=True) + "\n" for sample in samples)
    return {
        "revision": revision,
        "model fingerprint": model_fingerprint(engine.model),
        "tokenizer fingerprint": fingerprint(engine.tokenizer),
        "positions of blocks": "reencoded" if reencodes(engine.model.config) else "local",
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "device": engine.model.device.type,
        "output limit, tokens": settings.max_new_tokens,
        "prompts in a batch": settings.batch_size,
        "questions": len(samples),
        "hash of the questions": hashlib.sha256(questions.encode()).hexdigest(),
        "sources": [
            {
                "path": s.path,
                "format": s.format.value,
                "max_samples": s.max_samples,
                "retrieve": s.retrieve.value,
            }
            for s in settings.sources
        ],
        "order of documents": data.order.value if worded else "as in the samples",
        "seed of the order": data.seed,
        "number of documents": data.num_documents if worded and data.num_documents is not None else "all",
        "shared context": worded and data.shared_context,
        "documents per prompt": histogram(len(sample.documents) for sample in samples),
        "blockft": __version__,
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _answer(
    engine: Engine, samples: list[Sample], mode: str, recipe: Recipe, folder: Path
) -> list[Prediction]:
    """The predictions of a mode; what `folder` holds of them already is not asked again."""
    assert recipe.eval
    limit, console = recipe.eval.max_new_tokens, Console(stderr=True)
    answers = AnswerFile(folder / f"answers-{mode}.jsonl", plan_batches(samples, recipe.eval.batch_size))
    if answers.done:
        console.print(f"{mode} mode: going on after {len(answers.done)} of {len(samples)} answers")
    for batch in track(answers.left, f"{mode} mode", console=console, disable=not sys.stderr.isatty()):
        answers.add(answer_batch(engine, samples, batch, mode=mode, max_new_tokens=limit))
    return predictions(samples, answers.done, limit)


def _write(out: Path, report: dict[str, Any], answered: Mapping[str, list[Prediction]]) -> None:
    with whole_folder(out) as draft:
        (draft / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (draft / "report.md").write_text(markdown(report), encoding="utf-8")
        modes = report["modes"]
        save_figure(draw(modes, list(next(iter(modes.values()))), METRIC), draft / "report.png")
        for mode, some in answered.items():
            lines = (json.dumps(p.to_record(), ensure_ascii=False) + "\n" for p in some)
            (draft / f"predictions-{mode}.jsonl").write_text("".join(lines), encoding="utf-8")


def _print(report: dict[str, Any]) -> None:
    names = (Column(name, overflow="fold") for name in METRICS)
    table = Table("mode", "group", "questions", *names, title=report["model"])
    columns = report["modes"] | ({DIFFERENCE: report[DIFFERENCE]} if DIFFERENCE in report else {})
    for mode, groups in columns.items():
        for group, scores in groups.items():
            cells = [cell(scores, name, signed=mode == DIFFERENCE) for name in METRICS]
            table.add_row(mode, group, str(scores["questions"]), *(c.replace(" [", "\n[") for c in cells))
    Console().print(table)
