"""`blockft eval`: answer held-out questions in block and full mode, and score the answers."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from rich.table import Column, Table

from blockft.config.choices import (
    BadRecordPolicy,
    Format,
    MethodName,
    Mode,
    Positions,
    RecomputedTokens,
    Response,
    Retriever,
    TooLongPolicy,
)
from blockft.config.recipe import build_recipe, find_recipe, is_recipe, load_recipe
from blockft.config.settings import METHOD_OPTIONS, MethodSettings, Recipe, Source
from blockft.console import PlainConsole
from blockft.data.files import COMPRESSION_SUFFIXES, RECORD_SUFFIXES
from blockft.data.sample import SKIP_REMEDY, Sample, sample_to_record
from blockft.data.sources import RecordCounts, find_source_files
from blockft.data.statistics import histogram
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.digest import digest_json
from blockft.errors import UserError, check_type, list_allowed, warn
from blockft.evaluation.answer_questions import (
    TOO_LONG,
    AnswerFile,
    AnswerRecord,
    EncodedQuestions,
    answer_batch,
    answer_batch_by_method,
    build_predictions,
    encode_questions,
    plan_batches,
)
from blockft.evaluation.methods import Method
from blockft.evaluation.metrics import METRICS
from blockft.evaluation.report import DIFFERENCE, Prediction, build_report
from blockft.evaluation.report_render import draw_scores, format_score, report_markdown
from blockft.inference.engine import AttentionMode, Engine
from blockft.inference.runner import CacheOptions
from blockft.inputs import check_path
from blockft.model.fingerprint import model_fingerprint
from blockft.model.load import load_config, parse_dtype
from blockft.model.supported import block_attention_config, local_sees_first, uses_reencoded_positions
from blockft.outputs import (
    LockedFolder,
    atomic_folder,
    check_absent,
    restore_resumable_folder,
    resumable_folder,
    save_figure,
)
from blockft.printable import print_text
from blockft.progress import progress, track
from blockft.stages.output_folder import lock_output, source_inputs
from blockft.stages.source_kind import holds_questions, is_split
from blockft.stages.source_settings import (
    read_source,
    take_in_turn,
    warn_of_unknown_fields,
)
from blockft.version import __version__

REPORT = "report.json"
PLOTTED_METRIC = "substring_match"
"""The metric of the plot: the accuracy of the paper."""

SOURCES = "sources"
"""The one entry of the options that decides no answer: the hash of the questions does, wherever they lie."""


def evaluate(
    model: str | Path,
    recipe_or_data: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    format: str | None = None,
    modes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Answer the questions of `eval.sources`, score the answers, and write the report.

    `eval.output_dir` receives report.json, report.md, report.png and predictions-MODE.jsonl. The answers are
    stored batch by batch: after an interruption the same call resumes, and the report equals that of an
    uninterrupted evaluation.

    model: an export, any model folder, or a Hub id.
    recipe_or_data: a recipe; the name or path of one; or a file, glob, folder or Hub dataset of questions,
        which are asked with the settings of `evaluation_recipe`.
    overrides: `key=value` settings, if `recipe_or_data` is a text.
    format: the format of the questions, if `recipe_or_data` names data.
    modes: block, full or both; None takes `eval.modes`.

    Returns:
        The content of report.json; see `build_report`.

    Raises:
        UserError: the recipe has no `eval`; the output folder exists, is used by another process, or holds an
            evaluation with other options; a question has no answers; no question fits into the model; see
            `model_revision` and `Engine.load`.
    """
    check_type(model, (str, Path), "model")
    check_path(model, "model")
    check_type(recipe_or_data, (Recipe, str, Path), "recipe_or_data")
    if not isinstance(recipe_or_data, Recipe):
        check_path(recipe_or_data, "recipe_or_data")
    check_type(overrides, (list, tuple), "overrides", "write a list of key=value")
    check_type(modes, (list, tuple, NoneType), "modes", "write a list of block and full")
    model = str(model)
    if isinstance(recipe_or_data, Path):
        recipe_or_data = str(recipe_or_data)
    recipe = evaluation_recipe(model, recipe_or_data, overrides=overrides, format=format, modes=modes)
    settings = recipe.eval
    if settings is None:
        raise UserError("the recipe has no eval: add eval.output_dir and eval.sources")
    _check_responses(settings.sources)
    inputs = {"the model": model, **source_inputs("eval.sources", settings.sources)}
    with lock_output(Path(settings.output_dir), "blockft eval", inputs) as out:
        check_absent(out.name, "choose another eval.output_dir")
        return _evaluate(model, recipe, out)


