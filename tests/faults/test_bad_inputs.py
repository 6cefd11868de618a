"""Bad input ends with one sentence and exit code 2: no traceback, nothing written, in bounded time.

The options are taken from the commands themselves, so that a new option is tested without a change here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from blockft.cli import commands
from blockft.config.reference import Setting, list_sections
from tests import run
from tests.commands import blockft
from tests.faults.bad_values import (
    BAD_INTEGERS,
    BAD_NUMBERS,
    BAD_PATHS,
    BAD_TEXTS,
    make_unreadable,
)


@dataclass(frozen=True)
class Toy:
    """A folder in which every command finds what it reads, and an empty working directory."""

    folder: Path
    cwd: Path
    unreadable: dict[str, str]

    def base(self, command: tuple[str, ...]) -> list[str]:
        """Return arguments with which a command gets as far as its work."""
        model, recipe, cache = self.folder / "model", self.folder / "recipe.yaml", self.folder / "cache"
        found: list[object] = {
            ("prepare",): [recipe, "data.output_dir=new"],
            ("inspect",): [self.folder / "data"],
            ("train",): [recipe, "train.output_dir=new", "--dry-run"],
            ("export",): [self.folder / "data", "new"],
            ("generate",): [model, "--input", self.folder / "requests.jsonl", "--max-new-tokens", 1],
            ("eval",): [model, recipe, "eval.output_dir=new", "eval.max_samples=1"],
            ("compare",): [self.folder / "eval"],
            ("recipes",): [],
            ("config",): [recipe],
            ("cache", "build"): [model, self.folder / "documents.jsonl", "--cache", cache],
            ("cache", "stats"): [cache],
            ("cache", "verify"): [cache],
            ("cache", "prune"): [cache, "--max-bytes", "1GB"],
            ("bench", "attention"): [],
            ("bench", "ttft"): [model, "--lengths", 64, "--question-len", 8, "--runs", 1, "--tiers", "host"],
            ("bench", "agreement"): [model, recipe, "--num-prompts", 1, "--max-new-tokens", 1],
            ("bench", "prepare"): [recipe],
            ("bench", "train"): [model],
        }[command]
        return [*command, *map(str, found)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    root = tmp_path_factory.mktemp("toy")
    for name in ("here", "there", "bad"):
        (root / name).mkdir()
    folder = root / "there"
    run.toy_recipe(folder)
    (folder / "requests.jsonl").write_text('{"documents": ["a"], "question": "b?"}\n')
    (folder / "documents.jsonl").write_text('{"title": "a", "text": "b"}\n')
    made = Toy(folder, root / "here", make_unreadable(root / "bad"))
    for arguments in (
        ("prepare", folder / "recipe.yaml"),
        ("eval", folder / "model", folder / "recipe.yaml", "eval.max_samples=2"),
        ("cache", "build", folder / "model", folder / "documents.jsonl", "--cache", folder / "cache"),
    ):
        done = blockft(*arguments, cwd=made.cwd)
        assert done.returncode == 0, done.stderr
    return made


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def assert_refused(toy: Toy, *arguments: str | Path, **environment: str) -> str:
    """Run a command that must be refused, and return its message."""
    before = listing(toy.cwd) + listing(toy.folder)
    done = blockft(*arguments, cwd=toy.cwd, **environment)
    shown = [str(argument)[:200] for argument in arguments]
    assert done.returncode == 2, (shown, done.returncode, done.stderr[-500:], done.stdout[-500:])
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("blockft: "), (shown, done.stderr)
    assert "Traceback" not in done.stderr and len(done.stderr) < 5000, shown
    assert listing(toy.cwd) + listing(toy.folder) == before, shown
    return done.stderr


# --- arguments and options


def walk(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command with its name."""
    if hasattr(command, "commands"):
        for inner, group in command.commands.items():
            yield from walk(group, (*name, inner))
    else:
        yield name, command


COMMANDS = dict(walk(typer.main.get_command(commands.app)))
PARAMETERS = [
    (name, parameter)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if not getattr(parameter, "is_flag", False)
]


def kind_of(parameter: Any) -> str:
    described = parameter.type_descriptor
    if getattr(described.parameter_info, "parser", None) is not None:
        return "path"
    return str(getattr(described.annotation, "__name__", described.annotation))


def with_value(toy: Toy, command: tuple[str, ...], parameter: Any, value: str) -> list[str]:
    """Return arguments of a command, one of which has a given value."""
    arguments = toy.base(command)
    if parameter.param_type_name == "option":
        return [*arguments, f"{parameter.opts[0]}={value}"]
    positions = [other for other in COMMANDS[command].params if other.param_type_name == "argument"]
    place = len(command) + positions.index(parameter)
    return [*arguments[:place], value, *arguments[place + 1 :]]


@pytest.mark.parametrize(
    ("command", "parameter"),
    PARAMETERS,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value.name,
)
def test_an_option_refuses_what_no_option_of_its_kind_can_take(
    toy: Toy, command: tuple[str, ...], parameter: Any
) -> None:
    kind = kind_of(parameter)
    values = {"path": BAD_PATHS, "int": BAD_INTEGERS, "float": BAD_NUMBERS}.get(kind, BAD_TEXTS)
    for value in values.values():
        assert_refused(toy, *with_value(toy, command, parameter, value))


def test_every_number_has_bounds_and_every_path_is_checked() -> None:
    checked_by_the_command = {"index", "node_rank", "temperature", "top_p"}
    for command, parameter in PARAMETERS:
        kind = kind_of(parameter)
        if kind in ("int", "float") and parameter.name not in checked_by_the_command:
            assert parameter.min is not None and parameter.max is not None, (command, parameter.name)
        assert kind not in ("Path", "list[Path]"), (command, parameter.name)


# --- settings


SETTINGS: list[Setting] = [
    setting for section in list_sections() for setting in section.settings if section.names != ("",)
]
WRONG_TYPES = {
    "integer": {name: value for name, value in BAD_INTEGERS.items() if name != "hexadecimal"}
    | {"octal": "010"},
    "number": {name: value for name, value in BAD_NUMBERS.items() if "exponent" not in name}
    | {"inf": ".inf"},
    "string": {
        "list": "[a]",
        "mapping": "{a: b}",
        "inf": ".inf",
        "fraction": "1.10",
        "true": "yes",
        "date": "2026-01-31",
    },
    "boolean": {"text": "maybe", "list": "[true]", "number": "2", "empty": "", "nan": ".nan"},
    "mapping": {
        "text": "a",
        "list": "[a]",
        "number": "1",
        "true": "true",
        "numbers as keys": "{1: 2}",
        "nan": "{a: .nan}",
    },
    "section": {"text": "a", "number": "1", "nan": ".nan"},
    "choice": {"text": "such", "list": "[a]", "number": "1", "empty": "", "true": "true"},
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_a_setting_refuses_values_of_other_kinds(toy: Toy, setting: Setting) -> None:
    key = setting.key.replace("[]", ".0")
    kind = setting.type.removesuffix(" or null")
    is_list = kind.startswith("list of ")
    wrong = WRONG_TYPES[kind.removeprefix("list of ").removesuffix("s") if is_list else kind]
    for name, value in wrong.items():
        if name == "empty" and (setting.type.endswith(" or null") or is_list):
            continue
        message = assert_refused(
            toy, "config", toy.folder / "recipe.yaml", f"{key}={f'[{value}]' if is_list else value}"
        )
        assert setting.name in message
    if not is_list:
        assert_refused(toy, "config", toy.folder / "recipe.yaml", f"{key}={'[' * 100}{']' * 100}")
