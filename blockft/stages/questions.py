"""What `blockft eval` asks: the eval part of a recipe, or a file of questions alone."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import chain, islice, repeat, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

from blockft.config.choices import BadRecordPolicy, Format
from blockft.config.recipe import build_recipe, find_recipe
from blockft.config.settings import Recipe, Source
from blockft.data.sample import Sample
from blockft.data.sources import SOURCE_FORMATS, RecordCounts, find_source_files
from blockft.data.split import SPLIT_FORMATS
from blockft.errors import UserError
from blockft.model.load import block_attention_config, load_config
from blockft.stages.source_settings import read_source


def recipe_for_questions(
    model: str, data: str, overrides: Sequence[str] = (), *, format: str | None = None
) -> Recipe:
    """The settings by which a model is asked the questions of a file, glob, folder or data set on the Hub.

    They are those of the model's training, if it is an export, and the defaults if it is not; the report goes
    to out/eval/MODEL-DATA unless `eval.output_dir` says otherwise.

    Raises:
        UserError: nothing is there, nor a recipe of that name; an unknown format; see `load_recipe`.
    """
    if format not in (None, *Format):
        raise UserError(f"--format is {format!r}, allowed are {', '.join(Format)}")
    try:
        find_source_files(format or Format.samples, data)
    except UserError:
        if format is None and not Path(data).exists():
            find_recipe(data)
        raise
    format = str(format or Format.samples)
    source, worded = {"format": format, "path": data}, SOURCE_FORMATS[format].question is not None
    # what concerns training is not read
    given: dict[str, Any] = {
        "model": {"path": model},
        "data": {"output_dir": ".", "sources": [source]},
        "train": {"output_dir": "."},
        "eval": {"output_dir": f"out/eval/{_name(model)}-{_name(data)}", "sources": [source]},
    }
    recipe = build_recipe(given, overrides, name := f"the evaluation of {data}")
    if not worded:
        return recipe
    given["data"] |= _wording(model, model_revision(model, recipe))
    return build_recipe(given, overrides, name)


def model_revision(model: str, recipe: Recipe) -> str | None:
    """The revision of a model that a recipe is to be evaluated with; a folder has none.

    Raises:
        UserError: the recipe has one, but for another model.
    """
    if Path(model).is_dir():
        return None
    path, revision = recipe.model.path, recipe.model.revision
    if revision is not None and model != path:
        raise UserError(
            f"model.revision is {revision!r}, of {path!r}, but {model!r} is to be evaluated: "
            "set model.revision=null, or model.path to that model as well"
        )
    return revision


def read_questions(recipe: Recipe) -> tuple[list[Sample], dict[str, int]]:
    """The samples of `eval.sources`, and how many records gave none, by reason.

    If `eval.max_samples` is less than all, the sources take turns; the order is always that of the sources.

    Raises:
        UserError: there are none, or one has no answers and is not to be skipped; see `read_source`.
    """
    assert recipe.eval
    tallies = [RecordCounts() for _ in recipe.eval.sources]
    skips = recipe.data.on_bad_record is BadRecordPolicy.skip
    sources = [
        _with_answers(read_source(source, recipe.data, tally), source, tally, skips)
        for source, tally in zip(recipe.eval.sources, tallies, strict=True)
    ]
    rounds = zip_longest(*(zip(repeat(i), source) for i, source in enumerate(sources)))
    turns = (turn for turn in chain.from_iterable(rounds) if turn)
    chosen = sorted(islice(turns, recipe.eval.max_samples), key=itemgetter(0))
    dropped = sum((tally.dropped for tally in tallies), Counter[str]())
    if not chosen:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in dropped.items())
        raise UserError(f"eval.sources hold no question{f' ({reasons})' if reasons else ''}")
    return [sample for _, sample in chosen], dict(sorted(dropped.items()))


def _with_answers(
    samples: Iterable[Sample], source: Source, tally: RecordCounts, skips: bool
) -> Iterator[Sample]:
    """The samples that have answers; if not `skips`, one without is an error."""
    for sample in samples:
        if sample.answers:
            yield sample
        elif skips:
            tally.drop("no answers")
        elif source.format in SPLIT_FORMATS:
            raise UserError(
                f"{source.path} is in the format {source.format}, which holds no answers to be scored against"
            )
        else:
            raise UserError(
                f"question {sample.id} of {sample.source} has no answers to be scored against "
                "(data.on_bad_record=skip passes over it)"
            )


def _wording(model: str, revision: str | None) -> dict[str, Any]:
    """The settings of `data` that an export says; none for a model that does not say how it is asked."""
    known = block_attention_config(load_config(model, revision))
    if "prompt" not in known:
        return {}
    return {
        "order": known["order"],
        "prompt": {**known["prompt"], "documents_in": known["documents_in"]},
    }


def _name(path: str) -> str:
    """A short name: of a folder and the one that it is in, for exports are mostly called `model`."""
    # of a model's name all counts: Llama-3.1-8B is not Llama-3.2-3B
    bare = reduce(str.removesuffix, (".gz", ".json", ".jsonl", ".parquet"), path)
    parts = [part for part in Path(bare).parts if part not in ("/", "..", ".")]
    return "-".join(parts[-2:]).replace("*", "all")
