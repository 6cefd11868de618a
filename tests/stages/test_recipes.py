from pathlib import Path

import pytest

from blockft.config import recipe
from blockft.stages.recipes import recipes


def test_recipes_are_listed_with_their_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = "# yaml-language-server: $schema=recipe.schema.json\n"
    (tmp_path / "demo.yaml").write_text(f"{schema}# Train [bold] a tiny model.\nmodel:\n")
    (tmp_path / "other.yaml").write_text("# Train another.\nmodel:\n")
    (tmp_path / "bare.yaml").write_text("model:\n")
    monkeypatch.setattr(recipe, "RECIPES_FOLDER", tmp_path)
    recipes()
    bare, demo, other = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert [bare[0].strip(), demo[0], other[0]] == ["bare", "demo", "other"]
    assert demo[1].strip() == "Train [bold] a tiny model." and other[1].strip() == "Train another."
