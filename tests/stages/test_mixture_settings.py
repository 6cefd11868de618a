"""Weights of sources: the manifest, the plan of a run, and what is refused."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from blockft.config.recipe import load_recipe
from blockft.config.settings import Recipe
from blockft.data.prepared import load_prepared
from blockft.errors import UserError
from blockft.stages.dry_run import print_dry_run
from blockft.stages.inspect import inspect
from blockft.stages.prepare import prepare
from blockft.stages.prepare_summary import print_summary
from blockft.stages.run_plan import build_plan, check_run
from blockft.training.plan import RunPlan, check_run_signature
from tests.run import save_samples, toy_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy recipe of two sources: 40 and 8 samples."""
    folder = tmp_path_factory.mktemp("mixture")
    toy_recipe(folder)
    save_samples(folder / "other.jsonl", 8, seed=2)
    return folder


def recipe_with(folder: Path, *weights: float, **settings: object) -> Recipe:
    paths = (folder / "train.jsonl", folder / "other.jsonl")
    sources = ", ".join(
        f"{{format: samples, path: {path}, weight: {weight}}}"
        for path, weight in zip(paths, weights, strict=True)
    )
    others = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return toy_recipe(folder, f"data.sources=[{sources}]", *others)


def plan_of(recipe: Recipe) -> RunPlan:
    prepare(recipe, overwrite=True)
    return build_plan(recipe, 1)


def times_of(plan: RunPlan, epoch: int) -> Counter[int]:
    """Return how often each example occurs in an epoch, counted per mode."""
    return Counter(plan.rows.epochs[epoch].examples.tolist())


def test_without_weights_every_example_is_once_in_an_epoch(folder: Path) -> None:
    plan = plan_of(recipe_with(folder, 1, 1))
    assert times_of(plan, 0) == dict.fromkeys(range(48), 2)
    counts = [(s["examples"], s["epoch_examples"]) for s in plan.manifest["sources"]]
    assert counts == [(40, 40), (8, 8)]
    assert sum(s["epoch_tokens"] for s in plan.manifest["sources"]) == plan.manifest["num_tokens"]


def test_weights_say_how_often_examples_are_trained_in_an_epoch(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    recipe = recipe_with(folder, 0.5, 2.5, train__num_train_epochs=2)
    plan = plan_of(recipe)
    for epoch in range(2):
        times = times_of(plan, epoch)
        assert sorted(times[example] for example in range(40)) == [0] * 20 + [2] * 20
        assert sorted(times[example] for example in range(40, 48)) == [4] * 4 + [6] * 4
    both = times_of(plan, 0) + times_of(plan, 1)
    assert both == {example: 2 if example < 40 else 10 for example in range(48)}
    examples = [(s["examples"], s["epoch_examples"]) for s in plan.manifest["sources"]]
    assert examples == [(40, 20), (8, 20)]
    assert plan.rows.count_by_source(2)[0][0] == plan.rows.count_by_source(2)[1][0] == 40
    capsys.readouterr()
    print_summary(recipe)
    printed = capsys.readouterr().out
    for source in plan.manifest["sources"]:
        assert re.search(rf" 20 +{source['epoch_tokens']:,} +\d+% *\n", printed)
    inspect(Path(recipe.data.output_dir))
    assert "8 kept, dropped: none; 20 examples per epoch" in capsys.readouterr().out
    recipe.train.output_dir = str(folder / "none")
    print_dry_run(recipe, 1)
    printed = capsys.readouterr().out
    num_tokens = plan.rows.count_by_source(2)[1][1]
    assert "of source 1" in printed and f"{num_tokens:,}" in printed


def test_temperature_and_limit_change_the_sizes(folder: Path) -> None:
    plan = plan_of(recipe_with(folder, 1, 1, data__mixture__temperature=1e9))
    assert [s["epoch_examples"] for s in plan.manifest["sources"]] == [24, 24]
    plan = plan_of(recipe_with(folder, 1, 3, data__mixture__max_examples=10))
    assert [s["epoch_examples"] for s in plan.manifest["sources"]] == [10, 24]


def test_only_the_manifest_depends_on_weights_and_nothing_is_encoded_again(folder: Path) -> None:
    def files() -> dict[str, bytes]:
        out = folder / "data"
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }

    first = plan_of(recipe_with(folder, 1, 1)).manifest["content_hash"], files()
    assert (plan_of(recipe_with(folder, 0.5, 2.5)).manifest["content_hash"], files()) == first
    plan_of(recipe_with(folder, 1, 1, data__mixture__temperature=2))
    for line in (folder / "data.log").read_text().splitlines()[-2:]:
        counts = json.loads(line)
        assert counts["shards_read"] == counts["shards_encoded"] == 0


