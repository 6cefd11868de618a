"""`blockft compare`: shared groups of questions, differing options, and files that are not reports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from blockft.errors import UserError
from blockft.evaluation.report import Prediction, build_report
from blockft.stages.compare import compare, print_comparison


def save_report(folder: Path, *sources: str, modes: Sequence[str] = ("block",), **options: Any) -> Path:
    """Save the report of two questions of each source, one of which is answered correctly."""
    folder.mkdir(parents=True)
    predictions = [
        Prediction(str(i), answer, ("yes",), (source,), 3, 20, 1, False)
        for source in sources
        for i, answer in enumerate(("yes", "no"))
    ]
    report = build_report("m", dict.fromkeys(modes, predictions), {"prompts in a batch": 4, **options})
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_reports_are_compared_by_group_and_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wording = "\n{question}"
    a = save_report(tmp_path / "a", "x")
    b = save_report(tmp_path / "b", "x", **{"prompts in a batch": 5, "wording of the question": wording})
    comparison = compare([a, b], png=tmp_path / "compared.png")
    assert (tmp_path / "compared.png").stat().st_size > 0
    assert list(comparison["scores"]) == ["a", "b"]
    assert list(comparison["scores"]["a"]["block"]) == ["all"]
    assert comparison["differing options"] == {
        "prompts in a batch": {"a": 4, "b": 5},
        "wording of the question": {"a": None, "b": wording},
    }
    print_comparison(comparison, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(comparison))
    print_comparison(comparison)
    out, err = capsys.readouterr()
    assert "block mode" in out and "50.0 [0.0, 100.0]" in out
    assert err.splitlines() == [
        "differing option: prompts in a batch: a 4, b 5",
        r'differing option: wording of the question: a null, b "\n{question}"',
    ]


def test_the_table_fits_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    reports = [
        save_report(tmp_path / f"a report with a long name, number {i}", "hotpotqa", modes=("block", "full"))
        for i in range(3)
    ]
    print_comparison(compare(reports))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("50.0 [0.0, 100.0]") == 2 for line in lines) == 3


def test_a_group_is_compared_with_a_report_of_that_group_alone(tmp_path: Path) -> None:
    both, one = save_report(tmp_path / "both", "a", "b"), save_report(tmp_path / "one", "a")
    for paths in ((both, one), (one, both)):
        scores = compare(paths)["scores"]
        assert [list(modes["block"]) for modes in scores.values()] == [["all", "a"]] * 2
        assert scores["both"]["block"]["a"] == scores["one"]["block"]["a"] == scores["one"]["block"]["all"]


def test_reports_are_named_after_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = save_report(tmp_path / "a/eval", "x"), save_report(tmp_path / "b/eval", "x")
    assert list(compare([a, b])["scores"]) == [str(a), str(b)]
    other = a / "other.json"
    other.write_bytes((a / "report.json").read_bytes())
    assert list(compare([a / "report.json", other])["scores"]) == ["eval", "other.json"]
    monkeypatch.chdir(tmp_path / "a")
    save_report(tmp_path / "c", "x")
    (tmp_path / "a/report.json").write_bytes(other.read_bytes())
    assert list(compare([Path("."), Path("../c")])["scores"]) == ["a", "c"]


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    reports = [save_report(tmp_path / "a", "x")]
    with pytest.raises(UserError, match="there is no folder"):
        compare(reports, png=tmp_path / "none" / "a.png")


@pytest.mark.parametrize("again", ["e", "e/report.json", "./e/../e"])
def test_a_report_given_twice_is_refused(tmp_path: Path, again: str) -> None:
    first = save_report(tmp_path / "e", "x")
    with pytest.raises(UserError, match="is given twice"):
        compare([first, Path(f"{tmp_path}/{again}")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"modes": {"block": {}}}', "run the evaluation again"),
        (b'{"version": 2, "options": {}, "modes": {"a": 1}}', "mode 'a' has no scores"),
        (b'{"version": 2, "options": {}, "modes": {"a": {"all": {}}}}', "no scores of 'all'"),
        (b"[]", "is not a report"),
        (b"\xff\xfe", "is UTF-16"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (None, "holds no report.json"),
    ],
)
def test_files_that_are_not_reports_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        compare([tmp_path])
