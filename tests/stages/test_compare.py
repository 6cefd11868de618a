"""Reports side by side: what they share, in what they differ, and what is no report."""

import json
from pathlib import Path
from typing import Any

import pytest

from blockft.errors import UserError
from blockft.evaluation.report import Prediction, build_report
from blockft.stages.compare import compare


def save_report(folder: Path, *sources: str, **options: Any) -> Path:
    """The report of an evaluation of two questions of each source, of which one is answered."""
    folder.mkdir(parents=True)
    answered = [
        Prediction(str(i), answer, ("yes",), (source,), 3, 20, 1, False)
        for source in sources
        for i, answer in enumerate(("yes", "no"))
    ]
    report = build_report("m", {"block": answered}, {"prompts in a batch": 4, **options})
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def compared(capsys: pytest.CaptureFixture[str], *paths: Path) -> dict[str, Any]:
    compare(list(paths), as_json=True)
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_reports_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wording = "\n{question}"
    a = save_report(tmp_path / "a", "x")
    b = save_report(tmp_path / "b", "x", **{"prompts in a batch": 5, "wording of the question": wording})
    said = compared(capsys, a, b)
    assert list(said["scores"]) == ["block a", "block b"] and list(said["scores"]["block a"]) == ["all"]
    assert said["differing options"] == {
        "prompts in a batch": {"a": 4, "b": 5},
        "wording of the question": {"a": None, "b": wording},
    }
    compare([a, b], png=tmp_path / "compared.png")
    printed = capsys.readouterr().out
    assert "not asked alike: prompts in a batch: a 4, b 5\n" in printed
    assert r'not asked alike: wording of the question: a null, b "\n{question}"' in printed
    assert (tmp_path / "compared.png").stat().st_size > 0


def test_a_source_is_compared_with_a_report_of_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, one = save_report(tmp_path / "both", "a", "b"), save_report(tmp_path / "one", "a")
    for paths in ((both, one), (one, both)):
        scores = compared(capsys, *paths)["scores"]
        assert [list(groups) for groups in scores.values()] == [["all", "a"]] * 2
        assert scores["block both"]["a"] == scores["block one"]["a"] == scores["block one"]["all"]
    # before `same questions` was written
    old = json.loads((one / "report.json").read_text())
    del old["same questions"]
    (one / "report.json").write_text(json.dumps(old))
    assert list(compared(capsys, both, one)["scores"]["block one"]) == ["all"]


def test_every_report_has_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = save_report(tmp_path / "a/eval", "x"), save_report(tmp_path / "b/eval", "x")
    assert list(compared(capsys, a, b)["scores"]) == [f"block {a}", f"block {b}"]
    other = a / "other.json"
    other.write_bytes((a / "report.json").read_bytes())
    assert list(compared(capsys, a / "report.json", other)["scores"]) == ["block eval", "block other.json"]
    monkeypatch.chdir(tmp_path / "a")
    save_report(tmp_path / "c", "x")
    (tmp_path / "a/report.json").write_bytes(other.read_bytes())
    assert list(compared(capsys, Path("."), Path("../c"))["scores"]) == ["block a", "block c"]


def test_nothing_is_printed_where_the_picture_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [save_report(tmp_path / "a", "x")]
    with pytest.raises(UserError, match="there is no folder"):
        compare(reports, png=tmp_path / "none" / "a.png")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("again", ["e", "e/report.json", "./e/../e"])
def test_a_report_stands_beside_others_only(tmp_path: Path, again: str) -> None:
    first = save_report(tmp_path / "e", "x")
    with pytest.raises(UserError, match="is given twice"):
        compare([first, Path(f"{tmp_path}/{again}")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"modes": {"block": {}}}', "evaluate again"),
        (b'{"version": 1, "options": {}, "modes": {"a": 1}}', "mode 'a' holds no scores"),
        (b'{"version": 1, "options": {}, "modes": {"a": {"all": {}}}}', "no scores of 'all'"),
        (b"[]", "is no report"),
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (None, "holds no report.json"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        compare([tmp_path])