def test_held_out_examples_are_never_trained_on(folder: Path) -> None:
    plan = plan_of(recipe_with(folder, 0.7, 3.4, train__num_eval_examples=12, train__num_train_epochs=3))
    held_out = {*plan.eval_rows["block"].epochs[0].examples.tolist()}
    assert len(held_out) == 12
    trained = {example for epoch in range(3) for example in times_of(plan, epoch)}
    assert not held_out & trained and trained | held_out == set(range(48))
    # the weights count the examples that are left
    sources = load_prepared(folder / "data").examples.columns.sources
    for source, weight in enumerate((0.7, 3.4)):
        is_left = (sources == source) & ~np.isin(np.arange(48), [*held_out])
        num_drawn = plan.rows.count_by_source(2)[source][0] / 2
        assert num_drawn == round(weight * is_left.sum())


def test_the_rows_do_not_depend_on_the_number_of_processes(folder: Path) -> None:
    recipe = recipe_with(folder, 0.5, 2.5)
    one, two = plan_of(recipe).rows, build_plan(recipe, 2).rows
    assert len(one) == len(two)
    for index in range(len(one)):
        assert all(torch.equal(one[index][name], two[index][name]) for name in one[index])


def test_other_weights_than_the_prepared_ones_are_refused(folder: Path) -> None:
    prepare(recipe_with(folder, 1, 2), overwrite=True)
    for weights, settings, message in (
        (
            (1, 1),
            {},
            r"data\.sources\[1\]\.weight \(.*other.jsonl\) = 2, but this recipe has 1: run blockft p",
        ),
        ((0.5, 2), {}, r"data\.sources\[0\]\.weight \(.*train.jsonl\) = 1, but this recipe has 0\.5: "),
        ((1, 2), {"data__mixture__temperature": 2}, r"temperature = 1, but this recipe has 2: "),
        ((1, 2), {"data__mixture__max_examples": 5}, r"max_examples = null, but this recipe has 5: "),
    ):
        recipe = recipe_with(folder, *weights, **settings)
        for read in (lambda: build_plan(recipe, 1), lambda: print_summary(recipe)):  # noqa: B023
            with pytest.raises(UserError, match=message) as error:
                read()
            assert "\n" not in str(error.value)
    # sources in another order have other weights
    recipe = recipe_with(folder, 1, 2)
    recipe.data.sources.reverse()
    with pytest.raises(UserError, match="no such source"):
        build_plan(recipe, 1)


def test_a_run_is_not_resumed_with_another_mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = plan_of(recipe_with(folder, 1, 2)), plan_of(recipe_with(folder, 1, 3))
    marker = {"run_signature": json.loads(json.dumps(first.run_signature))}
    monkeypatch.setattr("blockft.training.plan.read_marker", lambda checkpoint: marker)
    check_run_signature(Path("run"), first.run_signature)
    with pytest.raises(UserError, match=r"weights of data.sources = \[1.0, 2.0\].*\[1.0, 3.0\]"):
        check_run_signature(Path("run"), other.run_signature)


def test_a_weight_of_an_evaluation_source_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.sources\[0\]\.weight is 2\.0, but only data\.sources have"):
        toy_recipe(folder, f"eval.sources=[{{format: samples, path: {folder}/heldout.jsonl, weight: 2}}]")
    toy_recipe(folder, f"eval.sources=[{{format: samples, path: {folder}/heldout.jsonl, weight: 1}}]")


@pytest.mark.parametrize("weight", ["0", "-1", ".inf", ".nan", "true", "10001"])
def test_a_weight_is_a_positive_number(folder: Path, weight: str) -> None:
    with pytest.raises(UserError, match=r"data\.sources\[0\]\.weight is "):
        load_recipe(
            str(folder / "recipe.yaml"), [f"data.sources=[{{format: samples, path: x, weight: {weight}}}]"]
        )


def test_a_temperature_with_one_source_has_no_effect(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(toy_recipe(folder, "data.mixture.temperature=2"), overwrite=True)
    assert "data.mixture.temperature has no effect on data.sources: there is only one source" in (
        capsys.readouterr().err
    )
    check_run(toy_recipe(folder, "data.mixture.temperature=2"), resume=False, num_processes=1)
