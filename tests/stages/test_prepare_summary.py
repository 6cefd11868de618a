"""The last output of `blockft prepare` can be read in 80 columns, and warns of padding and drops."""

from collections.abc import Callable
from pathlib import Path

import pytest

from blockft.config.choices import Format
from blockft.config.settings import MixtureSettings, Recipe, Source
from blockft.stages.prepare import prepare
from blockft.stages.prepare_summary import print_summary

Make = Callable[..., Recipe]


def test_the_tables_fit_into_80_columns(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    original = Path(make_recipe().data.sources[0].path).read_bytes()
    sources = []
    for i, weight in enumerate((0.5, 2.0)):
        folder = tmp_path / f"a folder with a long name {i}"
        folder.mkdir()
        path = folder / "questions_with_a_long_name_of_training.jsonl"
        path.write_bytes(original)
        sources.append(Source(format=Format.samples, path=str(path), weight=weight))
    recipe = make_recipe(sources=sources, row_len=100, mixture=MixtureSettings(temperature=2))
    prepare(recipe)
    capsys.readouterr()
    print_summary(recipe)
    printed = capsys.readouterr()
    tables = [line for line in printed.out.splitlines() if "dropped from" not in line][:-1]
    assert all(len(line) <= 80 for line in tables) and "…" not in printed.out
    for name in ("read", "samples", "kept", "dropped", "examples", "weight", "per epoch", "share"):
        assert name in printed.out
    assert "20%" in printed.out and "80%" in printed.out
    assert " too long" in printed.out and printed.err.count("dropped (") == 2
    assert "rows are " in printed.err and "data.row_len=" in printed.err
