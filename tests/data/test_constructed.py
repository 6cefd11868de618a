"""Constructed sets: answers follow from the texts, and from nothing else."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from statistics import fmean

import pytest

from blockft.data.constructed import (
    CONSTRUCTED_SETS,
    NUM_SUBJECTS,
    SUBJECT_STEP,
    ConstructedSize,
    parse_constructed,
    read_constructed,
)
from blockft.data.qa_formats import Question
from blockft.errors import UserError

SIZES = {
    "related-passages": [
        ConstructedSize(),
        *(ConstructedSize(num_hops=hops, num_documents=2 * hops) for hops in (1, 2, 3, 4, 5)),
        ConstructedSize(num_hops=2, num_documents=101),
    ],
    "many-blocks": [ConstructedSize(), ConstructedSize(num_documents=24), ConstructedSize(num_documents=700)],
    "in-context": [
        ConstructedSize(),
        ConstructedSize(num_documents=2, num_labels=2),
        ConstructedSize(num_documents=12, num_labels=12),
        ConstructedSize(num_documents=100, num_labels=5),
    ],
}
ALL = [(name, size) for name, sizes in SIZES.items() for size in sizes]


def questions(name: str, size: ConstructedSize, number: int, first: int = 0) -> list[Question]:
    return [parse_constructed(record) for _, record in islice(read_constructed(name, size, first), number)]


def texts(question: Question) -> list[str]:
    return [f"{document.title}\n{document.text}" for document in question.documents]


def follow_chain(question: str, documents: list[str]) -> set[str]:
    """Find the town of a question of `related-passages` from the texts."""
    text = " ".join(documents)
    match = re.fullmatch(r"In which town does (?:the (.*) of )?(\w+) live\?", question)
    assert match
    relations, person = (match[1] or "").split(" of the "), match[2]
    for relation in reversed([relation for relation in relations if relation]):
        (target,) = re.findall(rf"The {relation} of {person} is ([^.]+)\.", text)
        person = target if target[0].isupper() else re.findall(rf"\n(\w+) is {target}\.", text)[0]
    return set(re.findall(rf"{person} lives in (\w+)\.", text))


def replay_game(question: str, documents: list[str]) -> set[str]:
    """Find the place of a question of `many-blocks` by replaying the turns."""
    turns = sorted((int(t), text) for t, text in re.findall(r"Turn (\d+)\n(.*)", "\n".join(documents)))
    assert [turn for turn, _ in turns] == list(range(1, len(documents) + 1))
    place_of: dict[str, str] = {}
    holder_of: dict[str, str] = {}
    until = re.search(r"after turn (\d+)", question)
    for turn, text in turns:
        if until and turn > int(until[1]):
            break
        unit, what, target = re.fullmatch(r"(\w+) (moves to|takes the lamp of) (\w+)\.", text).groups()  # type: ignore[union-attr]
        (place_of if what == "moves to" else holder_of)[unit if what == "moves to" else target] = (
            target if what == "moves to" else unit
        )
    item = re.search(r"the lamp of (\w+) after", question)
    unit = re.search(r"Where is (\w+) after", question)
    return {place_of[holder_of[item[1]] if item else unit[1]]}  # type: ignore[index]


def find_rule(question: str, documents: list[str]) -> set[str]:
    """Find the label of a question of `in-context` by every attribute that explains all shots."""
    shots = [
        re.fullmatch(r"\s*The (\w+) (\w+) (\w+) (\w+) of \w+ is a (\w+)\.", d).groups() for d in documents
    ]  # type: ignore[union-attr]
    query = re.fullmatch(r"What is the (\w+) (\w+) (\w+) (\w+) of \w+\?", question)
    assert query
    answers = set()
    for attribute in range(4):
        rule = {(shot[attribute], shot[4]) for shot in shots}
        if len({value for value, _ in rule}) == len(rule):
            answers |= {label for value, label in rule if value == query[attribute + 1]}
    return answers


SOLVERS: dict[str, Callable[[str, list[str]], set[str]]] = {
    "related-passages": follow_chain,
    "many-blocks": replay_game,
    "in-context": find_rule,
}


@pytest.mark.parametrize(("name", "size"), ALL)
def test_the_answer_follows_from_the_texts_alone(name: str, size: ConstructedSize) -> None:
    for question in questions(name, size, 40):
        assert SOLVERS[name](question.question, texts(question)) == {*question.answers}
        needed = [f"{d.title}\n{d.text}" for d in question.documents if d.supports]
        assert any(question.answers[0] in text for text in needed)
        if name == "related-passages":
            assert follow_chain(question.question, needed) == {*question.answers}


@pytest.mark.parametrize(("name", "size"), ALL)
def test_every_size_has_as_many_documents_as_asked_and_all_differ(name: str, size: ConstructedSize) -> None:
    for question in questions(name, size, 20):
        assert len(question.documents) == (size.num_documents or CONSTRUCTED_SETS[name].num_documents)
        assert len({document.key for document in question.documents}) == len(question.documents)


@pytest.mark.parametrize(("name", "size"), ALL)
def test_the_question_does_not_hold_the_answer_and_no_other_candidate_does(
    name: str, size: ConstructedSize
) -> None:
    for question in questions(name, size, 40):
        (answer,) = question.answers
        assert answer.lower() not in question.question.lower()
        words = set(re.findall(r"\w+", " ".join(texts(question)).lower())) - {answer.lower()}
        assert not any(answer.lower() in word for word in words)


def candidates(name: str, question: Question) -> list[str]:
    """Return what could be the answer by its kind, as often as the texts name it."""
    patterns = {
        "related-passages": r"lives in (\w+)",
        "many-blocks": r"moves to (\w+)",
        "in-context": r"is a (\w+)",
    }
    return re.findall(patterns[name], " ".join(texts(question)))


@pytest.mark.parametrize(
    ("name", "most"), [("related-passages", 0.2), ("many-blocks", 0.06), ("in-context", 0.2)]
)
def test_guesses_from_frequency_or_place_are_rarely_right(name: str, most: float) -> None:
    right: dict[str, list[bool]] = {"frequent": [], "first": [], "last": []}
    for question in questions(name, ConstructedSize(), 300):
        named = candidates(name, question)
        guesses = {"frequent": Counter(named).most_common(1)[0][0], "first": named[0], "last": named[-1]}
        for way, guess in guesses.items():
            right[way].append(guess in question.answers)
    assert all(fmean(found) < most for found in right.values()), right


@pytest.mark.parametrize("name", CONSTRUCTED_SETS)
def test_neither_place_nor_length_nor_relevance_marks_the_supporting_documents(name: str) -> None:
    places, own_lengths, all_lengths = [], [], []
    for question in questions(name, ConstructedSize(), 300):
        assert {document.relevance for document in question.documents} == {0}
        for i, document in enumerate(question.documents):
            all_lengths.append(len(document.text))
            if document.supports:
                places.append(i / (len(question.documents) - 1))
                own_lengths.append(len(document.text))
    assert 0.45 < fmean(places) < 0.55
    assert abs(fmean(own_lengths) / fmean(all_lengths) - 1) < 0.06


@pytest.mark.parametrize("name", CONSTRUCTED_SETS)
def test_a_sample_depends_on_its_number_only(name: str) -> None:
    size = ConstructedSize()
    assert questions(name, size, 6)[4:] == questions(name, size, 2, first=4)
    asked = [question.question for question in questions(name, size, 500)]
    assert len({*asked}) == len(asked)


def test_the_names_of_subjects_repeat_only_after_all_were_used() -> None:
    assert all(SUBJECT_STEP % prime for prime in (2, 5, 7)) and NUM_SUBJECTS == (2 * 5 * 7) ** 4


def test_groups_say_what_a_question_needs() -> None:
    types = {name: {q.meta["type"] for q in questions(name, ConstructedSize(), 200)} for name in SIZES}
    assert types["related-passages"] == {f"{n} hops, {w}" for n in (2, 3, 4) for w in ("named", "described")}
    assert types["many-blocks"] == {
        f"300 turns, {kind}" for kind in ("last move", "earlier move", "holder of an item")
    }
    assert types["in-context"] == {"32 shots, 8 labels"}
    levels = {q.meta["level"] for q in questions("in-context", ConstructedSize(), 200)}
    assert levels == {f"{name} decides" for name in ("size", "colour", "material", "kind")}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("related", ConstructedSize(), "no constructed set 'related'.*related-passages, many-blocks"),
        ("related-passages", ConstructedSize(num_documents=7), "num_documents 7.*8 or more"),
        ("related-passages", ConstructedSize(num_documents=5, num_hops=3), "num_documents 5.*6 or more"),
        ("many-blocks", ConstructedSize(num_documents=23), "num_documents 23.*24 or more"),
        ("in-context", ConstructedSize(num_documents=7), "num_documents 7.*8 or more"),
    ],
)
def test_an_impossible_set_is_refused(name: str, size: ConstructedSize, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_constructed(name, size)
