import json
from typing import Any

import pytest

from blockft.data.qa_formats import (
    Question,
    parse_2wikimultihopqa,
    parse_fid,
    parse_hotpotqa,
    parse_musique,
)
from blockft.data.sample import RecordDropped, RecordError

HOTPOTQA: dict[str, Any] = {
    "_id": "h1",
    "question": "who?",
    "answer": " the fox",
    "type": "bridge",
    "supporting_facts": [["B", 0]],
    "context": [["B", ["One.", " Two."]], ["C", ["Three."]]],
}
MUSIQUE: dict[str, Any] = {
    "id": "3hop1__12_34_56",
    "question": "who?",
    "answer": "the fox",
    "answer_aliases": ["a fox", "the fox"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "B", "paragraph_text": "One.", "is_supporting": False},
        {"idx": 1, "title": "C", "paragraph_text": "Two.", "is_supporting": True},
    ],
}
FID: dict[str, Any] = {
    "question": "who?",
    "answers": ["the fox", "a fox"],
    "ctxs": [{"title": "B", "text": "One."}, {"title": None, "text": "Two."}],
}

DPR: dict[str, Any] = {"question": "who?", "answers": ["the fox"], "positive_ctxs": [{"text": "One."}]}


def ctxs(*changes: dict[str, Any]) -> dict[str, Any]:
    return FID | {"ctxs": [{"title": "B", "text": "One."} | change for change in changes]}


def test_multi_hop_records_become_questions() -> None:
    question = parse_hotpotqa(HOTPOTQA)
    assert (question.id, question.answers, question.meta) == ("h1", ("the fox",), {"type": "bridge"})
    assert [(d.title, d.text, d.relevance, d.supports) for d in question.documents] == [
        ("B", "One. Two.", 1, True),
        ("C", "Three.", 0, False),
    ]
    spaced = parse_2wikimultihopqa(HOTPOTQA | {"context": [["B", ["One.", "Two."]], ["C", ["Three."]]]})
    assert spaced.documents == question.documents and spaced.source == "2wikimultihopqa"


@pytest.mark.parametrize("parse", [parse_hotpotqa, parse_2wikimultihopqa])
def test_multi_hop_records_may_hold_mappings_of_lists_or_json_text(parse: Any) -> None:
    hub = {
        "supporting_facts": {"title": ["B"], "sent_id": [0]},
        "context": {"title": ["B", "C"], "sentences": [["One.", " Two."], ["Three."]]},
    }
    texts = {name: json.dumps(HOTPOTQA[name]) for name in ("context", "supporting_facts")}
    assert parse(HOTPOTQA) == parse(HOTPOTQA | hub) == parse(HOTPOTQA | texts)
    with pytest.raises(RecordError, match="'context' is .* the text of one in JSON"):
        parse(HOTPOTQA | {"context": "[["})


def test_musique_records_become_questions() -> None:
    question = parse_musique(MUSIQUE)
    assert (question.answers, question.meta) == (("the fox", "a fox"), {"type": "3hop1"})
    assert [(d.title, d.text, d.supports) for d in question.documents] == [
        ("B", "One.", False),
        ("C", "Two.", True),
    ]
    assert parse_musique(MUSIQUE | {"id": "x"}).meta == {}
    with pytest.raises(RecordDropped, match="no answer"):
        parse_musique(MUSIQUE | {"answerable": False})


def test_fid_records_become_questions() -> None:
    question = parse_fid(FID)
    assert (question.id, question.answers) == ("", ("the fox", "a fox"))
    assert [(d.title, d.relevance, d.supports) for d in question.documents] == [
        ("B", 0, False),
        ("", -1, False),
    ]
    assert parse_fid(FID | {"id": 7, "target": "Fox"}).answers == ("Fox", "the fox", "a fox")
    assert parse_fid({**FID, "answers": None, "answer": "Fox", "id": "x"}).answers == ("Fox",)
    with pytest.raises(RecordDropped, match="no answer"):
        parse_fid(FID | {"answers": []})


