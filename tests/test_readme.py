"""The READMEs agree with the code: commands, recipes, Python examples, settings, links and limits.

Cheap commands of the main README run here on the demo's model; `tests/test_demo.py` runs the expensive ones.
"""

import ast
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import blockft
from blockft.cli.commands import app
from blockft.config.recipe import RECIPES_FOLDER, build_recipe, find_recipe
from blockft.config.settings import Recipe
from tests import commands
from tests.readmes import (
    MAIN,
    READMES,
    ROOT,
    anchors,
    code_blocks,
    inline_code,
    links,
    read,
    save_export,
    shell_commands,
    write_own_data,
)

PACKAGE = ROOT / "blockft" / "README.md"
COMMANDS = [(path, shlex.join(words)) for path in READMES for words in shell_commands(path)]
PYTHON = [(path, code) for path in READMES for code in code_blocks(path, "python")]
RECIPES = [(path, code) for path in READMES for code in code_blocks(path, "ya?ml")]


def name_of(value: object) -> str:
    return str(value.parent.relative_to(ROOT)) if isinstance(value, Path) else str(value)[:60]


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Parse the arguments of `blockft` as the command line does, without running the command.

    Return the name of the command and its parameters. An unknown command or option raises.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("blockft", list(words))
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return str(context.info_name), dict(context.params)


def test_the_readmes_of_all_folders_are_found() -> None:
    folders = {str(path.parent.relative_to(ROOT)) for path in READMES}
    assert {".", "blockft", "data", "data/results", "tests"} <= folders
    assert len([command for path, command in COMMANDS if path == MAIN]) >= 12
    assert len(PYTHON) >= 2 and RECIPES


def test_the_main_readme_is_short() -> None:
    lines = read(MAIN).splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_lines_of_prose_are_short(path: Path) -> None:
    """Rows of tables, JSON records and names of tests cannot be broken; recipes/README.md is generated."""
    if path.parent.name != "recipes":
        lines = [line for line in read(path).splitlines() if line[:1] not in "|{" and "::" not in line]
        assert max(map(len, lines)) <= 110


def test_the_first_screen_leads_to_ones_own_data() -> None:
    screen = "\n".join(read(MAIN).splitlines()[:45])
    for text in (
        "Block-Attention",
        "# . . . . .",
        "make demo",
        "make test",
        "## Your data and model",
        "sources:",
    ):
        assert text in screen


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for link in links(path):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target) if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=name_of)
def test_every_command_can_be_given(path: Path, command: str) -> None:
    """Commands, options, Make targets and scripts exist, and recipes and their overrides are valid."""
    head, *words = shlex.split(command)
    if head == "make":
        targets = [word for word in words if "=" not in word]
        for target in targets:
            assert re.search(rf"^{target}:", read(ROOT / "Makefile"), re.MULTILINE), target
    elif head == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    elif head in ("bash", "sbatch", "pytest", "python"):
        assert (ROOT / words[0]).is_file()
    elif head in ("blockft", "deepspeed"):
        name, parameters = parse(words if head == "blockft" else words[words.index("blockft") + 1 :])
        check_recipe(name, parameters)
    else:
        assert head in ("source", "pip", "cd", "git", "ssh", "export"), head


def check_recipe(name: str, parameters: dict[str, Any]) -> None:
    """Check that the recipe of a parsed command exists and that its overrides can be applied to it.

    Placeholders (in capitals) and files that the reader writes, as `mine.yaml`, stand for any recipe.
    """
    given = parameters.get({"eval": "target", "config": "recipe_or_section"}.get(name, "recipe"))
    if not given or name == "config" and given in Recipe.model_fields:
        return
    placeholder = str(given).isupper() or str(given) == "mine.yaml"
    recipe = yaml.safe_load(read(find_recipe("demo" if placeholder else str(given))))
    build_recipe(recipe, parameters.get("overrides") or (), str(given))


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_settings_named_in_the_text_exist(path: Path) -> None:
    """`train.lora={r: 32}` and `data.modes` name settings; `data.sources` has settings of its own."""
    for text in inline_code(path):
        if match := re.fullmatch(r"((?:model|data|train|eval)(?:\.\w+)+)(?:=.*)?", text):
            if match[1].endswith((".py", ".md", ".json", ".jsonl", ".yaml", ".sh")) or "/" in text:
                continue
            assert setting_exists(match[1]), text


def setting_exists(key: str) -> bool:
    kind: Any = Recipe
    for name in key.split("."):
        if name.isdigit():
            continue
        fields = getattr(kind, "model_fields", {})
        if name not in fields:
            return False
        arguments = [fields[name].annotation]
        while arguments and not hasattr(arguments[0], "model_fields"):
            arguments = [*getattr(arguments[0], "__args__", ()), *arguments[1:]]
        kind = arguments[0] if arguments else None
    return True


