"""What `blockft eval` asks: the eval part of a recipe, or a file of questions alone."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from blockft.config import Format, Recipe
from blockft.data.sample import Sample
from blockft.data.sources import LAYOUTS, Tally, locate
from blockft.errors import UserError
from blockft.model.load import block_attention, load_config
from blockft.recipe import find_recipe, make_recipe
from blockft.stages.prompt import read_source


def recipe_for(model: str, data: str, overrides: Sequence[str] = (), *, format: str | None = None) -> Recipe:
    """The settings by which a model is asked the questions of a file, glob, folder or data set on the Hub.

    They are those of the model's training, if it is an export, and the defaults if it is not; the report goes
    to out/eval/MODEL-DATA unless `eval.out` says otherwise.

    Raises:
        UserError: nothing is there, nor a recipe of that name; an unknown format; see `load_recipe`.
    """
    if format not in (None, *Format):
        raise UserError(f"--format is {format!r}, allowed are {', '.join(Format)}")
    try:
        locate(format or Format.samples, data)
    except UserError:
        if format is None and not Path(data).exists():
            find_recipe(data)
        raise
    format = str(format or Format.samples)
    source, worded = {"format": format, "path": data}, LAYOUTS[format].question is not None
    # what concerns training is not read
    given = {
        "model": {"path": model},
        "data": {"out": ".", "sources": [source], **(_wording(model) if worded else {})},
        "train": {"out": "."},
        "eval": {"out": f"out/eval/{_name(model)}-{_name(data)}", "sources": [source]},
    }
    return make_recipe(given, overrides, f"the evaluation of {data}")


def read_questions(recipe: Recipe) -> tuple[list[Sample], dict[str, int]]:
    """The samples of `eval.sources`, and how many records gave none, by reason.

    Raises:
        UserError: there are none, or one has no answers; see `read_source`.
    """
    assert recipe.eval
    tallies = [Tally() for _ in recipe.eval.sources]
    sources = [
        read_source(source, recipe.data, tally)
        for source, tally in zip(recipe.eval.sources, tallies, strict=True)
    ]
    samples = list(islice(chain.from_iterable(sources), recipe.eval.max_samples))
    if not samples:
        raise UserError("eval.sources hold no question")
    for sample in samples:
        if not sample.answers:
            raise UserError(f"question {sample.id} of {sample.source} has no answers to be scored against")
    dropped = sum((tally.dropped for tally in tallies), Counter[str]())
    return samples, dict(sorted(dropped.items()))


def _wording(model: str) -> dict[str, Any]:
    known = block_attention(load_config(model))
    if "prompt" not in known:
        return {}
    return {
        "order": known["order"],
        "prompt": {**known["prompt"], "documents_in": known["documents_in"]},
    }


def _name(path: str) -> str:
    """A short name: of a folder and the one that it is in, for exports are mostly called `model`."""
    parts = [part for part in Path(path).with_suffix("").parts if part not in ("/", "..", ".")]
    return "-".join(parts[-2:]).replace("*", "all")
