from pathlib import Path

import pytest

from blockft.bench.planning import measure_planning


def test_a_plan_of_synthetic_examples_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    figures = measure_planning(5_000, num_epochs=2)
    assert figures["examples"] == 5_000 and figures["held_out"] == 200
    # each example in both modes in both epochs
    assert 0.9 < figures["tokens"] / (2 * 2 * 4_800 * 800) < 1.1 and figures["fill"] > 0.9
    assert figures["seconds"] > 0 and figures["digest_seconds"] > 0
    assert not [*tmp_path.iterdir()]
