import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import pytest

from blockft.data import squad
from blockft.data.qa_formats import Question
from blockft.data.rag_prompt import RagPrompt
from blockft.data.records import PlacedRecord
from blockft.data.retrieval import bm25_indexer
from blockft.data.sample import RecordDropped, RecordError
from blockft.data.sources import RecordCounts

ANSWERS = ["red", "blue", "green", "gold", "Red"]


def qa(answer: str, number: object = 0) -> dict[str, Any]:
    return {"id": f"{answer}{number}", "question": "which?", "answers": [{"text": answer, "answer_start": 0}]}


def article(title: str = "A") -> dict[str, Any]:
    paragraphs = [{"context": f"It is {a}.", "qas": [qa(a), qa(a, 1)]} for a in ANSWERS]
    return {"title": title, "paragraphs": paragraphs}


def rows(title: str = "A") -> list[dict[str, Any]]:
    return [
        {"id": f"{a}{n}", "title": title, "context": f"It is {a}.", "question": "which?"}
        | {"answers": {"text": [a], "answer_start": [0]}}
        for a in ANSWERS
        for n in (0, 1)
    ]


def ask(records: Iterable[Any]) -> Iterator[Question]:
    placed: list[PlacedRecord] = [(f"line {n}", record) for n, record in enumerate(records, start=1)]
    return (squad.parse_question(records) for _, records in squad.read_article_questions(placed))


def sets_of(num_documents: int | None, seed: int = 0) -> RagPrompt:
    return RagPrompt(
        instruction="",
        document="{text}",
        question="{question}",
        num_documents=num_documents,
        shared_context=True,
        seed=seed,
    )


def texts(question: Question) -> list[str]:
    return [document.text for document in question.documents]


def test_the_other_paragraphs_are_distractors_unless_they_contain_the_answer() -> None:
    questions = [squad.add_distractors(question) for question in ask([article()])]
    assert [question.id for question in questions[:3]] == ["red0", "red1", "blue0"]
    assert texts(questions[0]) == ["It is red.", "It is blue.", "It is green.", "It is gold."]
    assert texts(questions[2]) == [f"It is {a}." for a in ANSWERS]
    assert [(d.supports, d.relevance) for d in questions[2].documents] == [
        (False, 0),
        (True, 1),
        (False, 0),
        (False, 0),
        (False, 0),
    ]


def test_flat_rows_are_grouped_by_consecutive_titles() -> None:
    def flat(records: Iterable[Any]) -> list[tuple[Any, ...]]:
        return [(q.id, q.answers, q.documents) for q in map(squad.add_distractors, ask(records))]

    assert flat(rows() + rows("B")) == flat([article(), article("B")])
    first, *_, last = ask([*rows()[:2], *rows("B"), *rows()[2:]])
    assert len(first.pool or ()) == 1 and len(last.pool or ()) == 4


def test_the_answer_of_most_annotators_is_the_response() -> None:
    answers = [{"text": text} for text in ("a long one", "two ", "two ", " a long one", "two ")]
    records = next(squad.read_article_questions([("", article())]))[1]
    assert squad.parse_question(
        squad.ArticleQuestion(records.pool, records.paragraph, qa("") | {"answers": answers})
    ).answers == (
        "two",
        "a long one",
    )


@pytest.mark.parametrize("change", [{"answers": []}, {"is_impossible": True}, {"answers": {"text": []}}])
def test_a_question_without_answer_is_dropped(change: dict[str, Any]) -> None:
    one = article()
    one["paragraphs"][0]["qas"][0] |= change
    records = [record for _, record in squad.read_article_questions([("", one)])]
    with pytest.raises(RecordDropped, match="no answer"):
        squad.parse_question(records[0])
    assert squad.parse_question(records[1]).id == "red1"


def test_a_paragraph_without_any_answer_does_not_support_its_question() -> None:
    one = article()
    one["paragraphs"][0]["qas"] = [
        qa("red", 0) | {"answers": [{"text": "Red", "answer_start": 99}, {"text": "pink"}]},
        qa("red", 1) | {"answers": [{"text": "pink", "answer_start": 6}], "id": 262},
    ]
    first, second = list(ask([one]))[:2]
    assert (first.missing_evidence, second.missing_evidence) == ("", "answer not in its paragraph")
    assert second.id == "262"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: a.pop("paragraphs"), "line 1: field 'paragraphs' is missing"),
        (
            lambda a: a["paragraphs"][1].pop("context"),
            r"line 1, article 'A': field 'paragraphs[1].context' is missing",
        ),
        (lambda a: (a.pop("title"), a.update(context="x")), "line 1: field 'title' is missing"),
        (lambda a: a["paragraphs"][1].update(qas={}), r"article 'A': field 'paragraphs[1].qas'"),
        (lambda a: a["paragraphs"][1]["qas"][1].pop("id"), r"field 'paragraphs[1].qas[1].id' is missing"),
        (
            lambda a: a["paragraphs"][0]["qas"][0].update(answers=[{}]),
            "paragraphs[0].qas[0].answers[0].text'",
        ),
        (lambda a: a["paragraphs"][0]["qas"][0].update(id=1.5), "'paragraphs[0].qas[0].id' is 1.5"),
        (lambda a: a["paragraphs"][0]["qas"].__setitem__(0, "x"), "'paragraphs[0].qas[0]' is 'x'"),
    ],
)
def test_a_bad_article_or_question_names_its_place(damage: Any, message: str) -> None:
    broken = article()
    damage(broken)
    errors = []
    for place, record in squad.read_article_questions([("line 1", broken), ("line 2", article())]):
        try:
            if isinstance(record, RecordError):
                raise record
            squad.parse_question(record)
        except RecordError as error:
            errors.append(f"{place}: {error}")
    assert len(errors) == 1 and re.search(re.escape(message), errors[0])


