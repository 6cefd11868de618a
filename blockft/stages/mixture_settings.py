"""The mixture of a recipe, and the one that prepared data were prepared for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from blockft.config.settings import DataSettings, Recipe
from blockft.data.mixture import Mixture
from blockft.data.prepared import ExampleColumns
from blockft.errors import UserError


def mixture_of(data: DataSettings) -> Mixture:
    """Return the mixture that a recipe asks for."""
    return Mixture(
        weights=tuple(source.weight for source in data.sources),
        temperature=data.mixture.temperature,
        max_examples=data.mixture.max_examples,
    )


def describe_mixture(mixture: Mixture, columns: ExampleColumns) -> list[dict[str, int]]:
    """Return what the manifest says about the examples of each source.

    ::

        examples        number of examples
        epoch_examples  examples of an epoch of training, before `train.num_eval_examples` are held out
        epoch_tokens    their tokens, in the mean over epochs
    """
    num_sources = len(mixture.weights)
    num_examples = np.bincount(columns.sources, minlength=num_sources).tolist()
    num_tokens = np.bincount(columns.sources, weights=columns.lengths, minlength=num_sources).tolist()
    return [
        {
            "examples": examples,
            "epoch_examples": drawn,
            "epoch_tokens": round(tokens * drawn / max(1, examples)),
        }
        for examples, tokens, drawn in zip(
            num_examples, num_tokens, mixture.count_examples(num_examples), strict=True
        )
    ]


def read_mixture(recipe: Recipe, manifest: dict[str, Any]) -> Mixture:
    """Return the mixture of prepared data.

    Raises:
        UserError: the recipe asks for another one.
    """
    mixture = Mixture.of_options(manifest["options"])
    wanted = mixture_of(recipe.data)
    if mixture.is_default and wanted.is_default:
        return mixture
    prepared = _list_settings(mixture, [source["path"] for source in manifest["sources"]])
    asked = _list_settings(wanted, [source.path for source in recipe.data.sources])
    for name in dict.fromkeys((*prepared, *asked)):
        found, expected = prepared.get(name, "no such source"), asked.get(name, "no such source")
        if found != expected:
            raise UserError(
                f"{recipe.data.output_dir} was prepared with {name} = {found}, but this recipe has "
                f"{expected}: run blockft prepare again with --overwrite"
            )
    return mixture


def _list_settings(mixture: Mixture, paths: Sequence[str]) -> dict[str, str]:
    """Return the settings of a mixture by the name that an error message gives them."""
    weights = {
        f"data.sources[{index}].weight ({path})": f"{weight:g}"
        for index, (path, weight) in enumerate(zip(paths, mixture.weights, strict=True))
    }
    max_examples = "null" if mixture.max_examples is None else f"{mixture.max_examples}"
    return weights | {
        "data.mixture.temperature": f"{mixture.temperature:g}",
        "data.mixture.max_examples": max_examples,
    }
