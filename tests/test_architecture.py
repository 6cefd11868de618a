"""The house rules that code can check: imports go one way, and every recipe that ships can be read."""

import ast
from pathlib import Path

import pytest

from blockft.config.recipe import RECIPES_FOLDER, load_recipe

ROOT = Path(__file__).parents[1]
SHARED = {"config", "outputs", "progress", "units", "errors", "version"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "config": {"errors"},
    "outputs": {"errors"},
    "units": {"errors"},
    "progress": set(),
    "attention": {"errors"},
    "data": {"attention", "errors"},
    "model": {"attention", "outputs", "progress", "errors"},
    "inference": {"data", "model", "attention", "units", "errors"},
    "training": {"inference", "data", "model", "attention", "outputs", "errors"},
    "evaluation": {"inference", "data", "model", "attention", "errors"},
    "bench": {"stages", "evaluation", "training", "inference", "data", "model", "attention", *SHARED},
    "stages": {"bench", "training", "evaluation", "inference", "data", "model", "attention", *SHARED},
    "cli": {"bench", "stages", "training", *SHARED},
    "__main__": {"cli"},
    "__init__": {"stages", "inference", "data", "config", "version"},
}
"""Where each part may import from: downwards only, and only cli and stages know the settings."""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "blockft").parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "blockft":
            names |= {node.module} if node.module != "blockft" else {f"blockft.{a.name}" for a in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "blockft"}
    return {name.split(".")[1] for name in names if "." in name}


SOURCES = sorted((ROOT / "blockft").rglob("*.py"))
RECIPES = sorted(RECIPES_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    assert imported_parts(path) <= MAY_IMPORT[part] | {part}


def test_there_are_sources_and_recipes() -> None:
    assert len(SOURCES) > 20 and RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_can_be_read(path: Path) -> None:
    assert load_recipe(path.stem) == load_recipe(str(path))
    assert path.read_text(encoding="utf-8").startswith("# "), "a recipe opens with its purpose"
