"""Scores on hand-written cases, against the published definitions.

Exact match and F1 are those of SQuAD (Rajpurkar et al. 2016 and 2018): lower case, then no ASCII punctuation,
then no English articles, then single spaces; nothing else is folded. Substring match asks whether any gold
answer occurs in the answer, both normalised so (Liu et al. 2023, whose definition the paper takes).
"""

import pytest

from blockft.evaluation.metrics import exact_match, normalize, substring_match, token_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Cat's, a (big) AN-imal! ", "cats big animal"),
        ("a.b.c", "abc"),  # punctuation goes first: no article is left alone
        ("vitamin A and an", "vitamin and"),
        ("theatre of another anthem", "theatre of another anthem"),
        ("tab\tline\nno-break\u00a0space", "tab line nobreak space"),
        ("‘The’ Cat’s – “end”", "‘ ’ cat’s – “end”"),  # only ASCII punctuation goes
        ("À la carte, été", "à la carte été"),  # an accented letter is no article
        ("Straße STRASSE", "straße strasse"),  # lower case, not case folding
        ("Cafe\u0301", "cafe\u0301"),  # nothing is composed
        ("ＡＢＣ，東京", "ａｂｃ，東京"),
        ("$1,000.50 & 50%", "100050 50"),
        ("", ""),
        ("The", ""),
    ],
)
def test_normalisation_is_squads(text: str, normal: str) -> None:
    assert normalize(text) == normal


CASES = [
    # one gold answer
    ("Paris", ["Paris"], 1, 1, 1),
    ("the Paris.", ["Paris"], 1, 1, 1),
    ("It is Paris", ["Paris"], 0, 1, 0.5),
    ("London", ["Paris"], 0, 0, 0),
    ("", ["Paris"], 0, 0, 0),
    ("par", ["Paris"], 0, 0, 0),
    ("Parisian", ["Paris"], 0, 1, 0),
    ("New York City", ["New York"], 0, 1, 0.8),
    ("York, New", ["New York"], 0, 0, 1),
    ("yes it is", ["no"], 0, 0, 0),
    ("I know", ["no"], 0, 1, 0),  # the definition: letters, not words
    # repeated words count as often as both sides have them
    ("york york", ["york"], 0, 1, 2 / 3),
    ("york york", ["york york"], 1, 1, 1),
    ("to be or not to be", ["to be to be"], 0, 0, 0.8),
    ("no no no", ["no no yes yes"], 0, 0, 4 / 7),
    # several gold answers: the best counts, each for itself
    ("London", ["Paris", "London"], 1, 1, 1),
    ("in London", ["Paris", "London", "in"], 0, 1, 2 / 3),
    ("Paris London", ["Paris France", "London England"], 0, 0, 0.5),
    ("the United States", ["USA", "United States of America", "US"], 0, 0, 2 / 3),
    ("U.S.A.", ["United States", "USA"], 1, 1, 1),
    ("1,000 men", ["1000", "a thousand"], 0, 1, 2 / 3),
    # articles and punctuation
    ("A Tale of Two Cities", ["Tale of Two Cities"], 1, 1, 1),
    ("The Who", ["Who"], 1, 1, 1),
    ("well-known", ["well known"], 0, 0, 0),
    ("well-known", ["wellknown"], 1, 1, 1),
    # Unicode
    ("Gabriel García Márquez", ["garcía márquez"], 0, 1, 0.8),
    ("Garcia", ["García"], 0, 0, 0),
    ("ΑΘΗΝΑ", ["αθηνα"], 1, 1, 1),
    ("東京都", ["東京"], 0, 1, 0),
    ("rock’n’roll", ["rock'n'roll"], 0, 0, 0),
    ("40\u00a0km", ["40 km"], 1, 1, 1),
    # normalisation leaves nothing
    ("", ["The"], 1, 0, 1),
    ("anything", ["the"], 0, 0, 0),
    ("anything", ["the", "anything"], 1, 1, 1),
]
"""Answer, gold answers, exact match, substring match, F1."""


@pytest.mark.parametrize(("answer", "golds", "exact", "substring", "f1"), CASES)
def test_scores(answer: str, golds: list[str], exact: float, substring: float, f1: float) -> None:
    assert exact_match(answer, golds) == exact
    assert substring_match(answer, golds) == substring
    assert token_f1(answer, golds) == pytest.approx(f1)
