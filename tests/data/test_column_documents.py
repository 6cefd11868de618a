from typing import Any

import pytest

from blockft.data.column_documents import parse_documents
from blockft.data.columns import Columns, build_columns
from blockft.data.qa_formats import PART_OF_EVIDENCE
from blockft.data.sample import NO_EVIDENCE, RecordError

TEXTS = ["One.", "Two.", "Three."]


def columns(**mapped: Any) -> Columns:
    return build_columns({"question": "q", "documents": "docs"} | mapped)


def documents(record: dict[str, Any], answers: tuple[str, ...] = (), **mapped: Any) -> list[tuple[str, str]]:
    found, _ = parse_documents(columns(**mapped), record, answers)
    return [(document.title, document.text) for document in found]


def supporting(record: dict[str, Any], answers: tuple[str, ...] = (), **mapped: Any) -> tuple[list[str], str]:
    """Return the texts of the documents that support the answer, and why none does."""
    found, missing = parse_documents(columns(**mapped), record, answers)
    return [document.text for document in found if document.supports], missing


@pytest.mark.parametrize(
    ("value", "mapped"),
    [
        (TEXTS, {}),
        ([["One.", "Two."], ["Three."]], {}),
        ([{"text": text} for text in TEXTS], {}),
        ([{"contents": text} for text in TEXTS], {}),
        ([{"body": {"t": text}} for text in TEXTS], {"text": "body.t"}),
        ([{"body": text} for text in TEXTS], {"text": "docs.body"}),
        ([{"a": "One."}, {"b": "Two."}, {"a": None, "b": "Three."}], {"text": ["a", "b"]}),
        ({"text": TEXTS}, {}),
        ({"text": [TEXTS]}, {}),
        ({"items": [{"text": text} for text in TEXTS]}, {"documents": "docs.items"}),
        ('["One.", "Two.", "Three."]', {"documents": "docs[]"}),
        ("['One.', 'Two.', 'Three.']", {"documents": "docs[]"}),
        ([*TEXTS, None, " ", "One. "], {}),
        ([{"text": "One."}, "Two.", {"text": None}, {"text": "Three."}], {}),
    ],
)
def test_documents_are_found_in_any_container(value: Any, mapped: dict[str, Any]) -> None:
    assert documents({"docs": value}, **mapped) == [("", text) for text in TEXTS]


@pytest.mark.parametrize(
    ("record", "mapped"),
    [
        ({"docs": [{"title": "A", "text": "1"}, {"title": "B", "text": "2"}]}, {}),
        ({"docs": [{"name": "A", "text": "1"}, {"name": "B", "text": "2"}]}, {"title": "name"}),
        ({"docs": [{"name": "A", "text": "1"}, {"name": "B", "text": "2"}]}, {"title": "docs.name"}),
        ({"docs": {"title": ["A", "B"], "text": ["1", "2"]}}, {}),
        ({"docs": {"title": [["A", "B"]], "text": [["1", "2"]]}}, {}),
        ({"docs": ["1", "2"], "names": ["A", "B"]}, {"title": "names"}),
        ({"docs": {"t": [["1", "2"]], "n": [["A", "B"]]}}, {"documents": "docs.t", "title": "docs.n"}),
        ({"doc1": "1", "doc2": "2", "name1": "A", "name2": "B"}, {"documents": "doc*", "title": "name*"}),
        ({"doc1": "1", "doc5": "2", "name5": "B", "name1": "A"}, {"documents": "doc*", "title": "name*"}),
        (
            {"x": "1", "y": {"title": "B", "text": "2"}, "n": "A"},
            {"documents": ["x", "y"], "title": ["title", "n"]},
        ),
        ({"d1": {"title": "A", "text": "1"}, "d2": {"title": "B", "text": "2"}}, {"documents": "d*"}),
    ],
)
def test_titles_belong_to_their_documents(record: dict[str, Any], mapped: dict[str, Any]) -> None:
    assert documents(record, **mapped) == [("A", "1"), ("B", "2")]


@pytest.mark.parametrize("text", ["[1] A fox [2].", "[1, 2]", '{"order": 1}', "['Twas a fox]", "{ fox }"])
def test_a_text_in_brackets_is_a_document(text: str) -> None:
    assert documents({"docs": text}) == [("", text)]


def test_nan_is_no_document() -> None:
    record = {"docs": ["1", float("nan"), "2"], "titles": ["t", "u", float("nan")]}
    assert documents(record, title="titles") == [("t", "1"), ("", "2")]


