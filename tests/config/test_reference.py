"""The JSON Schema, the list of settings and recipes/README.md agree with the settings."""

import copy
import json
import re
from typing import Any, get_args

import jsonschema
import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from blockft.config.recipe import RECIPES_FOLDER, list_recipes, load_recipe
from blockft.config.reference import json_schema, list_keys, list_sections
from blockft.config.settings import Recipe
from blockft.data.sources import SOURCE_FORMATS
from tests.commands import ROOT, blockft

SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
VALID: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"output_dir": "o", "sources": [{"format": "samples", "path": "p"}]},
    "train": {"output_dir": "o"},
}


def settings_models(model: type[BaseModel] = Recipe) -> set[type[BaseModel]]:
    """The model and all models of its sections."""
    found = {model}
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= settings_models(kind)
    return found


def test_every_setting_has_a_description() -> None:
    models = settings_models()
    assert len(models) == 13
    for model in models:
        assert model.__doc__
        for name, field in model.model_fields.items():
            assert field.description and field.description.endswith("."), f"{model.__name__}.{name}"


def test_the_schema_is_valid_and_the_shipped_file_is_current() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    shipped = (RECIPES_FOLDER / "recipe.schema.json").read_text(encoding="utf-8")
    assert shipped == blockft("config", "--schema").stdout, (
        "run: blockft config --schema > recipes/recipe.schema.json"
    )


@pytest.mark.parametrize("name", list_recipes())
def test_the_schema_accepts_every_shipped_recipe(name: str) -> None:
    path = list_recipes()[name]
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert second.startswith("# "), "the second line says what the recipe is for"
    assert "../" not in path.read_text(encoding="utf-8"), "a recipe refers to nothing outside the project"
    VALIDATOR.validate(OmegaConf.to_container(OmegaConf.load(path)))
    VALIDATOR.validate(load_recipe(name).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ((), {"training": {}}),
        ((), {"model": None}),
        (("model",), {"pth": "x"}),
        (("model",), {"dtype": "float16"}),
        (("data",), {"row_len": 0}),
        (("data",), {"row_len": 4096.5}),
        (("data",), {"sources": []}),
        (("data",), {"modes": ["half"]}),
        (("data", "sources", 0), {"format": "csv"}),
        (("data", "sources", 0), {"max_samples": 0}),
        (("train",), {"learning_rate": -1}),
        (("train",), {"adam_beta2": 1}),
        (("train",), {"teacher_weight": 0}),
        (("train",), {"report_to": "wandb"}),
    ],
)
def test_the_schema_refuses_a_broken_recipe(section: tuple[Any, ...], changes: dict[str, Any]) -> None:
    recipe: Any = copy.deepcopy(VALID)
    VALIDATOR.validate(recipe)
    part = recipe
    for key in section:
        part = part[key]
    part.update(changes)
    assert not VALIDATOR.is_valid(recipe)


def test_the_schema_refuses_a_recipe_without_a_required_setting() -> None:
    for section in ("model", "data", "train"):
        assert not VALIDATOR.is_valid({key: value for key, value in VALID.items() if key != section})


def test_all_settings_are_listed_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = blockft("config")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    for section in list_sections():
        for setting in section.settings:
            assert setting.type.startswith("section") or f"\n{setting.key}: {setting.type}," in done.stdout
    assert "data.row_len: integer, default 4096 (at least 1, at most 16,777,216)" in done.stdout
    assert "train.adam_beta2: number, default 0.95 (at least 0, below 1)" in done.stdout


def test_the_settings_of_one_section_are_listed() -> None:
    printed = blockft("config", "data").stdout
    for key in ("data.row_len", "data.sources[].path", "data.prompt.question"):
        assert f"\n{key}: " in printed
    assert "train.batch_rows" not in printed and "model.path" not in printed
    assert {
        setting["key"].partition(".")[0]
        for setting in json.loads(blockft("config", "train", "--json").stdout)
    } == {"train"}


def test_all_settings_are_listed_as_json() -> None:
    found = {setting["key"]: setting for setting in json.loads(blockft("config", "--json").stdout)}
    sections = {"model", "data", "train", "eval", "data.mixture", "data.prompt", "data.splitting"}
    sections |= {f"{name}.sources[].constructed" for name in ("data", "eval")}
    assert set(found) == set(list_keys()) - sections
    assert found["eval.sources[].format"]["default"] == "required"
    assert found["data.order"]["allowed"] == "ascending, descending, shuffled, given"


def test_a_resolved_recipe_is_printed_as_yaml_and_json() -> None:
    recipe = load_recipe("demo", ["train.seed=3"])
    printed = OmegaConf.create(blockft("config", "demo", "train.seed=3").stdout)
    assert Recipe.model_validate(OmegaConf.to_container(printed)) == recipe
    assert Recipe.model_validate_json(blockft("config", "demo", "train.seed=3", "--json").stdout) == recipe


def test_the_readme_of_the_recipes_is_current() -> None:
    shipped = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert shipped == blockft("config", "--markdown").stdout, (
        "run: blockft config --markdown > recipes/README.md"
    )


def test_the_examples_of_the_readme_are_records_of_their_formats() -> None:
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"ormat `(\w+)`.*?```json\n(.*?)\n```", text, flags=re.DOTALL)
    assert [name for name, _ in examples] == ["messages", "fid", "alpaca", "samples"]
    for name, example in examples:
        source_format, record = SOURCE_FORMATS[name], json.loads(example)
        if source_format.parse_question:
            assert source_format.parse_question(record).documents
        else:
            assert source_format.parse_samples and list(source_format.parse_samples(record, "id"))
