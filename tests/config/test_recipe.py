"""Reading a recipe: conversions, and error messages that name the override or the file at fault."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from blockft.config.choices import Mode, Retriever
from blockft.config.recipe import build_recipe, dump_recipe, list_recipes, load_recipe
from blockft.errors import UserError
from blockft.inputs import shorten

SETTINGS: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"output_dir": "o", "sources": [{"format": "samples", "path": "p"}]},
    "train": {"output_dir": "o"},
}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.9.path=3", "cannot be set: list index out of range"),
        ("data.sources.x.path=3", "cannot be set: Index 'x' (str) is not an int"),
        ("train.lora={r: ", "cannot be set: while parsing"),
        ("train.lora={r:", "; put quotes around a setting that contains spaces"),
        ("data.modes=[block,", "; put quotes around a setting that contains spaces"),
        ("data.row_len=1e3", ": data.row_len is '1e3', it should be an integer"),
        ("data.row_len=3.5", ": data.row_len is 3.5, it should be an integer"),
        ("data.row_len=3.0", ": data.row_len is 3.0, it should be an integer"),
        ("data.row_len='3.0'", ": data.row_len is '3.0', it should be an integer"),
        ("data.row_len=true", ": data.row_len is True, it should be an integer"),
        ("data.seed=[1]", ": data.seed is [1], it should be an integer"),
        ("data.row_len=null", ": data.row_len is missing"),
        ("data.output_dir=???", ": data.output_dir is missing"),
        ("data.row_len=0", ": data.row_len is 0, it should be at least 1"),
        ("train.learning_rate=true", ": train.learning_rate is True, it should be a number"),
        ("train.learning_rate=-1e-4", ": train.learning_rate is -1e-4, it should be at least 0"),
        ("train.learning_rate=.nan", ": train.learning_rate is nan, it should be finite"),
        ("train.max_grad_norm=inf", ": train.max_grad_norm is inf, it should be finite"),
        ("train.adam_beta2=1.0", ": train.adam_beta2 is 1.0, it should be below 1"),
        ("train.teacher_weight=0", ": train.teacher_weight is 0, it should be above 0"),
        ("train.teacher_weight=2", ": train.teacher_weight is 2, it should be at most 1"),
        ("train.weight_decay=x", ": train.weight_decay is 'x', it should be a number"),
        ("train.torch_compile=maybe", ": train.torch_compile is 'maybe', it should be true or false"),
        ("train.report_to=wandb", ": train.report_to is 'wandb', it should be a list"),
        ("train.lora=yes", ": train.lora is True, it should be a mapping"),
        ("model.path=[a]", ": model.path is ['a'], it should be a string"),
        ("model=m", ": model is 'm', it should hold path, revision, chat_template, init, attention, dtype"),
        ("data.sources=[]", ": data.sources is [], it should hold at least 1"),
        ("data.sources=[{path: p}]", ": data.sources[0].format is missing"),
        ("data.sources.0.format=csv", ": data.sources[0].format is 'csv' (allowed: samples, hotpotqa, "),
        ("data.modes=[block, half]", ": data.modes[1] is 'half' (allowed: block, full)"),
        ("data.sources[0].max_samples=0", ": data.sources[0].max_samples is 0"),
        ("data.sources[0].pth=x", ": unknown key data.sources[0].pth (did you mean data.sources[0].path?)"),
        ("tran.seed=1", ": unknown key tran (did you mean train?)"),
        ("learning_rate=1", ": unknown key learning_rate (did you mean train.learning_rate?)"),
        (
            "model.xyz=1",
            ": unknown key model.xyz (allowed: path, revision, chat_template, init, attention, dtype, "
            "quantization)",
        ),
        (f"train.batch_rows={10**400}", "(401 characters), it should be at most 65,536"),
        (f"data.seed={2**63}", "it should be at most 9,223,372,036,854,775,807"),
        ("train.num_train_epochs=10001", "it should be at most 10,000"),
        ("data.row_len=010", "line 1: 010 is an octal number in YAML: write a decimal number"),
        ("model.revision=0x1f", "a hexadecimal number"),
        ("train.max_steps=1:30", "a number in base 60"),
        ("train.output_dir=2026-01-31", "a date in YAML: write a decimal number, or a text in quotes"),
        ("model.path=.inf", ": model.path is inf, it should be a string: put quotes around it"),
        ("model.path=yes", ": model.path is True, it should be a string: put quotes around it"),
        ("data.output_dir=", ": data.output_dir is missing"),
        ("data.output_dir='  '", ": data.output_dir '  ' is empty: name a file or a folder"),
        ("data.output_dir=~/data", ": data.output_dir '~/data' starts with ~"),
        ('train.output_dir="a\\0b"', ": train.output_dir contains a NUL character"),
        ("train.teacher=a/" + "b" * 256, "has a name of more than 255 bytes"),
        ("train.deepspeed=" + "a/" * 2100, "is longer than 4095 bytes"),
        ("train.lora={1: 2}", ": train.lora has the key 1, it should be a text"),
        ("train.lora={r: 1, r: 2}", "line 1: the key 'r' occurs twice"),
        ("train.lora=" + "[" * 60 + "]" * 60, "the nesting has more than 50 levels"),
        ("train.lora={a: &x [1], b: [*x, &y {c: *y}]}", "*y stands inside of &y"),
        ("data.seed=${data.seed}", "data.seed"),
        ("data.output_dir=${none}", ": Interpolation key 'none' not found (at data.output_dir)"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        build_recipe(SETTINGS, ["data.seed=1", override, "train.seed=1"], "r.yaml")
    found = str(raised.value)
    assert found.startswith(shorten(override.rstrip())) and message in found
    assert "\n" not in found and "full_key" not in found and "r.yaml" not in found


def test_all_faults_are_reported_with_their_origin() -> None:
    settings = SETTINGS | {"train": {"seed": 1}}
    with pytest.raises(UserError) as raised:
        build_recipe(settings, ["data.row_len=0", "train.seed=2", "data.seed=x"], "r.yaml")
    assert str(raised.value) == (
        "data.row_len=0: data.row_len is 0, it should be at least 1; "
        "data.seed=x: data.seed is 'x', it should be an integer; "
        "r.yaml: train.output_dir is missing"
    )
    with pytest.raises(UserError, match=r"^r\.yaml: data\.sources is \[\], it should hold at least 1$"):
        build_recipe(SETTINGS | {"data": {"output_dir": "o", "sources": []}}, ["data.seed=1"], "r.yaml")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=1", 1.0),
        ("train.max_steps='5'", 5),
        ("train.max_steps=null", None),
        ("train.torch_compile=on", True),
        ("train.teacher=7", "7"),
        ("train.deepspeed=${model.path}", "m"),
    ],
)
def test_values_are_converted_to_the_type_of_the_setting(override: str, value: object) -> None:
    recipe = build_recipe(SETTINGS, [override], "r.yaml")
    found = getattr(recipe.train, override.partition("=")[0].removeprefix("train."))
    assert found == value and type(found) is type(value)


def test_choices_are_enums_and_an_assignment_is_validated() -> None:
    recipe = build_recipe(SETTINGS, ["data.sources.0.retriever=bm25"], "r.yaml")
    assert recipe.data.sources[0].retriever is Retriever.bm25 and recipe.data.modes == [Mode.block, Mode.full]
    with pytest.raises(ValidationError):
        recipe.train.batch_rows = 0
    with pytest.raises(ValidationError):
        recipe.train.batch_size = 1  # type: ignore[attr-defined]


def test_defaults_are_not_shared_between_recipes() -> None:
    one, other = (build_recipe(SETTINGS, [], "r.yaml") for _ in range(2))
    one.data.modes.pop()
    one.train.lr_scheduler_kwargs["power"] = 2
    assert len(other.data.modes) == 2 and not other.train.lr_scheduler_kwargs


@pytest.mark.parametrize("name", list_recipes())
def test_a_dumped_recipe_is_read_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["train.lora={r: 8, key: null}", "train.learning_rate=1e-5"])
    recipe.model.revision = "1e5"
    recipe.data.prompt.instruction = "Zür ${x} \\${y} 'z' \\n:\n- yes\n"
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


def test_a_section_that_is_missing_names_what_it_has_to_hold() -> None:
    with pytest.raises(UserError) as raised:
        build_recipe({"data": SETTINGS["data"]}, [], "r.yaml")
    assert str(raised.value) == (
        "r.yaml: model is missing, a section with path; train is missing, a section with output_dir"
    )


@pytest.mark.parametrize("key", ["data.no_such", "model.dtype", "train.lora.r", "eval", "model.path"])
def test_a_setting_that_is_marked_as_missing_is_an_error(key: str) -> None:
    """OmegaConf marks a value that has to be given as `???`."""
    with pytest.raises(UserError, match=f"{key.replace('.', '[.]')} is missing"):
        build_recipe(SETTINGS, [f"{key}=???"], "r.yaml")


SECRET = "sk-123-secret"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("api_key_env", SECRET, "is not the name of an environment variable"),
        ("api_key_env", f"KEY {SECRET}", "is not the name of an environment variable"),
        ("api_key", SECRET, "did you mean data.teacher.api_key_env"),
        ("key", SECRET, "unknown key"),
        ("api_key_envv", SECRET, "unknown key"),
        ("base_urls", SECRET, "unknown key"),
        ("base_url", f"http://user:{SECRET}@host/v1", "holds a password"),
        ("base_url", f"http://host/v1?key={SECRET}", "holds a password or parameters"),
        ("base_url", f"http://host/v1#{SECRET}", "holds a password or parameters"),
        ("base_url", f"ftp://{SECRET}/v1", "is not an address"),
        ("base_url", f"{SECRET}/v1", "is not an address"),
        ("base_url", f"http://[{SECRET}/v1", "is not an address"),
        ("base_url", f"http://host:{SECRET}/v1", "is not an address"),
        ("base_url", "http://", "is not an address"),
        ("base_url", f"http://{SECRET}/v1/chat/completions", "leave out /chat/completions"),
    ],
)
def test_no_message_shows_what_may_be_a_key_of_a_teacher(name: str, value: str, message: str) -> None:
    teacher = {"model": "m", name: value}
    settings = SETTINGS | {"data": SETTINGS["data"] | {"teacher": teacher}}
    ways: list[tuple[Any, list[str]]] = [
        (settings, []),
        (SETTINGS, ["data.teacher.model=m", f"data.teacher.{name}='{value}'"]),
        (SETTINGS, [f"data.teacher={json.dumps(teacher)}"]),
        (SETTINGS, [f"data.teacher={{model: m, {name}: '{value}'}}"]),
    ]
    for given, overrides in ways:
        with pytest.raises(UserError, match=message) as caught:
            build_recipe(given, overrides, "recipe.yaml")
        assert SECRET not in str(caught.value)


QUESTION = "question: q, answers: a"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("", " has none, it should have one of question, messages and prompt"),
        (f"{QUESTION}, messages: m", " has question and messages, it should have one of"),
        ("question: q", " has columns with a question and neither answers nor response"),
        ("prompt: q", " has a prompt and no completion"),
        ("completion: q", " has none, it should have one of"),
        ("messages: m, answers: a", " has answers, which does not go with messages"),
        (f"{QUESTION}, system: s", " has system, which does not go with question"),
        (
            f"{QUESTION}, documents: d, supporting: s, supporting_indices: i",
            " has supporting and supporting_indices, it",
        ),
        (f"{QUESTION}, supporting: s", " has supporting and no documents of the records"),
        (f"{QUESTION}, supporting_indices: s", " has supporting_indices and no documents"),
        (f"{QUESTION}, score: s", " has score and no documents of the records"),
        (f"{QUESTION}, documents: []", ".documents is [], it should hold at least 1"),
        (f"{QUESTION}, documents: a..b", ".documents[0] 'a..b' is not a path"),
        (f"{QUESTION}, title: 'a_*_*'", ".title[0] 'a_*_*' has several stars"),
        (f"{QUESTION}, dokuments: d", "(did you mean data.sources[0].columns.documents?)"),
        (f"{QUESTION}, documents: {{a: b}}", ".documents[0] is {'a': 'b'}, it should be a string"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(columns: str, problem: str) -> None:
    override = f"data.sources=[{{path: p, format: columns, columns: {{{columns}}}}}]"
    with pytest.raises(UserError) as raised:
        build_recipe(SETTINGS, [override], "test")
    assert problem in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            f"format: fid, columns: {{{QUESTION}}}",
            "has columns, which only the format columns reads, not fid",
        ),
        (
            "format: columns, response: teacher_with_gold, columns: {question: q, response: a}",
            "teacher_with_gold, but its columns have no answers",
        ),
        ("format: fid, corpus: c.jsonl", "has corpus, which only the format columns reads, not fid"),
        (f"format: columns, corpus: c, columns: {{{QUESTION}}}", "has a corpus that nothing searches: set"),
        (
            "format: columns, corpus: c, retriever: bm25, columns: {messages: m}",
            "its columns have no question",
        ),
    ],
)
def test_columns_and_corpora_belong_to_questions_of_their_format(source: str, problem: str) -> None:
    with pytest.raises(UserError) as raised:
        build_recipe(SETTINGS, [f"data.sources=[{{path: p, {source}}}]"], "test")
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_columns_are_one_path_or_several_and_survive_a_dump(tmp_path: Path) -> None:
    columns = r"{question: 1, answers: 'a\.b', documents: [x, 'y[]']}"
    override = f"data.sources=[{{format: columns, path: p, columns: {columns}}}]"
    recipe = build_recipe(SETTINGS, [override, "data.sources.0.columns.title=t"], "test")
    found = recipe.data.sources[0].columns
    assert found and (found.question, found.answers, found.title) == ("1", [r"a\.b"], ["t"])
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe
