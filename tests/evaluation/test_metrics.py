"""Scores on hand-written cases, against the published definitions."""

import pytest

from blockft.evaluation.metrics import exact_match, normalize, substring_match, token_f1


def test_normalisation_is_squads() -> None:
    assert normalize("  The  Cat's, a (big) AN-imal! ") == "cats big animal"


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "substring", "f1"),
    [
        ("Paris", ["Paris"], 1, 1, 1),
        ("the Paris.", ["Paris"], 1, 1, 1),
        ("It is Paris", ["Paris"], 0, 1, 0.5),
        ("London", ["Paris"], 0, 0, 0),
        ("London", ["Paris", "London"], 1, 1, 1),
        ("", ["Paris"], 0, 0, 0),
        ("par", ["Paris"], 0, 0, 0),
        ("Parisian", ["Paris"], 0, 1, 0),
        ("New York City", ["New York"], 0, 1, 0.8),
        ("york york", ["york"], 0, 1, 2 / 3),
        ("anything", ["the"], 0, 0, 0),
    ],
)
def test_scores(answer: str, golds: list[str], exact: float, substring: float, f1: float) -> None:
    assert exact_match(answer, golds) == exact
    assert substring_match(answer, golds) == substring
    assert token_f1(answer, golds) == pytest.approx(f1)
