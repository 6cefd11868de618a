"""Counts are written with singular and plural nouns, and memory in units of 1024."""

import pytest

from blockft.units import format_count, format_memory


@pytest.mark.parametrize(
    ("number", "noun", "text"), [(0, "row", "0 rows"), (1, "row", "1 row"), (1200, "row", "1,200 rows")]
)
def test_a_count_has_its_noun(number: int, noun: str, text: str) -> None:
    assert format_count(number, noun) == text


def test_a_noun_can_have_its_own_plural() -> None:
    assert format_count(1, "entry", "entries") == "1 entry"
    assert format_count(2, "entry", "entries") == "2 entries"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (80e9, "74.5 GiB"), (2**50, "1024.0 TiB")],
)
def test_memory_has_units_of_1024(num_bytes: float, text: str) -> None:
    assert format_memory(num_bytes) == text
