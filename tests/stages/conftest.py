"""Fixtures for recipes of a few invented samples and a toy tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blockft.config.choices import Format
from blockft.config.settings import DataSettings, ModelSettings, Recipe, Source, TrainSettings
from blockft.data.sample import sample_to_record
from tests.data.toys import rag_sample, save_toy_tokenizer

Make = Callable[..., Recipe]


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_recipe(tmp_path: Path, toy_model: Path) -> Make:
    """Return a function that makes a recipe of 200 samples, two per pair of documents.

    The function takes settings of `data`.
    """
    source = tmp_path / "source.jsonl"
    samples = [
        rag_sample(f"Question {i}?", (f"Fox {i // 2}.\n\n", "dog " * (i // 2) + "\n\n"), id=str(i))
        for i in range(200)
    ]
    source.write_text("".join(json.dumps(sample_to_record(sample)) + "\n" for sample in samples))

    def make(**settings: object) -> Recipe:
        given = {
            "output_dir": str(tmp_path / "out" / "set"),
            "sources": [Source(format=Format.samples, path=str(source))],
            "row_len": 1024,
            "num_workers": 1,
        }
        return Recipe(
            model=ModelSettings(path=str(toy_model)),
            data=DataSettings(**given | settings),  # type: ignore[arg-type]
            train=TrainSettings(output_dir=str(tmp_path / "run")),
        )

    return make
