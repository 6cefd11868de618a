"""`blockft bench prepare` on toy data: its figures, and the check that all runs prepare the same data."""

import json
import os
from pathlib import Path

import pytest

import blockft.bench.prepare as benchmark
from blockft.bench import synthetic_source
from blockft.bench.planning import measure_planning
from blockft.config.choices import Response
from blockft.config.recipe import build_recipe
from blockft.config.settings import Recipe
from blockft.stages.bench import bench_prepare, bench_prepare_synthetic
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
    bench_prepare(recipe, rounds=1, out=tmp_path / "p.json")
    one, two = json.loads((tmp_path / "p.json").read_text())["measured"]
    assert (one["processes"], two["processes"]) == (1, 2) and one["examples"] == two["examples"] == 150
    assert one["content_hash"] == two["content_hash"] and one["speedup"] == 1
    assert two["speedup"] == pytest.approx(one["seconds"] / two["seconds"])
    assert one["text_tokens"] == two["text_tokens"] < one["tokens"]  # the template's tokens are extra
    assert one["share"] == pytest.approx(one["tokenizer_seconds"] / one["seconds"])
    assert not (tmp_path / "data").exists()
    table = capsys.readouterr().out
    assert "tokens/s" in table and "split into blocks" not in table


def test_different_content_hashes_raise(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    figures = {"seconds": 1.0, "examples": 1, "text_tokens": 1, "share": 1.0, "share_blocks": 1.0}
    monkeypatch.setattr(
        benchmark,
        "_measure",
        lambda *given: figures | {"processes": given[3], "content_hash": str(given[3])},
    )
    with pytest.raises(RuntimeError, match="changed the prepared data"):
        bench_prepare(recipe, rounds=1, out=None)


def test_a_synthetic_source_shows_memory_growth_and_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr("blockft.stages.bench.measure_planning", lambda: measure_planning(500))
    monkeypatch.setattr(synthetic_source, "NUM_WORDS", 2_000)
    monkeypatch.setattr(synthetic_source, "VOCABULARY", 1_000)
    out = tmp_path / "p.json"
    bench_prepare_synthetic(None, num_samples=20, memory_samples=[8], num_documents=2, rounds=1, out=out)
    found = json.loads(out.read_text())
    assert found["measured"][0]["examples"] == 20 and found["documents"] == 2
    assert found["memory"][0]["samples"] == 8 and found["memory"][0]["peak_bytes"] > 2**20
    # only the shard of the added source is encoded
    assert (found["growth"]["shards_encoded"], found["growth"]["shards"]) == (1, 2)
    assert found["planning"]["examples"] == 500
    assert "1 of 2 shards encoded" in capsys.readouterr().out


def test_a_teacher_is_not_asked(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    recipe.data.sources[0].response = Response.teacher
    bench_prepare(recipe, rounds=1, out=None)