@pytest.mark.parametrize("number", [1, 1.0, "1", "1.0"])
def test_numbers_of_documents_are_whole_in_any_form(number: Any) -> None:
    assert supporting({"docs": ["1", "2"], "n": number}, supporting_indices="n") == (["2"], "")


def test_pairs_of_a_title_and_sentences_are_documents() -> None:
    record = {"docs": [["t", ["1 ", " 2"]], ["u", ["3"]]], "facts": [["u", 0]]}
    assert documents(record) == [("t", "1 2"), ("u", "3")]
    assert supporting(record, supporting="facts") == (["3"], "")


def test_a_title_of_the_record_belongs_to_all_its_texts() -> None:
    assert documents({"docs": ["1", "2"], "t": "A"}, title="t") == [("A", "1"), ("A", "2")]
    assert documents({"docs": "1", "t": "A"}, title="t") == [("A", "1")]
    assert documents({"docs": ["1"], "title": "a title of the record"}) == [("", "1")]


def test_sentences_of_a_document_are_joined() -> None:
    sentences = {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]}
    expected = [("A", "One. Two."), ("B", "Three.")]
    assert documents({"docs": sentences}, text="sentences") == expected
    assert documents({"docs": sentences}, documents="docs.sentences", title="docs.title") == expected
    objects = [{"title": "A", "sentences": ["One.", " Two."]}, {"title": "B", "sentences": ["Three."]}]
    assert documents({"docs": objects}, text="sentences") == expected