@pytest.mark.parametrize(
    ("changes", "relevance", "supporting"),
    [
        (({"score": "2.5"}, {"score": 3}), [2.5, 3], []),
        (({"score": 2}, {}), [0, -1], []),
        (({}, {"isgold": True, "hasanswer": True}), [0, 1], [1]),
        (({"hasanswer": True}, {"isgold": True}), [0, 1], [1]),
        (({"has_answer": False}, {"has_answer": True}, {"has_answer": True}), [0, -1, -2], [1]),
    ],
)
def test_fid_scores_and_marks_give_relevance_and_support(
    changes: tuple[dict[str, Any], ...], relevance: list[float], supporting: list[int]
) -> None:
    documents = parse_fid(ctxs(*changes)).documents
    assert [d.relevance for d in documents] == relevance
    assert [i for i, d in enumerate(documents) if d.supports] == supporting


def test_dpr_training_records_mark_the_first_positive_passage_as_gold() -> None:
    positive, negative = [{"title": t, "text": "x", "score": 0, "passage_id": "9"} for t in "PN"]
    record = {"question": "who?", "answers": ["the fox"], "positive_ctxs": [positive, positive]}
    documents = parse_fid(record | {"negative_ctxs": [], "hard_negative_ctxs": [negative]}).documents
    assert [(d.title, d.relevance, d.supports) for d in documents] == [
        ("P", 1, True),
        ("P", 0, False),
        ("N", 0, False),
    ]
    assert not parse_fid(record).missing_evidence
    unsupported = parse_fid(record | {"positive_ctxs": [], "hard_negative_ctxs": [negative]})
    assert unsupported.missing_evidence == "no positive document"
    assert [document.supports for document in unsupported.documents] == [False]


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (parse_hotpotqa(HOTPOTQA), ""),
        (parse_hotpotqa(HOTPOTQA | {"context": []}), "no supporting document"),
        (parse_hotpotqa(HOTPOTQA | {"context": [["C", ["Three."]]]}), "no supporting document"),
        (parse_hotpotqa(HOTPOTQA | {"supporting_facts": []}), "no supporting document"),
        (parse_hotpotqa(HOTPOTQA | {"context": [["B", [" ", ""]]]}), "no supporting document"),
        (
            parse_2wikimultihopqa(HOTPOTQA | {"supporting_facts": [["B", 0], ["D", 1]]}),
            "a supporting document is missing",
        ),
        (parse_2wikimultihopqa(HOTPOTQA | {"context": [[" b", ["One."]]]}), ""),
        (parse_musique(MUSIQUE), ""),
        (parse_musique(MUSIQUE | {"paragraphs": MUSIQUE["paragraphs"][:1]}), "no supporting document"),
        (parse_musique(MUSIQUE | {"paragraphs": []}), "no supporting document"),
        (parse_fid(FID), ""),
        (parse_fid(FID | {"ctxs": []}), "no supporting document"),
        (parse_fid(ctxs({"text": " "})), "no supporting document"),
        (parse_fid(ctxs({"hasanswer": False}, {})), "no supporting document"),
        (parse_fid(ctxs({"isgold": False, "has_answer": 0})), "no supporting document"),
        (parse_fid(ctxs({"isgold": False, "hasanswer": True})), ""),
        (parse_fid(ctxs({"isgold": None, "hasanswer": None})), ""),
    ],
)
def test_a_question_knows_why_its_documents_do_not_support_it(question: Question, reason: str) -> None:
    assert question.missing_evidence == reason


