"""Overrides: a word that is wrong is named, not the recipe that it changes."""

from typing import Any

import pytest

from blockft.config.recipe import build_recipe
from blockft.errors import UserError

GIVEN: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"output_dir": "o", "sources": [{"format": "samples", "path": "p"}]},
    "train": {"output_dir": "o"},
}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.sources.9.path=3", "cannot be set: list index out of range"),
        ("data.sources.x.path=3", "cannot be set: Index 'x' (str) is not an int"),
        ("train.lora={r: ", "cannot be set: while parsing"),
        (
            "data.row_len=1e3",
            ": Value '1e3' of type 'str' could not be converted to Integer (at data.row_len)",
        ),
        ("data.row_len=0", ": data.row_len is 0, it should be at least 1"),
        ("train.learning_rate=-1e-4", ": train.learning_rate is -1e-4, it should be at least 0"),
        ("train.learning_rate=.nan", ": train.learning_rate is nan, it should be finite"),
        ("train.max_grad_norm=inf", ": train.max_grad_norm is inf, it should be finite"),
        ("train.adam_beta2=1.0", ": train.adam_beta2 is 1.0, it should be below 1"),
        ("train.weight_decay=x", ": Value 'x' of type 'str' could not be converted to Float"),
        ("data.sources=[]", ": data.sources is [], it should hold at least 1"),
        ("data.sources=[{path: p}]", ": data.sources[0].format is missing"),
        ("data.sources.0.format=csv", ": data.sources[0].format is 'csv' (allowed: "),
        ("data.sources[0].max_samples=0", ": data.sources[0].max_samples is 0"),
        ("tran.seed=1", ": unknown key tran (did you mean train?)"),
        ("data.output_dir=${none}", ": Interpolation key 'none' not found (at data.output_dir)"),
    ],
)
def test_an_override_that_is_wrong_is_named(word: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        build_recipe(GIVEN, ["data.seed=1", word, "train.seed=1"], "r.yaml")
    message = str(raised.value)
    assert message.startswith(word.rstrip()) and said in message
    assert "\n" not in message and "full_key" not in message and "r.yaml" not in message


def test_the_recipe_is_named_for_its_own_faults() -> None:
    given = GIVEN | {"train": {"seed": 1}}
    with pytest.raises(UserError) as raised:
        build_recipe(given, ["data.row_len=0", "train.seed=2"], "r.yaml")
    assert str(raised.value) == (
        "data.row_len=0: data.row_len is 0, it should be at least 1; r.yaml: train.output_dir is missing"
    )
    with pytest.raises(UserError, match=r"^r\.yaml: data\.sources is \[\], it should hold at least 1$"):
        build_recipe(GIVEN | {"data": {"output_dir": "o", "sources": []}}, ["data.seed=1"], "r.yaml")


def test_large_numbers_are_no_fault_of_their_bounds() -> None:
    assert build_recipe(GIVEN, [f"data.row_len={10**400}"], "r.yaml").data.row_len == 10**400
