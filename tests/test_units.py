"""Counts are written with singular and plural nouns."""

import pytest

from blockft.units import format_count


@pytest.mark.parametrize(
    ("number", "noun", "text"), [(0, "row", "0 rows"), (1, "row", "1 row"), (1200, "row", "1,200 rows")]
)
def test_a_count_has_its_noun(number: int, noun: str, text: str) -> None:
    assert format_count(number, noun) == text


def test_a_noun_can_have_its_own_plural() -> None:
    assert format_count(1, "entry", "entries") == "1 entry"
    assert format_count(2, "entry", "entries") == "2 entries"