def _check_responses(sources: Sequence[Source]) -> None:
    """Refuse sources with responses of a teacher: answers are compared with gold answers.

    Raises:
        UserError: there is one.
    """
    for index, source in enumerate(sources):
        if source.response is not Response.gold:
            raise UserError(
                f"eval.sources[{index}].response is {source.response}, but an evaluation compares with gold "
                "answers and asks no teacher: remove it"
            )


def _evaluate(model: str, recipe: Recipe, out: LockedFolder) -> dict[str, Any]:
    """Read and encode the questions, answer them, and write the report; see `evaluate`."""
    revision = model_revision(model, recipe)
    samples, dropped = read_questions(recipe)
    dtype = parse_dtype(recipe.model.dtype, None)
    # blocks are reused within a batch only, and the device tier holds the blocks of a batch
    cache = CacheOptions(host_bytes=0) if torch.cuda.is_available() else None
    # an export holds its own template; that of the recipe belongs to the model of the recipe
    template = recipe.model.chat_template if model == recipe.model.path else None
    assert recipe.eval
    method = recipe.eval.method
    with Engine.load(
        model,
        revision=revision,
        dtype=dtype,
        chat_template=template,
        cache=cache,
        # a method takes no GPU memory for blocks
        rotate="keys" if method else "auto",
    ) as engine:
        if method:
            _check_method(method, engine)
        if recipe.data.positions is Positions.local and uses_reencoded_positions(engine.model.config):
            _remark("data.positions=local has no effect: the model was not trained with local positions")
        if recipe.data.local_sees_first and not local_sees_first(engine.model.config):
            _remark("data.local_sees_first=true has no effect: the model was not trained with it")
        questions = _encode(engine, samples, recipe)
        options = _options(recipe, engine, questions, revision)
        options["records dropped"] = dict(sorted((questions.dropped + dropped).items()))
        try:
            return _answer_and_report(model, engine, questions, recipe, options, out)
        except KeyboardInterrupt:
            _remark("interrupted: run the same command again to resume")
            raise


def _check_method(method: MethodSettings, engine: Engine) -> None:
    """Check that a method suits the model; report on stderr if it contradicts the training.

    Raises:
        UserError: the model has no layer `method.layer`, or was trained so that local blocks see the first
            block, which the method would change.
    """
    config = engine.model.config
    if local_sees_first(config):
        _check_method_sees_first(method)
    compares_layer = method.name is MethodName.recompute and method.tokens is RecomputedTokens.deviation
    if compares_layer and method.layer >= config.num_hidden_layers:
        raise UserError(
            f"eval.method.layer is {method.layer}, but the model has the layers 0 to "
            f"{config.num_hidden_layers - 1}: set eval.method.layer to one of them"
        )
    if method.name is not MethodName.local_positions and not uses_reencoded_positions(config):
        _remark(f"the model was trained with local positions, but the method {method.name} re-encodes them")


def _check_method_sees_first(method: MethodSettings) -> None:
    """Refuse a method that hides the first block from local blocks, for a model that was trained to see it.

    Raises:
        UserError: it does.
    """
    if method.name is MethodName.local_positions:
        raise UserError(
            "eval.method.name is local-positions, but the model was trained with local_sees_first, and no "
            "position is left for the first block before a block at 0: choose mask, recompute, shared-start "
            "or ape"
        )
    if method.start_tokens is not None:
        raise UserError(
            f"eval.method.start_tokens is {method.start_tokens}, but the model was trained with "
            "local_sees_first, so that every block sees the whole first block: remove it"
        )


