"""Batches of like length, and a file of answers that survives whatever ends its writer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blockft.data.sample import Message, Sample
from blockft.evaluation.answers import (
    WINDOW_BATCHES,
    AnswerFile,
    AnswerRecord,
    build_predictions,
    plan_batches,
    question_groups,
)
from blockft.evaluation.report import ALL


def sample(id: str, text: str, **meta: str) -> Sample:
    messages = (Message(role="user", content=(text,)),)
    return Sample(id=id, source="s", messages=messages, response="", answers=("x",), meta=meta)


SAMPLES = [sample(str(i), "x" * (i * 7 % 100 + 1)) for i in range(100)]


def answered(*indices: int) -> list[AnswerRecord]:
    return [AnswerRecord(i, f"ä\u2028{i}", 1, 5, 2) for i in indices]


def test_batches_are_of_like_length_within_a_window() -> None:
    batches = plan_batches(SAMPLES, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    window = batches[:WINDOW_BATCHES]
    assert {i for batch in window for i in batch} == set(range(3 * WINDOW_BATCHES))
    lengths = [len(SAMPLES[i].blocks[0]) for batch in window for i in batch]
    assert lengths == sorted(lengths)
    assert plan_batches(SAMPLES, 3) == batches


def test_answers_are_found_again_and_told_in_the_order_of_the_data(tmp_path: Path) -> None:
    path, batches = tmp_path / "a.jsonl", [(2, 0), (1, 3)]
    file = AnswerFile(path, batches)
    for batch in file.remaining_batches:
        file.add(answered(*batch))
    again = AnswerFile(path, batches)
    assert again.records == file.records and not again.remaining_batches
    told = build_predictions(SAMPLES, again.records, max_new_tokens=2)
    assert [p.id for p in told] == ["0", "1", "2", "3"] and all(p.hit_token_limit for p in told)


@pytest.mark.parametrize("damage", ["cut in a line", "cut in a batch", "zeros", "no record", "another order"])
def test_only_whole_batches_count(tmp_path: Path, damage: str) -> None:
    path, batches = tmp_path / "a.jsonl", [(2, 0), (1, 3), (4,)]
    file = AnswerFile(path, batches)
    for batch in batches:
        file.add(answered(*batch))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(
        {
            "cut in a line": whole[: len(lines[0] + lines[1]) + 5],
            "cut in a batch": b"".join(lines[:3]),
            "zeros": b"".join(lines[:2]) + b"\0" * 20,
            "no record": b"".join([*lines[:2], b"7\n"]),
            "another order": b"".join([*lines[:2], lines[4]]),
        }[damage]
    )
    again = AnswerFile(path, batches)
    assert list(again.remaining_batches) == batches[1:]
    for batch in again.remaining_batches:
        again.add(answered(*batch))
    assert path.read_bytes() == whole


def test_questions_are_also_counted_by_source_and_hops() -> None:
    asked = sample("1", "x", type="bridge", level="hard")
    assert question_groups(asked) == ("s", "s: bridge", "s: hard")
    assert json.dumps(question_groups(sample("1", "x"))) == '["s"]'
    assert question_groups(replace(asked, source=ALL))[:2] == ("source all", "source all: bridge")