@pytest.mark.parametrize(
    ("record", "mapped", "message"),
    [
        (
            {"docs": ["1", "2"], "names": ["A"]},
            {"title": "names"},
            r"the title is \['A'\], it should be a list of 2",
        ),
        ({"docs": ["1", "2"], "s": [1, 2, 3]}, {"score": "s"}, "be a list of 2, as 'docs' is"),
        (
            {"docs": [{"txt": "1"}]},
            {},
            r"docs\[0\].*should have the field text or contents .*columns.text=txt",
        ),
        ({"docs": [3.5]}, {}, r"field 'docs\[0\]' is 3.5, it should be a text"),
        ({"docs": True}, {}, "field 'docs' is True"),
        ({"docs": '["1", "2"]'}, {}, r"is the text of one: name it docs\[\]"),
        ({"docs": '["1", null]'}, {}, r"is the text of one: name it docs\[\]"),
        ({"docs": '[["t", ["1", "2"]]]'}, {}, r"is the text of one: name it docs\[\]"),
        ({"docs": "[{'text': '1'}\n {'text': '2'}]"}, {}, "the text of one of NumPy or pandas"),
        ({"docs": '{"title": "t", "text": "1"}'}, {}, r"name a field inside it, such as docs\.text"),
        ({"docs": ["1", ["2"]]}, {}, "not hold both texts and lists"),
        ({"docs": [{"text": "1", "score": "high"}]}, {"score": "score"}, "be a number"),
        ({"docs": [{"text": "1", "ok": "maybe"}]}, {"supporting": "ok"}, "be true or false"),
        ({"docs": ["1", "2"], "ok": [0, 1, 1]}, {"supporting": "ok"}, "be a list of 2"),
        (
            {"docs": ["1", "2"], "ok": [1, 2]},
            {"supporting": "ok"},
            "true or false for every document, or titles",
        ),
        ({"docs": ["1"], "n": ["x"]}, {"supporting_indices": "n"}, "hold numbers of documents"),
        ({"docs": ["1"], "n": [0.5]}, {"supporting_indices": "n"}, "hold numbers of documents"),
        ({"docs": ["1"], "n": "[0]"}, {"supporting_indices": "n"}, r"name it n\[\]"),
        ({"docs": ["1"], "ok": "[True]"}, {"supporting": "ok"}, r"name it ok\[\]"),
        (
            {"docs": ["1"], "n": [1]},
            {"supporting_indices": "n"},
            r"the number .* is 1, it should be one of \[0\]",
        ),
        ({"d1": "1", "d2": "2", "ok": [0, 1]}, {"documents": "d*", "supporting": "ok"}, "numbered fields"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    record: dict[str, Any], mapped: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        documents(record, **mapped)


OBJECTS = [{"text": "1", "ok": False}, {"text": "2", "ok": True}]


@pytest.mark.parametrize(
    ("record", "mapped"),
    [
        ({"docs": OBJECTS}, {"supporting": "ok"}),
        ({"docs": OBJECTS}, {"supporting": "docs.ok"}),
        ({"docs": {"text": ["1", "2"], "ok": [0, 1]}}, {"supporting": "ok"}),
        ({"docs": ["1", "2"], "ok": [0, 1]}, {"supporting": "ok"}),
        ({"docs": ["1", "2"], "ok": [False, True]}, {"supporting": "ok"}),
        ({"docs": [{"text": "1"}, {"text": "2"}], "ok": [0, 1]}, {"supporting": "ok"}),
        ({"docs": ["1", None, "2"], "ok": [0, 0, 1]}, {"supporting": "ok"}),
        (
            {"docs": [{"title": "A", "text": "1"}, {"title": "B", "text": "2"}], "gold": "B"},
            {"supporting": "gold"},
        ),
        (
            {"docs": [{"title": "A", "text": "1"}, {"title": "B", "text": "2"}], "gold": ["b"]},
            {"supporting": "gold"},
        ),
        ({"docs": ["1", "2"], "gold": [" 2 "]}, {"supporting": "gold"}),
        ({"docs": ["1", None, "2"], "gold": 2}, {"supporting_indices": "gold"}),
        ({"docs": ["1", "2"], "gold": ["1"]}, {"supporting_indices": "gold"}),
        ({"d1": "1", "d2": "2", "gold": "2"}, {"documents": "d*", "supporting_indices": "gold"}),
        ({"d1": "1", "d2": "2", "ok1": "0", "ok2": "1"}, {"documents": "d*", "supporting": "ok*"}),
        ({"docs": ["1", "2"]}, {"supporting_contains_answer": True}),
    ],
)
def test_the_documents_that_support_the_answer_are_known(
    record: dict[str, Any], mapped: dict[str, Any]
) -> None:
    assert supporting(record, ("2",), **mapped) == (["2"], "")


@pytest.mark.parametrize(
    ("record", "mapped", "reason"),
    [
        ({"docs": ["1"], "ok": [0]}, {"supporting": "ok"}, NO_EVIDENCE),
        ({"docs": ["1"], "ok": []}, {"supporting": "ok"}, NO_EVIDENCE),
        ({"docs": ["1"], "ok": ["2"]}, {"supporting": "ok"}, NO_EVIDENCE),
        ({"docs": ["1"], "ok": ["1", "2"]}, {"supporting": "ok"}, PART_OF_EVIDENCE),
        ({"docs": ["1"], "ok": None}, {"supporting": "ok"}, ""),
        ({"docs": ["1"]}, {"supporting_contains_answer": True}, NO_EVIDENCE),
        ({"docs": []}, {}, NO_EVIDENCE),
        ({"docs": None}, {}, NO_EVIDENCE),
        ({}, {}, NO_EVIDENCE),
        ({"docs": [{"title": "A", "text": " "}]}, {}, NO_EVIDENCE),
        ({"docs": [{"text": "1"}, {"text": " ", "ok": True}]}, {"supporting": "ok"}, NO_EVIDENCE),
        ({"docs": ["1"]}, {}, ""),
    ],
)
def test_documents_that_are_known_not_to_support_the_answer(
    record: dict[str, Any], mapped: dict[str, Any], reason: str
) -> None:
    assert supporting(record, ("2",), **mapped)[1] == reason


def test_a_blank_title_supports_nothing() -> None:
    assert supporting({"docs": ["1"], "gold": ""}, supporting="gold") == ([], NO_EVIDENCE)


def relevance(record: dict[str, Any], **mapped: Any) -> list[float]:
    found, _ = parse_documents(columns(**mapped), record, ())
    return [document.relevance for document in found]


def test_the_relevance_is_the_score_or_the_mark_or_the_order() -> None:
    assert relevance({"docs": ["1", "2"], "s": [0.5, "1e1"]}, score="s") == [0.5, 10.0]
    assert relevance({"docs": [{"text": "1", "s": 3}, {"text": "2", "s": 4}]}, score="s") == [3, 4]
    assert relevance({"docs": ["1", "2"], "ok": [0, 1]}, supporting="ok") == [0, 1]
    assert relevance({"docs": ["1", "2"], "ok": [0, 1], "s": [7, None]}, supporting="ok", score="s") == [0, 1]
    assert relevance({"docs": ["1", "2", "3"]}) == [0, -1, -2]


def test_equal_documents_are_one_document_which_keeps_its_support() -> None:
    docs = [{"title": "A", "text": "1"}, {"title": "A ", "text": " 1", "ok": 1}, {"title": "B", "text": "1"}]
    found, missing = parse_documents(columns(supporting="ok"), {"docs": docs}, ())
    assert [(d.title, d.supports) for d in found] == [("A", True), ("B", False)] and not missing
