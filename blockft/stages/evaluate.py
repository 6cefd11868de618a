"""`blockft eval`: held-out questions answered in block and full mode, and scored."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from blockft.config.choices import BadRecordPolicy, Positions, Retriever, TooLongPolicy
from blockft.config.settings import Recipe, Source
from blockft.data.sample import Sample, sample_to_record
from blockft.data.sources import SOURCE_FORMATS
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.errors import UserError
from blockft.evaluation.answers import (
    TOO_LONG,
    AnswerFile,
    EncodedQuestions,
    answer_batch,
    build_predictions,
    encode_questions,
    plan_batches,
)
from blockft.evaluation.metrics import METRICS
from blockft.evaluation.report import DIFFERENCE, Prediction, build_report, histogram
from blockft.evaluation.report_render import draw_scores, format_score, report_markdown
from blockft.inference.engine import Engine
from blockft.inference.runner import CacheOptions
from blockft.model.fingerprint import model_fingerprint
from blockft.model.load import parse_dtype, uses_reencoded_positions
from blockft.outputs import atomic_folder, check_absent, resumable_folder, save_figure
from blockft.progress import track
from blockft.stages.questions import model_revision, read_questions
from blockft.version import __version__

REPORT = "report.json"
METRIC = "substring_match"
"""What is drawn: the paper's accuracy."""

SOURCES = "sources"
"""The one option that decides no answer: the hash of the questions does, wherever they were read."""


def evaluate(model: str, recipe: Recipe, *, as_json: bool = False) -> Path:
    """Answer the questions of `eval.sources`; write report and predictions to `eval.output_dir`.

    Answers are kept beside it batch by batch: after a kill the same command goes on, and the report is that
    of an evaluation that was never killed.

    Raises:
        UserError: the recipe has no `eval`; `eval.output_dir` exists, or was begun otherwise; a question
            without
            answers; none that fits into the model; see `revision_of` and `Engine.load`.
        KeyboardInterrupt: after it was said that the same command goes on.
    """
    settings = recipe.eval
    if settings is None:
        raise UserError("the recipe has no eval: add eval.output_dir and eval.sources")
    out = Path(settings.output_dir)
    check_absent(out, "choose another eval.output_dir")
    revision = model_revision(model, recipe)
    samples, dropped = read_questions(recipe)
    dtype = parse_dtype(recipe.model.dtype, None)
    # blocks are used within a batch, which the first tier holds
    cache = CacheOptions(host_bytes=0) if torch.cuda.is_available() else None
    engine = Engine.load(model, revision=revision, dtype=dtype, cache=cache)
    console = Console(stderr=True)
    if recipe.data.positions is Positions.local and uses_reencoded_positions(engine.model.config):
        said = "data.positions=local has no effect here: the model does not say that it was trained so"
        console.print(said, soft_wrap=True)
    asked = _encode(engine, samples, recipe, console)
    options = _options(recipe, engine, asked, revision)
    options["records dropped"] = dict(sorted((asked.dropped + Counter(dropped)).items()))
    facts = {name: value for name, value in options.items() if name != SOURCES}
    try:
        with resumable_folder(out, facts) as partial:
            answered = {
                mode.value: _answer(engine, asked, mode.value, recipe, partial, console)
                for mode in dict.fromkeys(settings.modes)
            }
            report = build_report(model, answered, options)
            _write(out, report, answered)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where this one stopped")
        raise
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return out


def _encode(engine: Engine, samples: list[Sample], recipe: Recipe, console: Console) -> EncodedQuestions:
    """The questions that fit, with their prompts; what is left out is said.

    Raises:
        UserError: none fits, or one is unfit for the chat template and not to be skipped.
    """
    assert recipe.eval
    asked = encode_questions(
        engine,
        track(samples, "prompts"),
        recipe.eval.max_new_tokens,
        trim=recipe.data.too_long is TooLongPolicy.trim,
        skip_bad=recipe.data.on_bad_record is BadRecordPolicy.skip,
    )
    if not asked.samples:
        raise UserError(f"no question fits: {asked.first_long or next(iter(asked.dropped))}")
    if asked.first_long:
        number = f"{asked.dropped[TOO_LONG]} of {len(samples)}"
        console.print(f"left out as too long: {number}; {asked.first_long}", markup=False, soft_wrap=True)
    return asked


