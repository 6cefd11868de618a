"""Question formats: parsers of HotpotQA, 2WikiMultihopQA, MuSiQue, and the files of FiD and DPR."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from blockft.data.document_pool import DocumentPool
from blockft.data.rag_prompt import Document
from blockft.data.sample import check_field, get_field, parse_text

NO_ANSWER = "no answer"
"""The reason for dropping a question that cannot be answered from its documents."""

NO_POSITIVE = "no positive document"
"""The reason for dropping a question of DPR's training files that has negative documents only."""


class RecordDropped(Exception):
    """A valid record gives no question; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its accepted answers, and its own documents.

    The first answer is the response. Distractors may be taken from `pool`. The reader of a source replaces an
    empty `id`.
    """

    id: str
    source: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    pool: DocumentPool | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def parse_hotpotqa(record: Any) -> Question:
    """Parse a record of HotpotQA, distractor setting (Yang et al. 2018).

    ::

        {"_id": "h1", "question": "who?", "answer": "the fox", "type": "bridge", "level": "easy",
         "supporting_facts": [["B", 0]],
         "context": [["B", ["One.", " Two."]], ["C", ["Three."]]]}
        -> documents B "One. Two." (supports, relevance 1) and C "Three." (relevance 0)

    The dataset on the Hub has mappings of two lists in place of lists of pairs; both are read.

    Raises:
        RecordError: a field is missing or has the wrong type.
    """
    return _parse_multi_hop(record, "hotpotqa", separator="")


def parse_2wikimultihopqa(record: Any) -> Question:
    """Parse a record of 2WikiMultihopQA (Ho et al. 2020), which has the layout of HotpotQA.

    ::

        {"_id": "w1", "question": "who?", "answer": "the fox", "type": "compositional",
         "supporting_facts": [["B", 0]],
         "context": [["B", ["One.", "Two."]], ["C", ["Three."]]]}
        -> documents B "One. Two." (supports, relevance 1) and C "Three." (relevance 0)

    Sentences are joined by a space. The published parquet files hold lists as JSON text; both are read.

    Raises:
        RecordError: a field is missing or has the wrong type.
    """
    return _parse_multi_hop(record, "2wikimultihopqa", separator=" ")


def parse_musique(record: Any) -> Question:
    """Parse a record of MuSiQue (Trivedi et al. 2022).

    ::

        {"id": "2hop__12_34", "question": "who?", "answer": "the fox", "answer_aliases": ["a fox"],
         "answerable": true,
         "paragraphs": [{"title": "B", "paragraph_text": "One.", "is_supporting": true}, ...]}
        -> answers ("the fox", "a fox"), one document per paragraph, meta {"type": "2hop"}

    Raises:
        RecordDropped: the question is marked as not answerable.
        RecordError: a field is missing or has the wrong type.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    id = parse_text(get_field(record, "id"), "field 'id'")
    if get_field(record, "answerable", True) is False:
        raise RecordDropped(NO_ANSWER)
    aliases = _list(record, "answer_aliases", [])
    documents = []
    for i, paragraph in enumerate(_list(record, "paragraphs")):
        field_name = f"field 'paragraphs[{i}]"
        check_field(isinstance(paragraph, Mapping), f"{field_name}'", paragraph, "be a JSON object")
        supports = paragraph.get("is_supporting", False)
        check_field(type(supports) is bool, f"{field_name}.is_supporting'", supports, "be true or false")
        documents.append(
            Document(
                title=parse_text(paragraph.get("title", ""), f"{field_name}.title'", may_be_blank=True),
                text=parse_text(
                    paragraph.get("paragraph_text"), f"{field_name}.paragraph_text'", may_be_blank=True
                ),
                relevance=int(supports),
                supports=supports,
            )
        )
    # an id starts with the number and kind of its hops, as in 3hop1__12_34_56
    hops = re.match(r"\d+hop\d*(?=_)", id)
    return Question(
        id=id,
        source="musique",
        question=parse_text(get_field(record, "question"), "field 'question'"),
        answers=accepted_answers([get_field(record, "answer"), *aliases], "field 'answer'"),
        documents=tuple(documents),
        meta={"type": hops[0]} if hops else {},
    )


def parse_fid(record: Any) -> Question:
    """Parse a question with retrieved passages (NQ, TriviaQA and others), as FiD and DPR write them.

    ::

        {"id": 7, "question": "who?", "answers": ["the fox", "a fox"],
         "ctxs": [{"title": "B", "text": "One.", "score": 2.5, "hasanswer": true}, ...]}
        -> answers ("the fox", "a fox"), one document per passage, relevance 2.5

    `target`, if present, is the response. The relevance of a passage is its `score`. If a passage has no
    score, the passages marked `isgold` have relevance 1 and all others 0; without such a mark the relevance
    falls in the order of the file. Passages marked `isgold` support the answer; without such a mark the first
    passage marked `hasanswer` does.

    DPR's training files have `positive_ctxs`, `hard_negative_ctxs` and `negative_ctxs` in place of `ctxs`.
    The first positive passage counts as gold, and scores are ignored, as they are not comparable.

    Raises:
        RecordDropped: the record has no answer, or `positive_ctxs` is empty.
        RecordError: a field is missing or has the wrong type.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    id = record.get("id", record.get("_id"))
    check_field(id is None or type(id) in (int, str), "field 'id'", id, "be a text or a whole number")
    values = [record[name] for name in ("target", "answer", "answers") if record.get(name) is not None]
    if not values:
        get_field(record, "answers")
    answers = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if not answers:
        raise RecordDropped(NO_ANSWER)
    passages = _dpr_passages(record) if "positive_ctxs" in record else _passages(record, "ctxs", ...)
    gold = {i for i, (_, passage) in enumerate(passages) if passage.get("isgold")}
    has_answer = (i for i, (_, p) in enumerate(passages) if p.get("hasanswer", p.get("has_answer")))
    supporting = gold or {next(has_answer, -1)}
    scores = [_score(passage, f"{field_name}.score'") for field_name, passage in passages]
    documents = []
    for i, (field_name, passage) in enumerate(passages):
        score = scores[i] if None not in scores else int(i in gold) if gold else -i
        documents.append(
            Document(
                title=parse_text(passage.get("title") or "", f"{field_name}.title'", may_be_blank=True),
                text=parse_text(passage.get("text"), f"{field_name}.text'", may_be_blank=True),
                relevance=score or 0,
                supports=i in supporting,
            )
        )
    return Question(
        id="" if id is None else parse_text(str(id), "field 'id'"),
        source="fid",
        question=parse_text(get_field(record, "question"), "field 'question'"),
        answers=accepted_answers(answers, "field 'answers'"),
        documents=tuple(documents),
    )


