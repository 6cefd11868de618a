"""Bad input ends with one sentence and exit code 2: no traceback, nothing written, in bounded time.

The options are taken from the commands themselves, so that a new option is tested without a change here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from blockft.cli import commands
from blockft.config.recipe import load_recipe
from blockft.config.reference import Setting, list_sections
from blockft.errors import UserError
from blockft.inference.engine import Engine
from tests import run
from tests.commands import blockft
from tests.faults.bad_values import (
    BAD_INTEGERS,
    BAD_NUMBERS,
    BAD_PATHS,
    BAD_TEXTS,
    DIGITS,
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
            ("serve",): [model, "--cache", cache],
            ("eval",): [model, recipe, "eval.output_dir=new", "eval.max_samples=1"],
            ("compare",): [self.folder / "eval"],
            ("recipes",): [],
            ("config",): [recipe],
            ("doctor",): [recipe],
            ("cache", "build"): [model, self.folder / "documents.jsonl", "--cache", cache],
            ("cache", "stats"): [cache],
            ("cache", "verify"): [cache],
            ("cache", "prune"): [cache, "--max-bytes", "1GB"],
            ("bench", "attention"): [],
            ("bench", "ttft"): [model, "--lengths", 64, "--question-len", 8, "--runs", 1, "--tiers", "host"],
            ("bench", "agreement"): [model, recipe, "--num-prompts", 1, "--max-new-tokens", 1],
            ("bench", "prepare"): [recipe],
            ("bench", "train"): [model],
            ("bench", "serve"): [model, "--document-len", 4, "--question-len", 2],
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


LIBRARY_WORDS = "Value error|Input should|Invalid value|unable to parse|validation error|is not one of"
"""Words of pydantic and typer in their messages, which no message of ours has."""


def assert_refused(toy: Toy, *arguments: str | Path, **environment: str) -> str:
    """Run a command that must be refused, and return its message."""
    before = listing(toy.cwd) + listing(toy.folder)
    done = blockft(*arguments, cwd=toy.cwd, **environment)
    shown = [str(argument)[:200] for argument in arguments]
    assert done.returncode == 2, (shown, done.returncode, done.stderr[-500:], done.stdout[-500:])
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("blockft: "), (shown, done.stderr)
    assert "Traceback" not in done.stderr and len(done.stderr) < 5000, shown
    assert not re.search(LIBRARY_WORDS, done.stderr), done.stderr
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


CHOICES = {
    f"{' '.join(name)} {parameter.opts[0]}": (name, parameter, [*members])
    for name, parameter in PARAMETERS
    if (members := getattr(parameter.type_descriptor.annotation, "__members__", {}).values())
}


@pytest.mark.parametrize("option", CHOICES)
def test_a_misspelled_choice_names_all_choices_and_the_nearest(toy: Toy, option: str) -> None:
    command, parameter, members = CHOICES[option]
    names = [member.value for member in members]
    for name in names:
        arguments = with_value(toy, command, parameter, f"{name.upper()}x")
        message = assert_refused(toy, *arguments)
        found = (
            f"{parameter.opts[0]} is '{name.upper()}x' (allowed: {', '.join(names)}; did you mean {name}?)"
        )
        assert message == f"blockft: {found} (see blockft {' '.join(command)} --help)\n"


SIZES = [
    (name, parameter) for name, parameter in PARAMETERS if parameter.metavar in ("SIZE", "AGE", "N,N,...")
]


@pytest.mark.parametrize(
    ("command", "parameter"),
    SIZES,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value.name,
)
def test_a_size_refuses_what_is_no_size(toy: Toy, command: tuple[str, ...], parameter: Any) -> None:
    values = {name: text for name, text in BAD_NUMBERS.items() if name != "empty"}
    for value in (*values.values(), "-1", "-1GB", "1 XB", "1e3", f"{DIGITS}GB", f"{DIGITS}d", "0x10"):
        cache = ["--cache=new"] if parameter.name == "cache_bytes" and command == ("generate",) else []
        assert_refused(toy, *with_value(toy, command, parameter, value), *cache)


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


WRONG_TYPES["string or list of strings"] = {
    **{name: value for name, value in WRONG_TYPES["string"].items() if name != "list"},
    "list of lists": "[[a]]",
    "list of numbers": "[.inf]",
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


CHOICE_SETTINGS = [setting for setting in SETTINGS if "choice" in setting.type]


@pytest.mark.parametrize("setting", CHOICE_SETTINGS, ids=lambda setting: setting.key)
def test_a_misspelled_choice_of_a_setting_names_the_nearest(toy: Toy, setting: Setting) -> None:
    key = setting.key.replace("[]", ".0")
    allowed = setting.allowed.removesuffix(", at least one")
    for name in allowed.split(", "):
        value = f"[{name}x]" if setting.type.startswith("list of") else f"{name}x"
        message = assert_refused(toy, "config", toy.folder / "recipe.yaml", f"{key}={value}")
        assert f"is '{name}x' (allowed: {allowed}; did you mean {name}?)" in message


# --- recipes


@pytest.mark.parametrize("command", ["prepare", "train", "config", "doctor"])
def test_a_misspelled_recipe_suggests_a_file_beside_it(toy: Toy, command: str) -> None:
    for name in ("recipee.yaml", "recip.yml", "Recipe"):
        message = assert_refused(toy, command, toy.folder / name)
        assert message.endswith(f"; did you mean {toy.folder}/recipe.yaml?\n")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["inspect", "{}/datta"], "{}/data"),
        (["export", "{}/modl", "new"], "{}/model"),
        (["compare", "{}/evl"], "{}/eval"),
        (["generate", "{}/model", "--input", "{}/reqests.jsonl"], "{}/requests.jsonl"),
        (["cache", "build", "{}/model", "{}/document.jsonl", "--cache", "new"], "{}/documents.jsonl"),
        (
            ["prepare", "{}/recipe.yaml", "data.sources.0.path={}/trian.jsonl", "data.output_dir=new"],
            "{}/train.jsonl",
        ),
        (
            [
                "eval",
                "{}/model",
                "{}/recipe.yaml",
                "eval.sources.0.path={}/heldot.jsonl",
                "eval.output_dir=new",
            ],
            "{}/heldout.jsonl",
        ),
    ],
)
def test_a_path_that_does_not_exist_suggests_one_beside_it(
    toy: Toy, arguments: list[str], meant: str
) -> None:
    message = assert_refused(toy, *(word.format(toy.folder) for word in arguments))
    assert f"; did you mean {meant.format(toy.folder)}?" in message


UNREADABLE = ("loop", "dangling", "pipe", "socket", "endless device", "root", "missing", "below a file")
"""Paths of `make_unreadable` where no command can read."""

RECIPES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is missing"),
    "a list": (b"- model\n", "mapping"),
    "a text": (b"recipe\n", "mapping"),
    "a text that is a number": (b"'0'\n", "mapping"),
    "a number": (b"1\n", "mapping"),
    "null": (b"null\n", "mapping"),
    "tabs": (b"model:\n\tpath: m\n", "cannot be read as a recipe"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "NUL": (b"model: {path: a\0b}\n", "NUL"),
    "UTF-16": ("model: {path: m}\n".encode("utf-16"), "UTF-16"),
    "Latin-1": ("model: {path: gr\u00fcn}\n".encode("latin-1"), "not UTF-8"),
    "10 MB": (b"# " + b"x" * 10_000_000, "larger than"),
    "deep lists": (b"model: " + b"[" * 100_000, "nesting"),
    "deep mappings": (b"model: " + b"{a: " * 100_000, "nesting"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(1000)), "nesting"),
    "laughs": (
        b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 10)) for c in b"bcdefghi"),
        "more than 10,000",
    ),
    "many keys": (b"".join(b"k%d: 1\n" % i for i in range(20_000)), "more than 10,000"),
    "an alias of itself": (b"model: &m {path: *m}\n", "stands inside of"),
    "an alias of nothing": (b"model: *none\n", "cannot be read as a recipe"),
    "a repeated key": (b"model: {path: a}\nmodel: {path: b}\n", "occurs twice"),
    "two documents": (b"model: {path: a}\n---\ntrain: {}\n", "second document"),
    "a number as key": (b"1: 2\n", "a text"),
    "a list as key": (b"? [a]\n: 1\n", "a key is not a text"),
    "null as key": (b"~: 1\n", ""),
    "an object of Python": (b"model: !!python/object/apply:os.system ['touch pwned']\n", "cannot be read"),
    "an unknown tag": (b"model: !m {path: a}\n", "cannot be read"),
    "a set": (b"model: !!set {a, b}\n", ""),
    "base64": (b"model: {path: !!binary aGk=}\n", ""),
    "an interpolation of itself": (b"model: {path: '${model.path}'}\n", "model.path"),
    "a cycle of interpolations": (b"model: {path: '${model.revision}', revision: '${model.path}'}\n", ""),
    "an unknown resolver": (b"model: {path: '${sh:ls}'}\n", ""),
    "an unset variable": (b"model: {path: '${oc.env:BLOCKFT_UNSET}'}\n", "BLOCKFT_UNSET"),
    "half an interpolation": (b"model: {path: '${'}\n", ""),
    "nested interpolations": (b"model: {path: '" + b"${a:" * 500 + b"}" * 500 + b"'}\n", ""),
    "a lone surrogate": (b'model: {path: "a\\ud800b"}\n', ""),
    "a mapping for a list": (b"data: {output_dir: o, sources: {format: samples, path: p}}\n", "data.sources"),
    "5000 digits": (b"train: {seed: %s}\n" % (b"9" * 5000), ""),
    "a decoded list": (b"model: {path: '${oc.decode:[1}'}\n", ""),
    "merge of a text": (b"model: {<<: text}\n", ""),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_that_is_no_recipe_is_refused(toy: Toy, name: str, tmp_path: Path) -> None:
    content, message = RECIPES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    assert message in assert_refused(toy, "config", recipe)


@pytest.mark.parametrize(
    "name", sorted(BAD_PATHS) + ["loop", "dangling", "pipe", "socket", "endless device", "root"]
)
@pytest.mark.parametrize("command", ["prepare", "train", "config"])
def test_a_path_that_holds_no_recipe_is_refused(toy: Toy, command: str, name: str) -> None:
    assert_refused(toy, command, (BAD_PATHS | toy.unreadable)[name])


OVERRIDES = {
    **{text: text for text in ("", "=", "=1", ".=1", "a..b=1", "[=1", "a[=1", "a[0=1", "${a}=1")},
    **{text: text for text in ("model.${b}=1", "data=null", "model=[]", "data.seed=!!int x")},
    **{f"index {index}": f"data.sources.{index}.path=a" for index in ("-1", "1e9", "9" * 20, "x", "")},
    **{f"value {value}": f"model.path={value}" for value in ("${", "\t", "{", "&a", "*a", "%", "@")},
    "binary": "model.path=!!binary aGk=",
    "an object of Python": "model.path=!!python/name:os.system",
    "a long key": "a" * 100_000 + "=1",
    "5000 digits": "train.seed=" + "9" * 5000,
}


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES)
def test_a_nonsense_override_is_refused(toy: Toy, override: str) -> None:
    assert_refused(toy, "config", toy.folder / "recipe.yaml", override)


MANY_EXAMPLES = pytest.param(1500, marks=pytest.mark.slow)  # a minute


def mutate(draw: Any, value: Any) -> Any:
    """Return a document with one part replaced, removed or doubled at random."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: mutate(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], mutate(draw, value[index]), *value[index + 1 :]]
    nothing = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("${x}")
    return draw(
        st.recursive(nothing, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)
    )