def _options(recipe: Recipe, engine: Engine, asked: EncodedQuestions, revision: str | None) -> dict[str, Any]:
    """Everything that decides an answer."""
    settings, data = recipe.eval, recipe.data
    assert settings
    worded = any(SOURCE_FORMATS[source.format].question for source in settings.sources)
    wording = {
        "wording of the instruction": data.prompt.instruction,
        "wording of a document": data.prompt.document,
        "wording of the question": data.prompt.question,
        "message of the documents": data.prompt.documents_in.value,
        "order of documents": data.order.value,
    }
    questions = "".join(
        json.dumps(sample_to_record(sample), sort_keys=True) + "\n" for sample in asked.samples
    )
    return {
        "revision": revision,
        "model fingerprint": model_fingerprint(engine.model),
        "tokenizer fingerprint": tokenizer_fingerprint(engine.tokenizer),
        "positions of blocks": "reencoded" if uses_reencoded_positions(engine.model.config) else "local",
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "device": engine.model.device.type,
        "output limit, tokens": settings.max_new_tokens,
        "prompts in a batch": settings.batch_size,
        "questions": len(asked.samples),
        "hash of the questions": hashlib.sha256(questions.encode()).hexdigest(),
        SOURCES: [_describe(source, data.dense_model) for source in settings.sources],
        **(wording if worded else dict.fromkeys(wording, "as in the samples")),
        "seed of the order": data.seed,
        "number of documents": data.num_documents if worded and data.num_documents is not None else "all",
        "shared context": worded and data.shared_context,
        "questions per context": data.max_questions_per_context if worded else None,
        "documents per prompt": histogram(len(sample.documents) for sample in asked.samples),
        "prompts that are too long": data.too_long.value,
        "prompts trimmed": asked.num_trimmed,
        "blockft": __version__,
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _describe(source: Source, dense_model: str) -> dict[str, Any]:
    """What the report says of a source."""
    searched = {"dense_model": dense_model} if source.retriever is Retriever.dense else {}
    return source.model_dump(mode="json") | searched


def _answer(
    engine: Engine, asked: EncodedQuestions, mode: str, recipe: Recipe, folder: Path, console: Console
) -> list[Prediction]:
    """The predictions of a mode; what `folder` holds of them already is not asked again."""
    assert recipe.eval
    samples, limit = asked.samples, recipe.eval.max_new_tokens
    answers = AnswerFile(folder / f"answers-{mode}.jsonl", plan_batches(samples, recipe.eval.batch_size))
    if answers.done:
        console.print(f"{mode} mode: going on after {len(answers.done)} of {len(samples)} answers")
    for batch in track(answers.remaining_batches, f"{mode} mode"):
        answers.add(answer_batch(engine, asked.prompts, batch, mode=mode, max_new_tokens=limit))
    return build_predictions(samples, answers.done, limit)


def _write(out: Path, report: dict[str, Any], answered: Mapping[str, list[Prediction]]) -> None:
    with atomic_folder(out) as draft:
        (draft / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (draft / "report.md").write_text(report_markdown(report), encoding="utf-8")
        modes = report["modes"]
        save_figure(draw_scores(modes, list(next(iter(modes.values()))), METRIC), draft / "report.png")
        for mode, some in answered.items():
            lines = (json.dumps(p.to_record(), ensure_ascii=False) + "\n" for p in some)
            (draft / f"predictions-{mode}.jsonl").write_text("".join(lines), encoding="utf-8")


def _print(report: dict[str, Any]) -> None:
    # a score is wider than anything that says whose it is, and never broken
    names = (Column(name, no_wrap=True) for name in ("number", *(n.replace("_", "\n") for n in METRICS)))
    table = Table(
        "mode",
        Column("questions", overflow="fold"),
        *names,
        title=report["model"],
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    columns = report["modes"] | ({DIFFERENCE: report[DIFFERENCE]} if DIFFERENCE in report else {})
    for mode, groups in columns.items():
        for group, scores in groups.items():
            cells = [format_score(scores, name, signed=mode == DIFFERENCE) for name in METRICS]
            table.add_row(mode, group, str(scores["questions"]), *(c.replace(" [", "\n[") for c in cells))
    Console().print(table)
