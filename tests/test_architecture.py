"""Rules of structure that code can check: imports go one way and form no cycle; shipped recipes load."""

import ast
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from blockft.config.recipe import RECIPES_FOLDER, load_recipe

ROOT = Path(__file__).parents[1]
LIBRARY = {"attention", "data", "model", "inference"}
PRINTING = {"console", "markdown", "printable"}
FOLDERS = {"folder_lock", "outputs", "run_folder"}
SUPPORT = PRINTING | FOLDERS | {"hub_access", "inputs", "progress", "digest", "units", "errors", "version"}
MAY_IMPORT = {
    "printable": set(),
    "console": {"printable"},
    "markdown": {"printable"},
    "errors": {"printable"},
    "file_content": {"errors"},
    "version": set(),
    "hub_access": {"errors"},
    "held_signals": set(),
    "hub_kernels": set(),
    "inputs": {"errors"},
    "validation": {"inputs", "errors"},
    "config": {"validation", "inputs", "errors"},
    "units": {"errors"},
    "digest": {"progress", "units", "errors"},
    "folder_lock": {"errors"},
    "outputs": {"folder_lock", "printable", "digest", "errors"},
    "run_folder": {"outputs", "digest", "errors"},
    "progress": {"console", "printable", "units", "errors"},
    "attention": {"errors"},
    "data": {
        "attention",
        "file_content",
        "folder_lock",
        "hub_access",
        "outputs",
        "digest",
        "inputs",
        "units",
        "errors",
    },
    "model": FOLDERS
    | {
        "file_content",
        "hub_access",
        "inputs",
        "markdown",
        "attention",
        "progress",
        "digest",
        "units",
        "errors",
    },
    "inference": {"data", "model", "attention", "digest", "inputs", "units", "errors"},
    "training": LIBRARY
    | FOLDERS
    | {"held_signals", "inputs", "printable", "digest", "units", "validation", "errors", "version"},
    "evaluation": LIBRARY | {"markdown", "printable", "outputs", "digest", "errors"},
    "serving": LIBRARY | {"held_signals", "inputs", "errors"},
    "page": {"data", "inputs", "printable", "units", "errors", "version"},
    "bench": LIBRARY | {"training", "held_signals"} | SUPPORT,
    "stages": LIBRARY | {"page", "bench", "training", "evaluation", "serving", "config"} | SUPPORT,
    "cli": {"bench", "stages", "training", "config", "validation"} | SUPPORT,
    "__main__": {"cli"},
    "__init__": {"hub_kernels", "version"},
}
"""The parts that each part may import: downwards only; only cli and stages import the settings."""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "blockft").parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_modules(node: ast.AST, modules: Collection[str]) -> set[str]:
    """Return the modules of blockft imported anywhere below a node, also inside functions.

    Imports under `if TYPE_CHECKING` are left out: they never run.
    """
    found = set()
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            found.add(submodule if submodule in modules else node.module)
    if isinstance(node, ast.Import):
        found |= {alias.name for alias in node.names}
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            found |= imported_modules(child, modules)
    return found & set(modules)


SOURCES = sorted((ROOT / "blockft").rglob("*.py"))
MODULES = {module_name(path): path for path in SOURCES}
IMPORTS = {
    name: imported_modules(ast.parse(path.read_text(encoding="utf-8")), MODULES)
    for name, path in MODULES.items()
}
RECIPES = sorted(RECIPES_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    part = part_of(MODULES[name])
    imported = {part_of(MODULES[other]) for other in IMPORTS[name]}
    assert imported <= MAY_IMPORT[part] | {part}


@pytest.mark.parametrize("name", MODULES)
def test_no_private_name_is_imported_from_another_module(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [
        alias.name for node in imports if (node.module or "").startswith("blockft") for alias in node.names
    ]
    assert not [name for name in names if name.startswith("_") and not name.startswith("__")]


PRINTERS = {"printable", "console", "progress"}
"""Modules that print text of users, without markup and with control characters escaped."""

PRINTS_BY_ITSELF = {
    "blockft.training.launch": "lines of workers, which have printed them as they are",
    "blockft.training.library_warnings": "lines of libraries",
    "blockft.training.progress_line": "numbers, and the codes that rewrite a line of the terminal",
}


@pytest.mark.parametrize("name", MODULES)
def test_text_is_printed_without_markup_and_control_characters(name: str) -> None:
    if part_of(MODULES[name]) in PRINTERS or name in PRINTS_BY_ITSELF:
        return
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert imported.isdisjoint({"rich", "rich.console", "rich.progress", "rich.markup", "rich.live"})
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert called.isdisjoint({"print", "typer.echo", "typer.secho", "Text.from_markup", "rprint"})
    assert not [c for c in called if c.endswith(("stdout.write", "stderr.write"))]


def test_imports_form_no_cycle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_there_are_sources_and_recipes() -> None:
    assert len(SOURCES) > 20 and RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path.stem) == load_recipe(str(path))
    assert path.read_text(encoding="utf-8").startswith("# "), "a recipe opens with its purpose"
