"""What a report counts."""

import pytest

from blockft.evaluation.report import Prediction, build_report, summarize

ANSWERS = [
    Prediction("1", "Paris", ("Paris",), ("world", "1 hops")),
    Prediction("2", "in Paris", ("Paris",), ("world", "2 hops")),
    Prediction("3", "Rome", ("Paris",), ("world", "2 hops")),
]


def test_groups_are_counted_apart() -> None:
    summary = summarize(ANSWERS)
    assert set(summary) == {"all", "1 hops", "2 hops"}, "the group of all is said once"
    assert summary["all"]["questions"] == 3
    assert summary["all"]["substring_match"] == pytest.approx(200 / 3)
    assert summary["1 hops"]["exact_match"] == 100
    assert summary["2 hops"] == pytest.approx(
        {"questions": 2, "substring_match": 50, "exact_match": 0, "token_f1": 100 / 3}
    )


def test_a_report_names_its_options() -> None:
    report = build_report("m", {"block": ANSWERS}, {"max_new_tokens": 8})
    assert report["options"]["max_new_tokens"] == 8
    assert set(report["modes"]) == {"block"}
