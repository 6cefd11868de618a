"""`blockft bench prepare` on toy data: its figures, and the check that all runs prepare the same data."""

import json
import os
from pathlib import Path

import pytest

import blockft.bench.prepare as benchmark
from blockft.config.recipe import build_recipe
from blockft.config.settings import Recipe
from blockft.stages.bench import bench_prepare
from tests.run import save_model, save_samples


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    save_model(tmp_path / "model")
    save_samples(tmp_path / "samples.jsonl", 150)
    settings = {
        "model": {"path": str(tmp_path / "model")},
        "data": {
            "output_dir": str(tmp_path / "data"),
            "sources": [{"format": "samples", "path": str(tmp_path / "samples.jsonl")}],
        },
        "train": {"output_dir": str(tmp_path / "run")},
    }
    return build_recipe(settings, (), "the test")


def test_one_process_and_one_per_core_are_measured(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    bench_prepare(recipe, out=tmp_path / "p.json")
    one, two = json.loads((tmp_path / "p.json").read_text())["measured"]
    assert (one["processes"], two["processes"]) == (1, 2) and one["examples"] == two["examples"] == 150
    assert one["content_hash"] == two["content_hash"] and one["ratio"] == 1
    assert two["ratio"] == pytest.approx(one["seconds"] / two["seconds"])
    assert not (tmp_path / "data").exists()
    table = capsys.readouterr().out
    assert "examples/s" in table and "split into blocks" not in table


def test_different_content_hashes_raise(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    figures = {"seconds": 1.0, "examples": 1, "tokens": 1}
    monkeypatch.setattr(
        benchmark, "_measure", lambda _, n: figures | {"processes": n, "content_hash": str(n)}
    )
    with pytest.raises(RuntimeError, match="changed the prepared data"):
        bench_prepare(recipe, out=None)