def accepted_answers(answers: list[Any], field_name: str) -> tuple[str, ...]:
    """Return the distinct answers, stripped, in order.

    Raises:
        RecordError: an answer is blank or not a text; the message names `field_name`.
    """
    return tuple(dict.fromkeys(parse_text(answer, field_name).strip() for answer in answers))


def _parse_multi_hop(record: Any, source: str, *, separator: str) -> Question:
    """Parse a record in the layout of HotpotQA; `separator` joins the sentences of a paragraph."""
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    question = parse_text(get_field(record, "question"), "field 'question'")
    answers = accepted_answers([get_field(record, "answer")], "field 'answer'")
    id = parse_text(get_field(record, "_id" if "_id" in record else "id"), "field '_id'")
    supporting_titles = {title for title, _ in _pairs(record, "supporting_facts", "title", "sent_id")}
    documents = []
    for i, (title, sentences) in enumerate(_pairs(record, "context", "title", "sentences")):
        field_name = f"field 'context[{i}]'"
        are_texts = isinstance(sentences, list) and all(type(s) is str for s in sentences)
        check_field(are_texts, field_name, sentences, "hold sentences")
        documents.append(
            Document(
                title=parse_text(title, field_name, may_be_blank=True),
                text=parse_text(separator.join(sentences), field_name, may_be_blank=True),
                relevance=int(title in supporting_titles),
                supports=title in supporting_titles,
            )
        )
    meta = {name: record[name] for name in ("type", "level") if record.get(name) is not None}
    return Question(
        id=id, source=source, question=question, answers=answers, documents=tuple(documents), meta=meta
    )


def _list(record: Mapping[str, Any], name: str, default: Any = ...) -> list[Any]:
    value = get_field(record, name, default)
    if value is default:
        return []
    check_field(isinstance(value, list), f"field {name!r}", value, "be a list")
    return list(value)


def _passages(record: Mapping[str, Any], name: str, default: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the passages of a field, each with its field name.

    The name has no closing quote yet, so that the caller can append the name of a field inside the passage.
    """
    passages = [(f"field '{name}[{i}]", passage) for i, passage in enumerate(_list(record, name, default))]
    for field_name, passage in passages:
        check_field(isinstance(passage, Mapping), f"{field_name}'", passage, "be a JSON object")
    return passages


def _dpr_passages(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return positive and negative passages without scores; the first positive one is marked as gold."""
    positive, *negative = (
        _passages(record, name, []) for name in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
    )
    if not positive:
        raise RecordDropped(NO_POSITIVE)
    return [
        (field_name, {k: passage[k] for k in ("title", "text") if k in passage} | {"isgold": i == 0})
        for i, (field_name, passage) in enumerate(chain(positive, *negative))
    ]


def _score(passage: Mapping[str, Any], field_name: str) -> float | None:
    """Return the retriever's score, which may be a number or its text; None if there is none."""
    value = passage.get("score")
    if value is None:
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    check_field(math.isfinite(score) and type(value) is not bool, field_name, value, "be a number")
    return score


def _pairs(record: Mapping[str, Any], name: str, first: str, second: str) -> list[tuple[Any, Any]]:
    """Return a field as a list of pairs.

    The field may hold a list of pairs, a mapping of two lists (keys `first` and `second`), or either of them
    as JSON text.
    """
    value = get_field(record, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (RecursionError, ValueError):
            check_field(False, f"field {name!r}", value, "be a list or the text of one in JSON")
    if (
        isinstance(value, Mapping)
        and isinstance(value.get(first), list)
        and isinstance(value.get(second), list)
    ):
        num_first, num_second = len(value[first]), len(value[second])
        rule = f"hold as many {first} as {second}, not {num_first} and {num_second}"
        check_field(num_first == num_second, f"field {name!r}", value, rule)
        value = list(zip(value[first], value[second], strict=True))
    are_pairs = isinstance(value, list) and all(_is_pair(pair) for pair in value)
    check_field(are_pairs, f"field {name!r}", value, f"be a list of pairs ({first}, {second})")
    return [(pair[0], pair[1]) for pair in value]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)
