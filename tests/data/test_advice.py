"""Warnings about padding and drops name what to change, with numbers that work."""

import re
from typing import Any

import numpy as np
import pytest

from blockft.config.choices import Format
from blockft.data.advice import (
    MIN_FILL,
    RowFill,
    choose_row_lengths,
    fill_advice,
    list_drops,
    list_warnings,
    try_row_lengths,
)
from blockft.data.fit import TOO_LONG, UNRANKED, UNSPLIT
from blockft.data.packing import plan_rows


def fill_of(lengths: Any, row_len: int) -> RowFill:
    return RowFill.of_rows(plan_rows(lengths, row_len, 0, 0), lengths, row_len)


def test_rows_with_much_padding_get_row_lengths_that_fill_them() -> None:
    lengths = np.random.default_rng(0).normal(3100, 40, 500).astype(int)
    fill = fill_of(lengths, 4096)
    message = fill_advice(lengths, fill)
    assert message.startswith("rows are 76% filled: a row of 4,096 tokens holds 1.0 examples of 3,09")
    proposed = [(int(n), int(p)) for n, p in re.findall(r"data\.row_len=(\d+) gives (\d+)%", message)]
    assert proposed and min(n for n, _ in proposed) >= lengths.max()
    for row_len, percent in proposed:
        assert round(100 * fill_of(lengths, row_len).fill) == pytest.approx(percent, abs=1)
        assert percent >= 100 * MIN_FILL


def test_the_numbers_hold_for_many_items() -> None:
    lengths = np.random.default_rng(1).integers(3000, 3200, 25_000)
    for tried in try_row_lengths(lengths, 4096):
        assert fill_of(lengths, tried.row_len).fill == pytest.approx(tried.fill, abs=0.02)
        assert len(plan_rows(lengths, tried.row_len, 0, 0)) == pytest.approx(tried.num_rows, rel=0.03)


@pytest.mark.parametrize("lengths", [[10] * 400, [100], [100, 90, 30], [4096] * 3])
def test_full_rows_and_a_last_row_that_is_not_full_give_no_warning(lengths: list[int]) -> None:
    assert fill_advice(np.array(lengths), fill_of(lengths, 4096)) == ""


def test_empty_rows_that_complete_a_batch_do_not_count() -> None:
    lengths = [1000] * 4
    rows = plan_rows(lengths, 1024, 0, 0)
    assert RowFill.of_rows(rows.complete_last_batch(8), lengths, 1024) == RowFill.of_rows(rows, lengths, 1024)


def test_without_a_good_row_length_the_best_one_is_proposed() -> None:
    fill = RowFill(row_len=100, num_rows=10, fill=0.5)
    tried = [RowFill(row_len=n, num_rows=9, fill=share) for n, share in ((80, 0.6), (120, 0.8), (160, 0.7))]
    assert [other.row_len for other in choose_row_lengths(tried, fill)] == [120]
    assert choose_row_lengths([RowFill(row_len=120, num_rows=9, fill=0.51)], fill) == []


def manifest(dropped: dict[str, int], *, format: str = "hotpotqa", **source: Any) -> dict[str, Any]:
    entry = {"path": "d.json", "format": format, "kept": 90, "dropped": dropped}
    entry |= {"drop_examples": {}, "too_long_lengths": {}}
    entry |= {"has_questions": format not in ("samples", "messages", "alpaca", "blocks")}
    return {"sources": [entry | source], "options": {"too_long": source.pop("too_long", "drop")}}


def test_samples_that_are_too_long_get_a_row_length_that_holds_them() -> None:
    lengths = {"5120": 15, "6656": 4, "40960": 1}
    (drop,) = list_drops(manifest({TOO_LONG: 20}, too_long_lengths=lengths))
    assert drop.is_large and drop.share == 20 / 110
    assert "data.row_len=7168 holds 95% of them" in drop.remedy
    assert "data.too_long=trim" in drop.remedy and "data.num_documents" in drop.remedy
    (trimmed,) = list_drops(manifest({TOO_LONG: 20}, too_long_lengths=lengths, too_long="trim"))
    assert "too_long=trim" not in trimmed.remedy
    (chat,) = list_drops(manifest({TOO_LONG: 20}, too_long_lengths=lengths, format="messages"))
    assert chat.remedy == "data.row_len=7168 holds 95% of them"
    (constructed,) = list_drops(manifest({TOO_LONG: 20}, too_long_lengths=lengths, format="constructed"))
    assert constructed.remedy.endswith("; or lower data.sources.0.constructed.num_documents")
    (unranked,) = list_drops(manifest({UNRANKED: 20}, too_long_lengths=lengths, too_long="trim"))
    assert "retriever: bm25" in unranked.remedy


def test_a_reason_that_drops_little_gives_no_warning() -> None:
    full = RowFill(row_len=10, num_rows=1, fill=1)
    assert list_warnings(manifest({"no answer": 4}), np.array([10]), full) == []
    (warning,) = list_warnings(manifest({"no answer": 10, "bad record": 1}), np.array([10]), full)
    assert warning.startswith("d.json: 10 of 101 dropped (10%), no answer: ")


def test_every_format_and_reason_has_a_remedy() -> None:
    for format in Format:
        for reason in ("no supporting document", TOO_LONG, "response changed by the chat template", "other"):
            (drop,) = list_drops(manifest({reason: 9}, format=format.value, too_long_lengths={"512": 9}))
            assert drop.remedy and "\n" not in str(drop)


def test_drops_that_were_asked_for_give_no_warning() -> None:
    (drop,) = list_drops(manifest({UNSPLIT: 90}))
    assert not drop.is_large and "data.splitting.unsplit=keep" in drop.remedy