@st.composite
def mutated(draw: Any, document: Any) -> Any:
    return mutate(draw, draw(document) if isinstance(document, st.SearchStrategy) else document)


@pytest.mark.parametrize("num_examples", [50, MANY_EXAMPLES])
def test_a_recipe_with_one_wrong_part_is_read_or_refused(toy: Toy, num_examples: int) -> None:
    @settings(derandomize=True, deadline=None, max_examples=num_examples, database=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        valid = yaml.safe_load((toy.folder / "recipe.yaml").read_text())
        document = data.draw(mutated(valid))
        recipe = toy.folder.parent / "mutated.yaml"
        recipe.write_text(
            yaml.safe_dump(document, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
        )
        done = blockft("config", recipe, cwd=toy.cwd)
        if done.returncode == 0:
            again = toy.folder.parent / "again.yaml"
            again.write_text(done.stdout, encoding="utf-8")
            assert load_recipe(again) == load_recipe(recipe)
        else:
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (document, done.stderr)

    check()


@pytest.mark.parametrize("num_examples", [50, MANY_EXAMPLES])
def test_any_text_as_a_recipe_is_read_or_refused(toy: Toy, num_examples: int) -> None:
    @settings(derandomize=True, deadline=None, max_examples=num_examples, database=None)
    @given(text=st.text(st.characters(codec="utf-8")) | st.text(":-[]{}&*!?|>'\"%@` \n\tab1"))
    def check(text: str) -> None:
        recipe = toy.folder.parent / "text.yaml"
        recipe.write_text(text, encoding="utf-8")
        assert_refused(toy, "config", recipe)

    check()


# --- requests and corpora


REQUESTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\n",
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"1",
    "nan": b"NaN",
    "null": b"null",
    "no kind": b"{}",
    "two kinds": b'{"blocks": ["a"], "messages": []}',
    "an unknown field": b'{"blocks": ["a"], "temprature": 1}',
    "a repeated key": b'{"blocks": ["a"], "blocks": ["b"]}',
    "no blocks": b'{"blocks": []}',
    "empty blocks": b'{"blocks": ["", ""]}',
    "a text for blocks": b'{"blocks": "a"}',
    "numbers for blocks": b'{"blocks": [1]}',
    "no messages": b'{"messages": []}',
    "a text for messages": b'{"messages": "a"}',
    "a message without content": b'{"messages": [{"role": "user"}]}',
    "a message without role": b'{"messages": [{"content": "a"}]}',
    "an unknown role": b'{"messages": [{"role": "wizard", "content": "a"}]}',
    "null content": b'{"messages": [{"role": "user", "content": null}]}',
    "an answer at the end": b'{"messages": [{"role": "assistant", "content": "b"}]}',
    "a blank question": b'{"documents": ["a"], "question": " "}',
    "no question": b'{"documents": ["a"]}',
    "no documents": b'{"question": "a"}',
    "a text for documents": b'{"documents": "a", "question": "b"}',
    "numbers for documents": b'{"documents": [1], "question": "b"}',
    "a document without text": b'{"documents": [{"title": "a"}], "question": "b"}',
    "a score that is nan": b'{"documents": [{"text": "a", "score": NaN}], "question": "b"}',
    "a score of 400 digits": b'{"documents": [{"text": "a", "score": %s}], "question": "b"}' % (b"9" * 400),
    "a score of 5000 digits": b'{"documents": [{"text": "a", "score": %s}], "question": "b"}' % (b"9" * 5000),
    "a lone surrogate": b'{"blocks": ["a\\ud800"]}',
    "a true id": b'{"blocks": ["a"], "id": true}',
    "a text as meta": b'{"blocks": ["a"], "meta": "b"}',
    "UTF-16": '{"blocks": ["a"]}'.encode("utf-16"),
    "Latin-1": '{"blocks": ["\u00fc"]}'.encode("latin-1"),
    "deep": b'{"blocks": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a NUL byte": b'{"blocks": ["a"]}\n\0',
    "longer than the model": b'{"blocks": ["%s"]}' % (b"a" * 100_000),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_file_that_holds_no_request_is_refused(toy: Toy, name: str, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_bytes(REQUESTS[name])
    assert_refused(toy, "generate", toy.folder / "model", "--input", requests)


@pytest.mark.parametrize(
    "name", sorted(BAD_PATHS) + ["loop", "dangling", "pipe", "socket", "endless device", "root"]
)
def test_a_path_that_holds_no_requests_or_documents_is_refused(toy: Toy, name: str) -> None:
    path = (BAD_PATHS | toy.unreadable)[name]
    assert_refused(toy, "generate", toy.folder / "model", f"--input={path}")
    if name != "pipe":  # a corpus may come from another program
        assert_refused(toy, "cache", "build", toy.folder / "model", path, "--cache", toy.folder / "cache")


NO_DOCUMENTS = ("empty", "blank", "not JSON", "a list", "null", "no kind", "UTF-16", "Latin-1", "deep")
CORPORA = {name: REQUESTS[name] for name in NO_DOCUMENTS}


@pytest.mark.parametrize("name", CORPORA)
def test_a_file_that_holds_no_documents_is_refused(toy: Toy, name: str, tmp_path: Path) -> None:
    corpus = tmp_path / "documents.jsonl"
    corpus.write_bytes(CORPORA[name])
    assert_refused(toy, "cache", "build", toy.folder / "model", corpus, "--cache", toy.folder / "cache")


REQUEST_FORMS = [
    {"documents": [{"title": "a", "text": "b", "score": 1.5}, "c"], "question": "d", "id": "e"},
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": ["b", "c"]}]},
    {"blocks": ["a", "b"], "meta": {"c": 1}},
]


@pytest.fixture(scope="module")
def engine(toy: Toy) -> Iterator[Engine]:
    with Engine.load(toy.folder / "model", device="cpu") as opened:
        yield opened


@pytest.mark.parametrize("num_examples", [100, MANY_EXAMPLES])
def test_a_request_with_one_wrong_part_is_answered_or_refused(engine: Engine, num_examples: int) -> None:
    @settings(derandomize=True, deadline=None, max_examples=num_examples, database=None)
    @given(record=mutated(st.sampled_from(REQUEST_FORMS)))
    def check(record: Any) -> None:
        try:
            engine.encode(engine.parse_request(record, "line 1"), 1)
        except UserError as error:
            assert str(error).strip() and len(str(error)) < 5000

    check()


# --- hostfiles and reports


HOSTFILES = {
    "empty": b"",
    "comments": b"# node0 slots=1\n",
    "no slots": b"node0\n",
    "0 slots": b"node0 slots=0\n",
    "400 digits": b"node0 slots=%s\n" % (b"9" * 400),
    "minus 1": b"node0 slots=-1\n",
    "a host twice": b"node0 slots=1\nnode0 slots=2\n",
    "a range": b"node[0-3] slots=1\n",
    "a command": b"$(touch pwned) slots=1\n",
    "binary": bytes(range(256)),
    "NUL": b"node0 slots=1\0\n",
    "UTF-16": "node0 slots=1".encode("utf-16"),
    "a long line": b"n" * 1_000_000 + b"\n",
}


@pytest.mark.parametrize("name", HOSTFILES)
def test_a_wrong_hostfile_is_refused(toy: Toy, name: str, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_bytes(HOSTFILES[name])
    arguments = "train", toy.folder / "recipe.yaml", "train.output_dir=new", "--hostfile", hostfile
    assert_refused(toy, *arguments)
    assert_refused(toy, *arguments, "--no-ssh", "--node-rank", "0")


REPORTS = {
    name: REQUESTS[name]
    for name in ("empty", "not JSON", "a list", "null", "no kind", "UTF-16", "deep", "nan")
} | {
    "modes are a list": b'{"version": 2, "modes": [], "options": {}}',
    "no scores": b'{"version": 2, "modes": {"block": {}}, "options": {}}',
    "another version": b'{"version": 999, "modes": {"block": {"all": {}}}, "options": {}}',
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_file_that_is_no_report_is_refused(toy: Toy, name: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(REPORTS[name])
    assert_refused(toy, "compare", tmp_path)
    assert_refused(toy, "compare", toy.folder / "eval", tmp_path / "report.json")


# --- what a training reads


DEEPSPEED: dict[str, str] = {
    "not JSON": "{",
    "empty": "",
    "a list": "[]",
    "null": "null",
    "a repeated key": '{"bf16": {}, "bf16": {}}',
    "deep": "[" * 100_000,
    "an unknown key": '{"zero_optimisation": {}}',
    "a removed key": '{"sparse_attention": {}}',
    "an unknown key of ZeRO": '{"zero_optimization": {"stag": 2}}',
    "stage 4": '{"zero_optimization": {"stage": 4}}',
    "stage true": '{"zero_optimization": {"stage": true}}',
    "a text as stage": '{"zero_optimization": {"stage": "2"}}',
    "null for ZeRO": '{"zero_optimization": null}',
    "a text as bucket": '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}',
    "an infinite bucket": '{"zero_optimization": {"stage": 2, "reduce_bucket_size": Infinity}}',
    "an unknown device": '{"zero_optimization": {"stage": 3, "offload_param": {"device": "tape"}}}',
    "a number as offload": '{"zero_optimization": {"stage": 3, "offload_param": 3}}',
    "offload without optimizer": '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
    "a master copy from 16 bits": '{"zero_optimization": {"stage": 1, "load_from_fp32_weights": false}}',
    "elastic checkpoints": '{"zero_optimization": {"stage": 2, "elastic_checkpoint": true}}',
    "old pickles": '{"checkpoint": {"checkpoint_serialization": false}}',
    "another writer": '{"checkpoint": {"writer": {"type": "python"}}}',
    "universal checkpoints": '{"checkpoint": {"load_universal": true}}',
    "another compiler": '{"compile": {"deepcompile": true}}',
    "a local disk": '{"checkpoint": {"use_node_local_storage": true}}',
    "an unknown optimizer": '{"optimizer": {"type": "Nonsense"}}',
    "an optimizer without type": '{"optimizer": {}}',
    "an unknown argument": '{"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}',
    "another learning rate": '{"optimizer": {"type": "AdamW", "params": {"lr": 7}}}',
    "a list as params": '{"optimizer": {"type": "AdamW", "params": []}}',
    "an unknown scheduler": '{"scheduler": {"type": "Nonsense"}}',
    "another peak": '{"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 7}}}',
    "another batch": '{"train_batch_size": 7}',
    "a micro-batch of 2": '{"train_micro_batch_size_per_gpu": 2}',
    "a text as batch": '{"train_batch_size": "many"}',
    "a negative batch": '{"train_batch_size": -1}',
    "a batch of 400 digits": '{"train_batch_size": %s}' % ("9" * 400),
    "other accumulation": '{"gradient_accumulation_steps": 3}',
    "other clipping": '{"gradient_clipping": 0.5}',
    "float16": '{"fp16": {"enabled": true}}',
    "bfloat16 on a CPU": '{"bf16": {"enabled": true}}',
    "a text as switch": '{"wall_clock_breakdown": "yes"}',
    "nan": '{"steps_per_print": NaN}',
    "auto as steps": '{"steps_per_print": "auto"}',
    "auto as live weights": '{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}}',
    "auto as group": '{"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}',
    "auto of another stage": '{"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": "auto"}}',
    "auto as argument": '{"optimizer": {"type": "AdamW", "params": {"fused": "auto"}}}',
    "auto as device": '{"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}}',
    "null as bucket": '{"zero_optimization": {"stage": 2, "reduce_bucket_size": null}}',
    "an unknown type of messages": '{"communication_data_type": "int3"}',
}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_wrong_deepspeed_file_is_refused_before_the_run(toy: Toy, name: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(DEEPSPEED[name])
    message = assert_refused(toy, *toy.base(("train",)), f"train.deepspeed={path}", "model.dtype=float32")
    assert "train.deepspeed" in message


SCHEDULES = [
    ("polynomial", "{lr_end: 1}"),
    ("polynomial", "{power: x}"),
    ("polynomial", "{lr_end: -1}"),
    ("cosine", "{num_cycles: .inf}"),
    ("cosine", "{num_cycles: x}"),
    ("cosine", "{unknown: 1}"),
    ("linear", "{power: 1}"),
    ("constant", "{power: 1}"),
    ("constant_with_warmup", "{min_lr: 1}"),
    ("cosine_with_min_lr", "{}"),
    ("cosine_with_min_lr", "{min_lr: 5}"),
    ("inverse_sqrt", "{timescale: 0}"),
    ("warmup_stable_decay", "{num_decay_steps: -5}"),
    ("warmup_stable_decay", "{}"),
    ("reduce_lr_on_plateau", "{}"),
    ("greedy", "{}"),
    ("nonsense", "{}"),
    ("", "{}"),
]


@pytest.mark.parametrize(("kind", "arguments"), SCHEDULES)
def test_a_wrong_schedule_is_refused_before_the_run(toy: Toy, kind: str, arguments: str) -> None:
    settings = f"train.lr_scheduler_type='{kind}'", f"train.lr_scheduler_kwargs={arguments}"
    assert_refused(toy, *toy.base(("train",)), *settings)


LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "variables",
    [
        *({"RANK": value} for value in ("x", "", "-1", "1.5", "1", "9" * 400, "\u0663", " ")),
        *({"WORLD_SIZE": value} for value in ("0", "x", "", "-1", "9" * 400)),
        *({"LOCAL_RANK": value} for value in ("x", "-1", "1", "")),
        *({"MASTER_PORT": value} for value in ("abc", "0", "65536", "-1", "")),
        {"MASTER_ADDR": ""},
        {"DEEPSPEED_TIMEOUT": "soon"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ],
    ids=str,
)
def test_variables_that_no_launcher_sets_are_refused(toy: Toy, variables: dict[str, str]) -> None:
    arguments = "train", toy.folder / "recipe.yaml", "train.output_dir=new"
    message = assert_refused(toy, *arguments, **(LAUNCHED | variables))
    assert next(iter(variables)) in message


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_without_a_variable_of_its_launcher_is_refused(
    toy: Toy, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    variables = {name: value for name, value in LAUNCHED.items() if name != missing}
    message = assert_refused(toy, "train", toy.folder / "recipe.yaml", "train.output_dir=new", **variables)
    assert missing in message


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ("[wandb]", "WANDB_MODE=offline"),
        ("[nonsense]", "allowed: none"),
        ("[none, wandb]", "none excludes the other trackers"),
        ("[wandb, wandb]", "once"),
        ("['']", "allowed: none"),
        ("[dvclive]", "not installed"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused_before_the_run(
    toy: Toy, trackers: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    variables = {"NETRC": str(tmp_path / "netrc"), "HOME": str(tmp_path)}
    arguments = *toy.base(("train",)), f"train.report_to={trackers}"
    assert message in assert_refused(toy, *arguments, **variables)
