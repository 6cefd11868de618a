"""The examples in the docstrings of public classes run and print what they show."""

import doctest
from pathlib import Path

import pytest

import blockft

ROOT = Path(__file__).parents[1]
CLASSES = [name for name in blockft.__all__ if isinstance(getattr(blockft, name), type)]


def test_there_are_public_classes() -> None:
    assert {"CacheOptions", "Engine", "RagPrompt"} <= {*CLASSES}


@pytest.mark.parametrize("name", CLASSES)
def test_the_example_of_a_public_class_prints_what_it_shows(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    examples = doctest.DocTestFinder(recurse=False).find(getattr(blockft, name), globs={})
    runner = doctest.DocTestRunner()
    results = [runner.run(example) for example in examples]
    assert sum(result.attempted for result in results) > 3, "the docstring has no example"
    assert not any(result.failed for result in results), capsys.readouterr().out