def test_the_map_of_the_package_names_every_module() -> None:
    """Each line of the map is a folder or a module of it, with what belongs there."""
    (tree,) = re.findall(r"^```\n(blockft/\n.*?)^```", read(PACKAGE), flags=re.MULTILINE | re.DOTALL)
    modules, folder = [], ""
    for line in tree.splitlines():
        name, _, meaning = line.strip().partition(" ")
        if name.endswith("/"):
            folder = name
        else:
            modules.append(folder + name)
            assert meaning.strip(), line
    packages = [path.parent for path in (ROOT / "blockft").rglob("__init__.py")]
    files = {path for package in packages for path in package.glob("*.py")}
    empty = {package / "__init__.py" for package in packages if "import" not in read(package / "__init__.py")}
    assert len(modules) == len(set(modules))
    assert {ROOT / module for module in modules} == files - empty


def test_every_invariant_has_tests_that_exist() -> None:
    """`tests/README.md` numbers 15 invariants and names the tests of each by file and function."""
    text = read(ROOT / "tests" / "README.md")
    numbers = re.findall(r"^\*\*(\d+)\.\*\*", text, flags=re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 16)]
    for invariant in re.split(r"^\*\*\d+\.\*\*", text, flags=re.MULTILINE)[1:]:
        check_named_tests(invariant)


def check_named_tests(text: str) -> None:
    """Check that a text names tests, and that they exist."""
    tests = re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)
    assert tests, text
    for file, function in tests:
        tree = ast.parse(read(ROOT / "tests" / file))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, function


def test_every_promise_about_security_has_tests_that_exist() -> None:
    """Each promise is a bold sentence; the points below it name the tests."""
    (section,) = re.findall(r"^## Security\n(.*?)^## ", read(PACKAGE), flags=re.MULTILINE | re.DOTALL)
    promises = re.split(r"^\*\*.*\.\*\*$", section, flags=re.MULTILINE)[1:]
    assert len(promises) == 4
    for promise in promises:
        check_named_tests(promise)


def test_files_named_in_the_package_readme_exist() -> None:
    for text in inline_code(PACKAGE):
        if re.fullmatch(r"[\w./-]+/[\w.-]*|[\w/-]+\.(py|md|json)", text):
            assert (ROOT / text).exists() or (ROOT / "blockft" / text).exists(), text


@pytest.mark.parametrize(("path", "text"), RECIPES, ids=name_of)
def test_every_recipe_in_a_readme_is_valid(path: Path, text: str) -> None:
    build_recipe(yaml.safe_load(text), (), str(path))


@pytest.mark.parametrize(("path", "code"), PYTHON, ids=name_of)
def test_python_examples_match_api_signatures(path: Path, code: str) -> None:
    """Every call of a name of `blockft` has arguments that its signature accepts."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    checked = 0
    for call in calls:
        name = ast.unparse(call.func)
        if not re.match(r"(blockft|engine)\.", name):
            continue
        target: Any = blockft
        for part in name.replace("engine.", "blockft.Engine.").split(".")[1:]:
            target = getattr(target, part)
        first = [None] if name.startswith("engine.") else []
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(target).bind(*first, *[None] * len(call.args), **keywords)
        checked += 1
    assert checked


def test_the_example_of_the_engine_runs() -> None:
    """On the demo's base model; `tests/test_demo.py` checks the answers of the fine-tuned model."""
    code = next(code for path, code in PYTHON if path == MAIN)
    code = code.replace("out/demo/model", "data/demo/model")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["0", "4"]


def test_the_recipe_for_ones_own_data_ships() -> None:
    """`recipes/own-data.yaml` is the recipe of the main README below an opening comment."""
    shipped = read(RECIPES_FOLDER / "own-data.yaml").splitlines(keepends=True)
    assert "".join(line for line in shipped if not line.startswith("#")) == code_blocks(MAIN, "yaml")[0]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's recipe and one file for each of its example records."""
    folder = tmp_path_factory.mktemp("mine")
    write_own_data(folder)
    return folder


def run(folder: Path, words: list[str]) -> str:
    """Run a command of the README in a folder and return what it prints; the command must succeed."""
    done = commands.blockft(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipe_for_ones_own_data_runs(mine: Path) -> None:
    """The README's commands over its own example records, with the demo's model: prepare to cached answers.

    Training and export are left to `tests/test_demo.py`: a copy of the demo's model stands for the export.
    """
    save_export(mine / "out" / "mine" / "model")
    given = [words[1:] for words in shell_commands(MAIN) if words[0] == "blockft" and "demo" not in words[1]]
    checked = []
    for words in given:
        if words[0] == "export" or words[:2] == ["bench", "ttft"] or any("out/demo" in w for w in words):
            continue
        if words[0] == "train":
            words.append("--dry-run")
        run(mine, words)
        checked.append(words[0])
    assert checked == ["prepare", "train", "eval", "generate", "inspect", "cache", "cache"]
    manifest = json.loads((mine / "out" / "mine" / "data" / "manifest.json").read_text())
    assert [source["kept"] for source in manifest["sources"]] == [1, 1]
    assert (mine / "data.html").is_file()
    assert (mine / "out" / "mine" / "eval" / "report.json").is_file()
    assert list((mine / "out" / "mine" / "blocks").iterdir())


def test_the_recipes_named_in_the_readme_ship() -> None:
    listed = commands.blockft("recipes")
    assert listed.returncode == 0
    for path in RECIPES_FOLDER.glob("*.yaml"):
        assert path.stem in listed.stdout