def test_a_bad_row_is_one_bad_record() -> None:
    broken_rows = [rows()[0] | {"context": 3}, *rows()[1:]]
    records = list(squad.read_article_questions([(str(n), row) for n, row in enumerate(broken_rows)]))
    assert len(records) == len(broken_rows) and isinstance(records[0][1], RecordError)
    assert not any(isinstance(record, RecordError) for _, record in records[1:])


def test_questions_of_a_set_share_its_paragraphs() -> None:
    dropped = RecordCounts()
    shared = list(squad.group_by_context(ask([article()]), sets_of(2, 1), dropped.drop))
    assert {frozenset(texts(q)) for q in shared} == {
        frozenset(texts(q)) for q in shared if q.documents[0].supports
    }
    sets = [texts(q) for q in shared]
    # set by set, and every paragraph in one set
    assert sets == sorted(sets, key=sets.index)
    distinct = {tuple(s) for s in sets}
    assert sum(map(len, distinct)) == len({text for s in distinct for text in s})
    assert len(shared) + dropped.dropped.total() == 10
    drawn = (squad.group_by_context(ask([article()]), sets_of(2, seed), print) for seed in range(9))
    orders = {tuple(map(tuple, map(texts, questions))) for questions in drawn}
    assert len(orders) > 3


def test_new_sets_are_drawn_for_questions_beyond_the_limit_of_a_set() -> None:
    answers = [f"w{i}x" for i in range(12)]
    paragraphs = [{"context": f"It is {a}.", "qas": [qa(a, n) for n in range(5)]} for a in answers]
    questions = list(ask([{"title": "T", "paragraphs": paragraphs}]))
    shared = list(squad.group_by_context(iter(questions), sets_of(4), print, max_questions=6))
    assert sorted(q.id for q in shared) == sorted(q.id for q in questions)
    by_set = [list(group) for _, group in groupby(shared, key=texts)]
    assert max(map(len, by_set)) == 6 and len({tuple(texts(group[0])) for group in by_set}) > 6
    # each of the first sets has questions about all of its paragraphs, and two about some
    assert all(len({q.answers for q in group}) == 4 for group in by_set[:3])
    # the last set is filled with paragraphs of earlier sets
    some_sets = list(squad.group_by_context(iter(questions[:55]), sets_of(5), print, max_questions=6))
    assert len(some_sets) == 55 and {len(q.documents) for q in some_sets} == {5}
    ids = [q.id for q in by_set[0]]
    assert ids == [q.id for q in questions if q.id in ids]


def test_similar_paragraphs_are_in_the_same_set() -> None:
    kinds = ["the cat sat on a mat", "stars burn far away", "bread needs flour and water"]
    kinds = kinds * 3
    paragraphs = [{"context": f"{kind}, w{i}", "qas": [qa(f"w{i}")]} for i, kind in enumerate(kinds)]
    questions = list(ask([{"title": "T", "paragraphs": paragraphs}]))
    for seed in range(5):
        shared = list(squad.group_by_context(iter(questions), sets_of(3, seed), print, bm25_indexer()))
        assert {len({text[:3] for text in texts(question)}) for question in shared} == {1}
    assert len(shared) == 9
    random_sets = list(squad.group_by_context(iter(questions), sets_of(3), print))
    assert max(len({text[:3] for text in texts(question)}) for question in random_sets) > 1


def test_a_question_whose_answer_is_in_another_paragraph_of_its_set_is_dropped() -> None:
    dropped = RecordCounts()
    kept = [question.id for question in squad.group_by_context(ask([article()]), sets_of(None), dropped.drop)]
    assert kept == ["blue0", "blue1", "green0", "green1", "gold0", "gold1"]
    reason = "answer in another document of its set"
    assert dropped.dropped == {reason: 4} and len(dropped.drop_examples[reason]) == 3
