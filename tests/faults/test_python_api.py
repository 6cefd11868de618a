"""Bad arguments of the Python API raise a UserError or a TypeError that names the argument."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import blockft
from blockft.errors import UserError
from tests import run


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    run.toy_recipe(folder)
    return folder


def refuse(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises((UserError, TypeError)) as raised:
        call(*arguments, **named)
    message = str(raised.value)
    assert message and "\n" not in message and len(message) < 5000
    return message


@pytest.mark.parametrize(
    "name", [None, 1, b"demo", ["demo"], "", "~/x", "a\0b", "n" * 300, Path("/dev/zero")], ids=str
)
def test_load_recipe_refuses_what_is_no_recipe(name: Any) -> None:
    refuse(blockft.load_recipe, name)


@pytest.mark.parametrize(
    "overrides", ["train.seed=1", {"train.seed": 1}, None, [1], ["train.seed"], [None]], ids=str
)
def test_load_recipe_refuses_what_are_no_overrides(overrides: Any) -> None:
    refuse(blockft.load_recipe, "demo", overrides)


@pytest.mark.parametrize("recipe", [None, "demo", {}, Path("demo.yaml"), 1], ids=str)
def test_prepare_and_train_refuse_what_is_no_recipe(recipe: Any) -> None:
    assert "load_recipe" in refuse(blockft.prepare, recipe)
    assert "load_recipe" in refuse(blockft.train, recipe)


@pytest.mark.parametrize("path", [None, 1, b"a", "", "a\0b", "n" * 300, "~", "no/such"], ids=str)
def test_export_and_evaluate_refuse_what_is_no_path(path: Any, tmp_path: Path) -> None:
    refuse(blockft.export, path, tmp_path / "out")
    refuse(blockft.evaluate, path, path)
    refuse(blockft.Engine.load, path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_shard_size": 5},
        {"max_shard_size": "9" * 400},
        {"dtype": "int8"},
        {"push": "a b"},
        {"report": "no"},
    ],
    ids=str,
)
def test_export_refuses_wrong_arguments(arguments: dict[str, Any], tmp_path: Path) -> None:
    refuse(blockft.export, tmp_path, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [{"modes": "block"}, {"modes": ["half"]}, {"modes": [1]}, {"overrides": "a=1"}, {"format": "csv"}],
    ids=str,
)
def test_evaluate_refuses_wrong_arguments(toy: Path, arguments: dict[str, Any]) -> None:
    refuse(blockft.evaluate, toy / "model", toy / "heldout.jsonl", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"folder": 1},
        {"folder": "a\0b"},
        {"folder": ""},
        {"disk_bytes": -1},
        {"disk_bytes": "10GB"},
        {"disk_bytes": 1.5},
        {"host_bytes": True},
        {"host_bytes": 10**400},
        {"device_bytes": math.inf},
    ],
    ids=str,
)
def test_cache_options_refuse_wrong_values(arguments: dict[str, Any]) -> None:
    assert next(iter(arguments)).split("_")[0] in refuse(blockft.CacheOptions, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"order": "random"},
        {"documents_in": "assistant"},
        {"instruction": None},
        {"document": "no field"},
        {"document": "{text} {rank}"},
        {"document": "{text"},
        {"question": 1},
        {"question": ""},
        {"num_documents": -1},
        {"num_documents": 1.5},
        {"seed": "x"},
    ],
    ids=str,
)
def test_rag_prompt_refuses_wrong_values(arguments: dict[str, Any]) -> None:
    refuse(blockft.RagPrompt, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "tpu"},
        {"device": 1},
        {"device": "cuda:99999999999"},
        {"dtype": "bfloat16"},
        {"rotate": "both"},
        {"prompt": "Answer."},
        {"cache": "folder"},
        {"revision": 1},
        {"compile": True},
    ],
    ids=str,
)
def test_engine_load_refuses_wrong_arguments(toy: Path, arguments: dict[str, Any]) -> None:
    refuse(blockft.Engine.load, toy / "model", **({"device": "cpu"} | arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"blocks": "a"},
        {"blocks": [1]},
        {"blocks": [b"a"]},
        {"documents": ["a"]},
        {"question": "a"},
        {"documents": ["a"], "question": 1},
        {"blocks": ["a"], "messages": []},
        {"blocks": ["a"], "mode": "half"},
        {"blocks": ["a"], "max_new_tokens": 0},
        {"blocks": ["a"], "max_new_tokens": "2"},
        {"blocks": ["a"], "max_new_tokens": 10**400},
        {"blocks": ["a"], "temperature": math.nan},
        {"blocks": ["a"], "temperature": -1},
        {"blocks": ["a"], "temperature": "1"},
        {"blocks": ["a"], "top_p": 2, "temperature": 1},
        {"blocks": ["a"], "seed": 1.5, "temperature": 1},
        {"blocks": ["a"], "stop": "a"},
        {"blocks": ["a"], "stop": [""]},
        {"blocks": ["a"], "stop": [1]},
    ],
    ids=str,
)
def test_an_engine_refuses_wrong_requests(toy: Path, arguments: dict[str, Any]) -> None:
    with blockft.Engine.load(toy / "model", device="cpu", dtype=torch.float32) as engine:
        refuse(engine.generate, **arguments)


def train_in_a_thread(folder: str) -> None:
    errors: list[BaseException] = []

    def train() -> None:
        try:
            blockft.train(run.toy_recipe(Path(folder), "train.max_steps=2"))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