def build_method(settings: MethodSettings, *, local_sees_first: bool = False) -> Method:
    """Return the computation that `eval.method` names. Options of other methods have their neutral values.

    local_sees_first: the model was trained so that local blocks see the first block.
    """
    start_tokens = None if local_sees_first else 0
    match settings.name:
        case MethodName.mask:
            return Method(start_tokens=start_tokens)
        case MethodName.local_positions:
            return Method(reencoded=False)
        case MethodName.recompute:
            return Method(
                start_tokens=start_tokens,
                recomputed_share=settings.share,
                recomputed_tokens=settings.tokens.value,
                deviation_layer=settings.layer,
            )
        case MethodName.shared_start:
            return Method(start_tokens=settings.start_tokens)
        case MethodName.ape:
            return Method(
                temperature=settings.temperature,
                scale=settings.scale,
                start_tokens=settings.start_tokens or start_tokens,
            )


def _describe_method(settings: MethodSettings | None) -> dict[str, Any]:
    """Return what the report says about the computation of block mode."""
    name, options = "method of block mode", "options of the method"
    if settings is None:
        return {name: "block cache", options: None}
    taken = METHOD_OPTIONS[settings.name]
    return {name: settings.name.value, options: settings.model_dump(mode="json", include={*taken}) or None}


def evaluation_recipe(
    model: str,
    recipe_or_data: Recipe | str,
    *,
    overrides: Sequence[str] = (),
    format: str | None = None,
    modes: Sequence[str] | None = None,
) -> Recipe:
    """Return the settings of an evaluation: those of a recipe, or those for the questions of a file.

    Questions are asked with the wording that an export was trained with. A model that is no export gets the
    default wording. Without a recipe the report goes to out/eval/MODEL-DATA unless `eval.output_dir` says
    otherwise.

    Raises:
        UserError: there are neither questions nor a recipe of that name; the format is unknown; see
            `load_recipe`.
    """
    if isinstance(recipe_or_data, Recipe):
        if overrides or format is not None:
            raise UserError(
                "a recipe object takes neither overrides nor a format: change its settings, or give its path"
            )
        if modes is None or recipe_or_data.eval is None:
            return recipe_or_data
        if unknown := [mode for mode in modes if mode not in list(Mode)]:
            raise UserError(f"modes has {unknown[0]!r} ({list_allowed(unknown[0], Mode)})")
        recipe = recipe_or_data.model_copy(deep=True)
        assert recipe.eval is not None
        recipe.eval.modes = [Mode(mode) for mode in modes]
        return recipe
    if modes is not None:
        overrides = [*overrides, f"eval.modes=[{','.join(modes)}]"]
    if format is None and is_recipe(recipe_or_data):
        return load_recipe(recipe_or_data, overrides)
    return _recipe_for_data(model, recipe_or_data, overrides, format)


def _recipe_for_data(model: str, data: str, overrides: Sequence[str], format: str | None) -> Recipe:
    if format not in (None, *Format):
        raise UserError(f"--format is {format!r} ({list_allowed(format, Format)})")
    try:
        find_source_files(format or Format.samples, data)
    except UserError:
        if format is None and not Path(data).exists():
            find_recipe(data)  # its message suggests recipes of similar names
        raise
    format = str(format or Format.samples)
    source = {"format": format, "path": data}
    # an evaluation reads no setting of the training: its folders are placeholders
    given: dict[str, Any] = {
        "model": {"path": model},
        "data": {"output_dir": ".", "sources": [source]},
        "train": {"output_dir": "."},
        "eval": {"output_dir": f"out/eval/{_short_name(model)}-{_short_name(data)}", "sources": [source]},
    }
    recipe = build_recipe(given, overrides, name := f"the evaluation of {data}")
    assert recipe.eval
    if not any(map(holds_questions, recipe.eval.sources)):
        return recipe
    is_worded = any(override.startswith("data.prompt.") for override in overrides)
    given["data"] |= _trained_wording(model, model_revision(model, recipe), is_worded)
    return build_recipe(given, overrides, name)


def _trained_wording(model: str, revision: str | None, is_worded: bool) -> dict[str, Any]:
    """Return the settings of `data` that an export records; empty for a model that records none.

    is_worded: the user gives a wording.

    Raises:
        UserError: the export was trained on prompts of another wording only, and the user gives none.
    """
    recorded = block_attention_config(load_config(model, revision))
    if "prompt" not in recorded:
        if is_worded or not recorded:
            return {}
        raise UserError(
            f"{model} was trained without a wording for documents (data.prompt): "
            "evaluate a file in the format samples, or set data.prompt.instruction"
        )
    return {
        "order": recorded["order"],
        "prompt": {**recorded["prompt"], "documents_in": recorded["documents_in"]},
    }


def _short_name(path: str) -> str:
    """Return the last two parts of a path, because exports are mostly called `model`; no file suffix."""
    # other dots belong to the name: Llama-3.1-8B is not Llama-3.2-3B
    stem = reduce(str.removesuffix, (*COMPRESSION_SUFFIXES, *RECORD_SUFFIXES), path)
    parts = [part for part in Path(stem).parts if part not in ("/", "..", ".")]
    return "-".join(parts[-2:]).replace("*", "all")


def model_revision(model: str, recipe: Recipe) -> str | None:
    """Return the revision at which a model is evaluated; None for a folder.

    Raises:
        UserError: the recipe sets the revision of another model.
    """
    if Path(model).is_dir():
        return None
    path, revision = recipe.model.path, recipe.model.revision
    if revision is not None and model != path:
        raise UserError(
            f"model.revision is {revision!r} and belongs to {path!r}, but the evaluated model is {model!r}: "
            "set model.revision=null, or set model.path to the evaluated model"
        )
    return revision


def read_questions(recipe: Recipe) -> tuple[list[Sample], Counter[str]]:
    """Read the samples of `eval.sources`, and count the records that gave none, by reason.

    With `eval.max_samples` the sources contribute equally, as far as they reach. The samples are in the order
    of the sources. A question is asked also if its documents do not support its answer.

    Raises:
        UserError: there is no question, or one has no answers and `data.on_bad_record` is error; see
            `read_source`.
    """
    assert recipe.eval
    counts = [RecordCounts() for _ in recipe.eval.sources]
    skip_bad = recipe.data.on_bad_record is BadRecordPolicy.skip
    sources = [
        _with_answers(read_source(source, recipe.data, count, needs_evidence=False), source, count, skip_bad)
        for source, count in zip(recipe.eval.sources, counts, strict=True)
    ]
    chosen = sorted(take_in_turn(sources, recipe.eval.max_samples), key=itemgetter(0))
    dropped = sum((count.dropped for count in counts), Counter[str]())
    if not chosen:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in dropped.items())
        raise UserError(f"eval.sources hold no question{f' ({reasons})' if reasons else ''}")
    with_questions = {index for index, _ in chosen}
    is_limit_reached = len(chosen) == recipe.eval.max_samples
    for index, (source, count) in enumerate(zip(recipe.eval.sources, counts, strict=True)):
        warn_of_unknown_fields(source, count)
        if index not in with_questions and not is_limit_reached:  # otherwise it may not have been read
            reasons = ", ".join(f"{reason}: {number}" for reason, number in count.dropped.items())
            warn(f"no question of {source.path} is asked ({reasons or 'it holds no samples'})")
    return [sample for _, sample in chosen], dropped


def _with_answers(
    samples: Iterable[Sample], source: Source, count: RecordCounts, skip_bad: bool
) -> Iterator[Sample]:
    """Yield the samples that have answers; count the others, or raise an error."""
    for sample in samples:
        if sample.answers:
            yield sample
        elif skip_bad:
            count.drop("no answers")
        elif is_split(source):
            raise UserError(
                f"{source.path} has the format {source.format}, which holds no answers to score against: "
                "name a source of questions"
            )
        else:
            raise UserError(
                f"question {sample.id} of {sample.source} has no answers to score against {SKIP_REMEDY}"
            )


