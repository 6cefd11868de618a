from pathlib import Path

import pytest

from blockft.stages import recipes as stage


def test_recipes_are_listed_with_their_opening_comment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo.yaml").write_text("# Win back what was lost.\nmodel:\n")
    (tmp_path / "bare.yaml").write_text("model:\n")
    monkeypatch.setattr(stage, "RECIPES_FOLDER", tmp_path)
    stage.recipes()
    bare, demo = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert [bare[0].strip(), *demo] == ["bare", "demo", demo[1]] and demo[
        1
    ].strip() == "Win back what was lost."
