"""The content of a report, refused reports, and a report as a page and as a picture."""

import json
from pathlib import Path
from typing import Any

import pytest

from blockft.evaluation.report import (
    DIFFERENCE,
    REPEATED,
    Prediction,
    build_report,
    check_report,
    paired_difference,
    summarize_scores,
)
from blockft.evaluation.report_render import draw_scores, report_markdown
from blockft.outputs import save_figure


def prediction(id: str, answer: str, *groups: str, hit_token_limit: bool = False) -> Prediction:
    return Prediction(id, answer, ("Paris",), groups, 3, 20, len(answer.split()), hit_token_limit)


ANSWERS = [
    prediction("1", "Paris", "world", "world: 1 hop"),
    prediction("2", "in Paris", "world", "world: 2 hops", "world: hard"),
    prediction("3", "Rome", "world", "world: 2 hops", "world: hard", hit_token_limit=True),
]
OTHERS = [
    prediction(p.id, answer, *p.groups)
    for p, answer in zip(ANSWERS, ("Paris", "Paris", "Paris"), strict=True)
]


def test_scores_are_counted_by_group() -> None:
    summary = summarize_scores(ANSWERS)
    assert list(summary) == ["all", "world: 1 hop", "world: 2 hops"], (
        "groups of the same questions appear once"
    )
    assert summary["all"]["questions"] == 3
    assert summary["all"]["substring_match"] == pytest.approx(200 / 3)
    assert summary["world: 1 hop"]["exact_match"] == 100
    two = summary["world: 2 hops"]
    assert (two["questions"], two["substring_match"], two["exact_match"]) == (2, 50, 0)
    assert two["token_f1"] == pytest.approx(100 / 3)
    assert two["intervals"]["substring_match"] == [0, 100]


def test_modes_are_compared_by_question() -> None:
    difference = paired_difference(ANSWERS, OTHERS)
    assert difference["all"]["exact_match"] == pytest.approx(-200 / 3)
    assert difference["world: 1 hop"]["intervals"]["exact_match"] == [0, 0]
    with pytest.raises(AssertionError):
        paired_difference(ANSWERS, OTHERS[::-1])


def test_a_report_holds_options_and_prompt_statistics() -> None:
    report = build_report("m", {"block": ANSWERS, "full": OTHERS}, {"order": "ascending"})
    assert report["options"]["order"] == "ascending"
    assert set(report["modes"]) == {"block", "full"} and DIFFERENCE in report
    assert report["prompts"]["block"]["blocks_per_prompt"] == {"3": 3}
    assert report["prompts"]["block"]["answers_at_the_output_limit"] == 1
    assert DIFFERENCE not in build_report("m", {"block": ANSWERS}, {})
    assert report[REPEATED] == {"world": "all", "world: hard": "world: 2 hops"}


def test_content_that_is_not_a_report_is_refused() -> None:
    report: dict[str, Any] = json.loads(json.dumps(build_report("m", {"block": ANSWERS}, {})))
    check_report(report)
    scores = report["modes"]["block"]["all"]
    for content, message in [
        ([], "no 'modes'"),
        ({"version": 2, "modes": {"a": 1}}, "no 'options'"),
        (report | {"version": 7}, "version is 7, .* run the evaluation again"),
        (report | {"modes": {}}, "no 'modes'"),
        (report | {"modes": {"a": 1}}, "mode 'a' has no scores"),
        (report | {"modes": {"a": {}}}, "mode 'a' has no scores"),
        (report | {"modes": {"a": {"all": {"questions": 3}}}}, "no scores of 'all'"),
        (report | {"modes": {"a": {"all": scores | {"token_f1": "?"}}}}, "no scores of 'all'"),
        (report | {"modes": {"a": {"all": scores | {"intervals": {}}}}}, "no scores of 'all'"),
        (report | {REPEATED: {"x": "y"}}, "same questions"),
        (report | {REPEATED: ["x"]}, "same questions"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_report(content)


def test_a_report_is_shown_as_a_page_and_as_a_picture() -> None:
    report = json.loads(
        json.dumps(
            build_report("m", {"block": ANSWERS, "full": OTHERS}, {"order": "given", "wording": "\n\n{text}"})
        )
    )
    page = report_markdown(report)
    assert "| world: 2 hops | 2 | 50.0 [0.0, 100.0] | 100.0 [100.0, 100.0] | -50.0 [-100.0, +0.0] |" in page
    assert "| order | given |" in page and r'| wording | "\n\n{text}" |' in page
    assert "| answers at the output limit, block mode | 1 |" in page
    figure = draw_scores({"m": report["modes"]}, ["all", "world: 1 hop"], "token_f1", title="Scores")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["block mode", "full mode"]


def test_a_picture_has_labels_beside_its_bars_and_one_colour_per_mode() -> None:
    modes = json.loads(json.dumps(build_report("m", {"block": ANSWERS, "full": OTHERS}, {})))["modes"]
    groups = ["all", "world: 1 hop"]
    (axes,) = draw_scores({"m": modes}, groups, "token_f1", title="Scores").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == groups
    assert axes.get_title() == "Scores"
    (axes,) = draw_scores({"a": modes, "b": modes}, groups, "token_f1", title="Scores").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "a", "b"]
    colours = [patch.get_facecolor() for patch in axes.patches if patch.get_width()]
    assert len(colours) == 8 and set(colours[::2]) == {colours[0]} and set(colours[1::2]) == {colours[1]}


def test_names_of_models_and_sources_are_shown_as_they_are(tmp_path: Path) -> None:
    odd = "s[/b] $x_{$ |`c`| *d*\n# e\x1b[2J"
    answers = [prediction("1", "Paris", odd), prediction("2", "Rome", "other")]
    report = build_report(odd, {"block": answers, "full": answers}, {odd: odd})
    page = report_markdown(json.loads(json.dumps(report)))
    shown = r"s[/b] $x_{$ \|\`c\`\| \*d\* # e\u001b[2J"
    assert page.startswith(f"# Evaluation of {shown}\n\n")
    assert f"| {shown} | 1 | 100.0" in page and "\x1b" not in page and "\n# e" not in page
    for reports in ({odd: report["modes"]}, {odd: report["modes"], "b": report["modes"]}):
        figure = draw_scores(reports, ["all", odd], "token_f1", title=odd)
        save_figure(figure, tmp_path / "scores.png")
