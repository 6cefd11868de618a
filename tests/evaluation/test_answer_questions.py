"""Batches of similar length, groups of questions, and an answer file that survives an interruption."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from blockft.data.sample import Message, Sample
from blockft.evaluation.answer_questions import (
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


def records_of(*indices: int) -> list[AnswerRecord]:
    return [AnswerRecord(i, f"ä\u2028{i}", 1, 5, 2) for i in indices]


def test_batches_are_sorted_by_length_within_a_window() -> None:
    batches = plan_batches(SAMPLES, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    window = batches[:WINDOW_BATCHES]
    assert {i for batch in window for i in batch} == set(range(3 * WINDOW_BATCHES))
    lengths = [len(SAMPLES[i].blocks[0]) for batch in window for i in batch]
    assert lengths == sorted(lengths)
    assert plan_batches(SAMPLES, 3) == batches


def test_an_answer_file_is_read_again_and_gives_predictions_in_the_order_of_the_data(tmp_path: Path) -> None:
    path, batches = tmp_path / "a.jsonl", [(2, 0), (1, 3)]
    file = AnswerFile(path, batches, "one block")
    for batch in file.remaining_batches:
        file.add(records_of(*batch))
    again = AnswerFile(path, batches, "one block")
    assert again.records == file.records and not again.remaining_batches
    predictions = build_predictions(SAMPLES, again.records, max_new_tokens=2)
    assert [p.id for p in predictions] == ["0", "1", "2", "3"] and all(p.hit_token_limit for p in predictions)


@pytest.mark.parametrize("change", ["removed", "cut", "longer", "replaced"])
def test_a_file_that_another_process_changes_is_written_again(change: str, tmp_path: Path) -> None:
    path, batches = tmp_path / "a.jsonl", [(2, 0), (1, 3), (4,)]
    file = AnswerFile(path, batches, "one block")
    for batch in batches[:2]:
        file.add(records_of(*batch))
    content = path.read_bytes()
    if change in ("removed", "replaced"):
        path.rename(tmp_path / "moved")  # its inode stays in use
    if change != "removed":
        path.write_bytes({"cut": content[:-9], "longer": content + b"x", "replaced": content}[change])
    file.add(records_of(4))
    again = AnswerFile(path, batches, "one block")
    assert again.records == records_of(2, 0, 1, 3, 4) and again.damaged_line is None


@pytest.mark.parametrize(
    ("damage", "damaged_line"),
    [
        ("incomplete line", None),
        ("incomplete batch", None),
        ("zeros", None),
        ("not a record", 3),
        ("nested deeply", 3),
        ("another order", 3),
        ("another answer", 3),
        ("another blank", 3),
        ("an answer of another mode", 3),
        ("a line twice", 3),
        ("a line more", 6),
    ],
)
def test_only_complete_batches_without_damage_are_kept(
    tmp_path: Path, damage: str, damaged_line: int | None
) -> None:
    path, batches = tmp_path / "a.jsonl", [(2, 0), (1, 3), (4,)]
    file = AnswerFile(path, batches, "one block")
    for batch in batches:
        file.add(records_of(*batch))
    complete = path.read_bytes()
    other = AnswerFile(tmp_path / "b.jsonl", batches, "one full")
    other.add(records_of(1))
    lines = complete.splitlines(keepends=True)
    nested = re.sub(rb'"answer": "[^"]*"', b'"answer": ' + b"[" * 700 + b"]" * 700, lines[2])
    assert nested != lines[2]
    path.write_bytes(
        {
            "incomplete line": complete[: len(lines[0] + lines[1]) + 5],
            "incomplete batch": b"".join(lines[:3]),
            "zeros": b"".join(lines[:2]) + b"\0" * 20,
            "not a record": b"".join([*lines[:2], b"7\n"]),
            "nested deeply": b"".join([*lines[:2], nested, *lines[3:]]),
            "another order": b"".join([*lines[:2], lines[4]]),
            "another answer": b"".join([*lines[:2], lines[2].replace(b"u2028", b"u2029"), *lines[3:]]),
            "another blank": b"".join([*lines[:2], lines[2].replace(b", ", b",  ", 1), *lines[3:]]),
            "an answer of another mode": b"".join(
                [*lines[:2], (tmp_path / "b.jsonl").read_bytes(), *lines[3:]]
            ),
            "a line twice": b"".join([*lines[:2], lines[1], *lines[2:]]),
            "a line more": complete + lines[0],
        }[damage]
    )
    again = AnswerFile(path, batches, "one block")
    assert again.damaged_line == damaged_line
    assert list(again.remaining_batches) == ([] if damage == "a line more" else batches[1:])
    for batch in again.remaining_batches:
        again.add(records_of(*batch))
    assert path.read_bytes() == complete


def test_questions_are_grouped_by_source_and_kind() -> None:
    question = sample("1", "x", type="bridge", level="hard")
    assert question_groups(question) == ("s", "s: bridge", "s: hard")
    assert question_groups(sample("1", "x")) == ("s",)
    assert question_groups(replace(question, source=ALL))[:2] == ("source all", "source all: bridge")


def test_yes_no_questions_form_a_group() -> None:
    question = sample("1", "x", type="comparison")
    assert question_groups(replace(question, answers=("No",))) == ("s", "s: comparison", "s: yes/no")
    assert question_groups(replace(question, answers=("no", "none"))) == ("s", "s: comparison")