def _encode(engine: Engine, samples: list[Sample], recipe: Recipe) -> EncodedQuestions:
    """Encode the questions that fit into the model; report on stderr how many do not.

    Raises:
        UserError: none fits, or the chat template changes one and `data.on_bad_record` is error.
    """
    assert recipe.eval
    questions = encode_questions(
        engine,
        track(samples, "prompts", unit="prompt"),
        recipe.eval.max_new_tokens,
        trim=recipe.data.too_long is TooLongPolicy.trim,
        skip_bad=recipe.data.on_bad_record is BadRecordPolicy.skip,
    )
    if not questions.samples:
        reason = questions.first_too_long or next(iter(questions.dropped))
        raise UserError(f"no question fits into the model: {reason}")
    if questions.first_too_long:
        number = f"{questions.dropped[TOO_LONG]} of {len(samples)} questions"
        _remark(f"{number} are too long and left out; the first: {questions.first_too_long}")
    return questions


def _options(
    recipe: Recipe, engine: Engine, questions: EncodedQuestions, revision: str | None
) -> dict[str, Any]:
    """Return everything that decides an answer, under names for the reader of the report."""
    settings, data = recipe.eval, recipe.data
    assert settings
    has_wording = any(map(holds_questions, settings.sources))
    wording = {
        "wording of the instruction": data.prompt.instruction,
        "wording of a document": data.prompt.document,
        "wording of the question": data.prompt.question,
        "message of the documents": data.prompt.documents_in.value,
        "order of documents": data.order.value,
    }
    lines = (json.dumps(sample_to_record(sample), sort_keys=True) + "\n" for sample in questions.samples)
    num_documents = data.num_documents if has_wording else None
    return {
        "revision": revision,
        "model fingerprint": model_fingerprint(engine.model),
        "tokenizer fingerprint": tokenizer_fingerprint(engine.tokenizer),
        **_describe_method(settings.method),
        "positions of blocks": "reencoded" if _reencodes(settings.method, engine) else "local",
        **({"blocks see the first block": True} if local_sees_first(engine.model.config) else {}),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "device": engine.model.device.type,
        "output limit, tokens": settings.max_new_tokens,
        "prompts in a batch": settings.batch_size,
        "questions": len(questions.samples),
        "hash of the questions": hashlib.sha256("".join(lines).encode()).hexdigest(),
        SOURCES: [_describe_source(source, data.dense_model) for source in settings.sources],
        **(wording if has_wording else dict.fromkeys(wording, "as in the samples")),
        "seed of the order": data.seed,
        "number of documents": "all" if num_documents is None else num_documents,
        "shared context": has_wording and data.shared_context,
        "questions per context": data.max_questions_per_context if has_wording else None,
        "documents per prompt": histogram(len(sample.documents) for sample in questions.samples),
        "prompts that are too long": data.too_long.value,
        "prompts trimmed": questions.num_trimmed,
        "blockft": __version__,
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _reencodes(method: MethodSettings | None, engine: Engine) -> bool:
    if method:
        return method.name is not MethodName.local_positions
    return uses_reencoded_positions(engine.model.config)


def _describe_source(source: Source, dense_model: str) -> dict[str, Any]:
    retrieval = {"dense_model": dense_model} if source.retriever is Retriever.dense else {}
    return source.model_dump(mode="json") | retrieval


def _answer_and_report(
    model: str,
    engine: Engine,
    questions: EncodedQuestions,
    recipe: Recipe,
    options: dict[str, Any],
    out: LockedFolder,
) -> dict[str, Any]:
    """Answer the questions in every mode, resuming if possible, write the report and return it."""
    assert recipe.eval
    signature = {name: value for name, value in options.items() if name != SOURCES}
    with resumable_folder(out, signature) as folder:
        predictions = {
            mode.value: _answer(engine, questions, _attention_mode(mode), recipe, folder, signature)
            for mode in dict.fromkeys(recipe.eval.modes)
        }
        report = build_report(model, predictions, options)
        _write(out, folder, report, predictions)
    return report


def _attention_mode(mode: Mode) -> AttentionMode:
    return "block" if mode is Mode.block else "full"


def _answer(
    engine: Engine,
    questions: EncodedQuestions,
    mode: AttentionMode,
    recipe: Recipe,
    folder: Path,
    signature: Mapping[str, Any],
) -> list[Prediction]:
    """Answer the questions in one mode, except those whose answers `folder` already holds.

    signature: that of the resumable folder. It identifies the evaluation, whose answers alone are used.
    """
    assert recipe.eval
    samples, max_new_tokens = questions.samples, recipe.eval.max_new_tokens
    answer: Callable[..., list[AnswerRecord]] = answer_batch
    if recipe.eval.method:
        sees_first = local_sees_first(engine.model.config)
        method = build_method(recipe.eval.method, local_sees_first=sees_first)
        answer = partial(answer_batch_by_method, method=method)
    path, batches = folder / f"answers-{mode}.jsonl", plan_batches(samples, recipe.eval.batch_size)
    answers = AnswerFile(path, batches, f"{digest_json(signature)} {mode}")
    if answers.damaged_line:
        warn(
            f"{path}, line {answers.damaged_line} is damaged: its question and all later ones are asked again"
        )
    if answers.records:
        _remark(f"{mode} mode: resuming after {len(answers.records)} of {len(samples)} answers")
    remaining = answers.remaining_batches
    with progress(f"{mode} mode", sum(map(len, remaining)), unit="answer") as advance:
        for batch in remaining:
            found = answer(engine, questions.prompts, batch, mode=mode, max_new_tokens=max_new_tokens)
            restore_resumable_folder(folder, signature)
            answers.add(found)
            advance(len(batch))
    return build_predictions(samples, answers.records, max_new_tokens)


def _write(
    out: LockedFolder, answers: Path, report: dict[str, Any], predictions: Mapping[str, list[Prediction]]
) -> None:
    """Write the report, and remove the folder of the answers that were stored for a resumption."""
    modes = report["modes"]
    figure = draw_scores(
        {report["model"]: modes},
        list(next(iter(modes.values()))),
        PLOTTED_METRIC,
        title=f"Evaluation of {report['model']}",
    )
    with atomic_folder(out, answers) as folder:
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(report_markdown(report), encoding="utf-8")
        save_figure(figure, folder / "report.png")
        for mode, answered in predictions.items():
            lines = (json.dumps(p.to_record(), ensure_ascii=False) + "\n" for p in answered)
            (folder / f"predictions-{mode}.jsonl").write_text("".join(lines), encoding="utf-8")


def _remark(text: str) -> None:
    PlainConsole(stderr=True).print(text, soft_wrap=True)


def print_report(report: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print a report as a table of at most 80 columns, or as JSON."""
    if as_json:
        print_text(json.dumps(report, indent=2))
        return
    columns = report["modes"] | ({DIFFERENCE: report[DIFFERENCE]} if DIFFERENCE in report else {})
    console = PlainConsole()
    console.print(f"{report['model']}: scores in percent, with their 95 % intervals")
    for name, groups in columns.items():
        is_difference = name == DIFFERENCE
        table = Table(
            Column("questions", overflow="fold", min_width=18),
            # a score stands above its interval; only [-100.0, -100.0] is wider and takes a line more
            *(Column(metric.replace("_", "\n"), width=14) for metric in METRICS),
            title=name if is_difference else f"{name} mode",
            title_justify="left",
            # no box: its lines would leave too little width for four intervals
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for group, scores in groups.items():
            cells = [format_score(scores, metric, signed=is_difference) for metric in METRICS]
            number = f"{scores['questions']:,} question{'s' if scores['questions'] > 1 else ''}"
            table.add_row(f"{group}\n{number}", *(cell.replace(" [", "\n[") for cell in cells))
        console.print()
        console.print(table)
