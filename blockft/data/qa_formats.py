"""Published layouts of questions with documents, record by record."""

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
"""Why a question that cannot be answered from its documents is dropped."""

NO_POSITIVE = "no positive document"
"""Why a question of DPR's training files that would be learnt over negative documents alone is dropped."""


class RecordDropped(Exception):
    """A record is sound but gives no question; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its accepted answers (the first is the response), and its own documents.

    Distractors may be taken from `pool`. An empty `id` is filled in by the reader.
    """

    id: str
    source: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    pool: DocumentPool | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def parse_hotpotqa(record: Any) -> Question:
    """HotpotQA, distractor setting (Yang et al. 2018): ten paragraphs, cut into sentences; two support.

    The authors' JSON has lists of pairs, the data set on the Hub mappings of two lists.
    """
    return _parse_multi_hop(record, "hotpotqa", between="")


def parse_2wikimultihopqa(record: Any) -> Question:
    """2WikiMultihopQA (Ho et al. 2020): HotpotQA's layout, but sentences do not carry the space between them.

    The published parquet files spell lists as texts of JSON.
    """
    return _parse_multi_hop(record, "2wikimultihopqa", between=" ")


def parse_musique(record: Any) -> Question:
    """MuSiQue (Trivedi et al. 2022): twenty paragraphs, two to four of which support.

    Raises:
        Dropped: the record is one of those that cannot be answered.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    id = parse_text(get_field(record, "id"), "field 'id'")
    if get_field(record, "answerable", True) is False:
        raise RecordDropped(NO_ANSWER)
    aliases = _list(record, "answer_aliases", [])
    documents = []
    for i, paragraph in enumerate(_list(record, "paragraphs")):
        at = f"field 'paragraphs[{i}]"
        check_field(isinstance(paragraph, Mapping), f"{at}'", paragraph, "be a JSON object")
        supports = paragraph.get("is_supporting", False)
        check_field(type(supports) is bool, f"{at}.is_supporting'", supports, "be true or false")
        documents.append(
            Document(
                title=parse_text(paragraph.get("title", ""), f"{at}.title'", may_be_blank=True),
                text=parse_text(paragraph.get("paragraph_text"), f"{at}.paragraph_text'", may_be_blank=True),
                relevance=int(supports),
                supports=supports,
            )
        )
    # the id begins with the number and kind of hops
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
    """NQ, TriviaQA and others as FiD and DPR write them: `question`, `answers` and retrieved `ctxs`.

    `target`, where there is one, is the response. The relevance of a document is its `score`; where not every
    one has one, the gold ones (`isgold`) stand first, or, where none is, the order of the file counts. The
    gold documents support; where none is marked so, the first one that has the answer (`hasanswer`). DPR's
    training files have `positive_ctxs`, of which the first is gold, `hard_negative_ctxs` and `negative_ctxs`.

    Raises:
        Dropped: there is no answer, or `positive_ctxs` is empty.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    id = record.get("id", record.get("_id"))
    check_field(id is None or type(id) in (int, str), "field 'id'", id, "be a text or a whole number")
    given = [record[name] for name in ("target", "answer", "answers") if record.get(name) is not None]
    if not given:
        get_field(record, "answers")
    answers = [text for some in given for text in (some if isinstance(some, list) else [some])]
    if not answers:
        raise RecordDropped(NO_ANSWER)
    named = _dpr_contexts(record) if "positive_ctxs" in record else _contexts(record, "ctxs", ...)
    found = [context for _, context in named]
    gold = {i for i, context in enumerate(found) if context.get("isgold")}
    with_answer = (i for i, c in enumerate(found) if c.get("hasanswer", c.get("has_answer")))
    supporting = gold or {next(with_answer, -1)}
    scores = [_score(context, f"{at}.score'") for at, context in named]
    documents = []
    for i, (at, context) in enumerate(named):
        score = scores[i] if None not in scores else int(i in gold) if gold else -i
        documents.append(
            Document(
                title=parse_text(context.get("title") or "", f"{at}.title'", may_be_blank=True),
                text=parse_text(context.get("text"), f"{at}.text'", may_be_blank=True),
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


def accepted_answers(answers: list[Any], at: str) -> tuple[str, ...]:
    """The distinct answers, stripped, in order.

    Raises:
        RecordError: one is blank or no text.
    """
    return tuple(dict.fromkeys(parse_text(answer, at).strip() for answer in answers))


def _parse_multi_hop(record: Any, source: str, *, between: str) -> Question:
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    question = parse_text(get_field(record, "question"), "field 'question'")
    answers = accepted_answers([get_field(record, "answer")], "field 'answer'")
    id = parse_text(get_field(record, "_id" if "_id" in record else "id"), "field '_id'")
    supporting = {title for title, _ in _pairs(record, "supporting_facts", "title", "sent_id")}
    documents = []
    for i, (title, sentences) in enumerate(_pairs(record, "context", "title", "sentences")):
        at = f"field 'context[{i}]'"
        is_text = isinstance(sentences, list) and all(type(s) is str for s in sentences)
        check_field(is_text, at, sentences, "hold sentences")
        documents.append(
            Document(
                title=parse_text(title, at, may_be_blank=True),
                text=parse_text(between.join(sentences), at, may_be_blank=True),
                relevance=int(title in supporting),
                supports=title in supporting,
            )
        )
    meta = {name: record[name] for name in ("type", "level") if record.get(name) is not None}
    return Question(
        id=id, source=source, question=question, answers=answers, documents=tuple(documents), meta=meta
    )


def _list(record: Mapping[str, Any], name: str, default: Any = ...) -> list[Any]:
    found = get_field(record, name, default)
    if found is default:
        return []
    check_field(isinstance(found, list), f"field {name!r}", found, "be a list")
    return list(found)


def _contexts(record: Mapping[str, Any], name: str, default: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The documents of a field, each with its place, which waits for the closing quote."""
    named = [(f"field '{name}[{i}]", context) for i, context in enumerate(_list(record, name, default))]
    for at, context in named:
        check_field(isinstance(context, Mapping), f"{at}'", context, "be a JSON object")
    return named


def _dpr_contexts(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Positive and negative documents, the first positive one marked as gold; scores are of several kinds."""
    positive, *negative = (
        _contexts(record, name, []) for name in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
    )
    if not positive:
        raise RecordDropped(NO_POSITIVE)
    return [
        (at, {k: context[k] for k in ("title", "text") if k in context} | {"isgold": i == 0})
        for i, (at, context) in enumerate(chain(positive, *negative))
    ]


def _score(context: Mapping[str, Any], at: str) -> float | None:
    """The retriever's score, a number or the text of one."""
    found = context.get("score")
    if found is None:
        return None
    try:
        score = float(found)
    except (TypeError, ValueError):
        score = math.nan
    check_field(math.isfinite(score) and type(found) is not bool, at, found, "be a number")
    return score


def _pairs(record: Mapping[str, Any], name: str, first: str, second: str) -> list[tuple[Any, Any]]:
    """A list of pairs, spelt as such, as a mapping of two lists, or as the text of its JSON."""
    found = get_field(record, name)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (RecursionError, ValueError):
            check_field(False, f"field {name!r}", found, "be a list or the text of one in JSON")
    if (
        isinstance(found, Mapping)
        and isinstance(found.get(first), list)
        and isinstance(found.get(second), list)
    ):
        num_first, num_second = len(found[first]), len(found[second])
        rule = f"hold as many {first} as {second}, not {num_first} and {num_second}"
        check_field(num_first == num_second, f"field {name!r}", found, rule)
        found = list(zip(found[first], found[second], strict=True))
    rule = f"be a list of pairs ({first}, {second})"
    check_field(
        isinstance(found, list) and all(_is_pair(pair) for pair in found), f"field {name!r}", found, rule
    )
    return [(pair[0], pair[1]) for pair in found]


def _is_pair(found: Any) -> bool:
    return isinstance(found, list | tuple) and len(found) == 2 and isinstance(found[0], str)
