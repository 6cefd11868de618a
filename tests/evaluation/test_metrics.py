"""Metrics on hand-written cases, against the published definitions.

Exact match and F1 are those of SQuAD (Rajpurkar et al. 2016 and 2018). Normalization makes lower case, then
removes ASCII punctuation, then English articles, then extra spaces; it changes nothing else. Substring match
tests whether any normalized gold answer occurs in the normalized answer (Liu et al. 2023). Word match
tests the same for whole words.
"""

import pytest

from blockft.config.choices import Metric
from blockft.evaluation.metrics import (
    METRICS,
    exact_match,
    is_yes_no,
    normalize,
    substring_match,
    token_f1,
    word_match,
)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("  The  Cat's, a (big) AN-imal! ", "cats big animal"),
        ("a.b.c", "abc"),  # punctuation is removed first, which leaves no article
        ("vitamin A and an", "vitamin and"),
        ("theatre of another anthem", "theatre of another anthem"),
        ("tab\tline\nno-break\u00a0space", "tab line nobreak space"),
        ("‘The’ Cat’s – “end”", "‘ ’ cat’s – “end”"),  # only ASCII punctuation is removed
        ("À la carte, été", "à la carte été"),  # an accented letter is not an article
        ("Straße STRASSE", "straße strasse"),  # lower case, no case folding
        ("Cafe\u0301", "cafe\u0301"),  # no Unicode composition
        ("ＡＢＣ，東京", "ａｂｃ，東京"),
        ("$1,000.50 & 50%", "100050 50"),
        ("", ""),
        ("The", ""),
    ],
)
def test_normalization_is_that_of_squad(text: str, normalized: str) -> None:
    assert normalize(text) == normalized


CASES = [
    # one gold answer
    ("Paris", ["Paris"], 1, 1, 1, 1),
    ("the Paris.", ["Paris"], 1, 1, 1, 1),
    ("It is Paris", ["Paris"], 0, 1, 1, 0.5),
    ("London", ["Paris"], 0, 0, 0, 0),
    ("", ["Paris"], 0, 0, 0, 0),
    ("par", ["Paris"], 0, 0, 0, 0),
    ("Parisian", ["Paris"], 0, 1, 0, 0),
    ("New York City", ["New York"], 0, 1, 1, 0.8),
    ("York, New", ["New York"], 0, 0, 0, 1),
    ("yes it is", ["no"], 0, 0, 0, 0),
    ("I know", ["no"], 0, 1, 0, 0),  # substring match compares letters, word match words
    # repeated words count as often as both sides have them
    ("york york", ["york"], 0, 1, 1, 2 / 3),
    ("york york", ["york york"], 1, 1, 1, 1),
    ("to be or not to be", ["to be to be"], 0, 0, 0, 0.8),
    ("no no no", ["no no yes yes"], 0, 0, 0, 4 / 7),
    # several gold answers: the best counts, each for itself
    ("London", ["Paris", "London"], 1, 1, 1, 1),
    ("in London", ["Paris", "London", "in"], 0, 1, 1, 2 / 3),
    ("Paris London", ["Paris France", "London England"], 0, 0, 0, 0.5),
    ("the United States", ["USA", "United States of America", "US"], 0, 0, 0, 2 / 3),
    ("U.S.A.", ["United States", "USA"], 1, 1, 1, 1),
    ("1,000 men", ["1000", "a thousand"], 0, 1, 1, 2 / 3),
    # articles and punctuation
    ("A Tale of Two Cities", ["Tale of Two Cities"], 1, 1, 1, 1),
    ("The Who", ["Who"], 1, 1, 1, 1),
    ("well-known", ["well known"], 0, 0, 0, 0),
    ("well-known", ["wellknown"], 1, 1, 1, 1),
    # Unicode
    ("Gabriel García Márquez", ["garcía márquez"], 0, 1, 1, 0.8),
    ("Garcia", ["García"], 0, 0, 0, 0),
    ("ΑΘΗΝΑ", ["αθηνα"], 1, 1, 1, 1),
    ("東京都", ["東京"], 0, 1, 0, 0),
    ("rock’n’roll", ["rock'n'roll"], 0, 0, 0, 0),
    ("40\u00a0km", ["40 km"], 1, 1, 1, 1),
    # yes and no
    ("it lies to the north", ["no"], 0, 1, 0, 0),
    ("No.", ["no"], 1, 1, 1, 1),
    ("yes, both", ["yes"], 0, 1, 1, 2 / 3),
    ("in the new yorker", ["New York"], 0, 1, 0, 0.4),
    # normalization leaves nothing
    ("", ["The"], 1, 0, 0, 1),
    ("anything", ["the"], 0, 0, 0, 0),
    ("anything", ["the", "anything"], 1, 1, 1, 1),
]
"""Answer, gold answers, exact match, substring match, word match, F1."""


@pytest.mark.parametrize(("answer", "golds", "exact", "substring", "word", "f1"), CASES)
def test_scores(
    answer: str, golds: list[str], exact: float, substring: float, word: float, f1: float
) -> None:
    assert exact_match(answer, golds) == exact
    assert substring_match(answer, golds) == substring
    assert word_match(answer, golds) == word
    assert token_f1(answer, golds) == pytest.approx(f1)


@pytest.mark.parametrize(("answer", "golds"), [case[:2] for case in CASES])
def test_every_exact_match_is_a_word_match_and_every_word_match_a_substring_match(
    answer: str, golds: list[str]
) -> None:
    has_words = any(normalize(gold) for gold in golds)
    assert (
        exact_match(answer, golds) * has_words <= word_match(answer, golds) <= substring_match(answer, golds)
    )


@pytest.mark.parametrize(
    ("golds", "expected"),
    [
        (["yes"], True),
        (["No."], True),
        (["yes", "no"], True),
        (["north"], False),
        (["yes", "Paris"], False),
        ([], False),
    ],
)
def test_yes_no_questions_have_no_other_gold_answer(golds: list[str], expected: bool) -> None:
    assert is_yes_no(golds) == expected


def test_every_metric_can_be_chosen_on_the_command_line() -> None:
    assert list(METRICS) == list(Metric)