@pytest.mark.parametrize("change", [{"answerable": False}, {"is_impossible": True}, {"answerable": 0}])
@pytest.mark.parametrize("parse", [parse_hotpotqa, parse_2wikimultihopqa, parse_musique, parse_fid])
def test_a_question_that_is_marked_as_not_answerable_is_dropped(parse: Any, change: dict[str, Any]) -> None:
    record = {parse_musique: MUSIQUE, parse_fid: FID}.get(parse, HOTPOTQA)
    with pytest.raises(RecordDropped, match="no answer"):
        parse(record | change)


@pytest.mark.parametrize(
    ("parse", "record", "name"),
    [(parse_hotpotqa, HOTPOTQA, "_id"), (parse_musique, MUSIQUE, "id"), (parse_fid, FID, "_id")],
)
def test_a_whole_number_is_an_id(parse: Any, record: dict[str, Any], name: str) -> None:
    assert parse(record | {name: 262}).id == "262"


@pytest.mark.parametrize(
    ("parse", "record", "field"),
    [
        (parse_hotpotqa, HOTPOTQA | {"context": {"title": ["B"]}}, "'context'"),
        (parse_2wikimultihopqa, HOTPOTQA | {"answer": ""}, "'answer'"),
        (parse_musique, MUSIQUE | {"paragraphs": [1]}, r"'paragraphs\[0\]'"),
        (
            parse_musique,
            MUSIQUE | {"paragraphs": [{"paragraph_text": 1}]},
            r"'paragraphs\[0\].paragraph_text'",
        ),
        (parse_musique, MUSIQUE | {"answer_aliases": "x"}, "'answer_aliases'"),
        (parse_fid, {"question": "who?", "ctxs": []}, "'answers' is missing"),
        (parse_fid, FID | {"ctxs": None}, "'ctxs'"),
        (parse_fid, FID | {"answers": ["x", 1]}, r"'answers\[1\]'"),
        (parse_fid, FID | DPR, "either 'ctxs' or 'positive_ctxs'"),
        (parse_fid, ctxs({"hasanswer": "false"}), r"'ctxs\[0\].hasanswer' is 'false'"),
        (parse_fid, ctxs({"score": 10**400}), r"'ctxs\[0\].score'"),
        (parse_musique, MUSIQUE | {"answerable": "false"}, "'answerable' is 'false'"),
        (parse_hotpotqa, HOTPOTQA | {"_id": 1.5}, "'_id' is 1.5"),
        (parse_hotpotqa, HOTPOTQA | {"_id": True}, "'_id' is True"),
        (parse_hotpotqa, HOTPOTQA | {"level": "\ud800"}, "'level'"),
        (parse_fid, FID | {"id": 1.5}, "'id'"),
        (parse_fid, ctxs({"score": "high"}), r"'ctxs\[0\].score'"),
        (parse_fid, ctxs({}, {"text": None}), r"'ctxs\[1\].text'"),
        (parse_fid, DPR | {"positive_ctxs": ["x"]}, r"'positive_ctxs\[0\]'"),
        (parse_fid, DPR | {"positive_ctxs": [{"text": "x"}, {"text": 1}]}, r"'positive_ctxs\[1\].text'"),
        (
            parse_fid,
            DPR | {"negative_ctxs": [{}]},
            r"'negative_ctxs\[0\].text'",
        ),
        (
            parse_hotpotqa,
            HOTPOTQA | {"context": {"title": ["B", "C"], "sentences": [["One."]]}},
            "'context' .* as many title as sentences, not 2 and 1",
        ),
        (
            parse_2wikimultihopqa,
            HOTPOTQA | {"supporting_facts": {"title": ["B"], "sent_id": []}},
            "'supporting_facts' .* not 1 and 0",
        ),
        (
            parse_2wikimultihopqa,
            HOTPOTQA | {"context": "[" * 100_000},
            "'context' .* the text of one in JSON",
        ),
        (parse_fid, [], "the record"),
    ],
)
def test_a_bad_record_names_its_field(parse: Any, record: Any, field: str) -> None:
    with pytest.raises(RecordError, match=field):
        parse(record)
