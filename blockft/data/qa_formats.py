"""Question formats: parsers of HotpotQA, 2WikiMultihopQA, MuSiQue, and the files of FiD and DPR."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from blockft.data.document_pool import DocumentPool, normalize_text
from blockft.data.json_stream import decode_json
from blockft.data.rag_prompt import Document
from blockft.data.sample import (
    ANSWER_MARKS,
    ANSWERABLE_FLAGS,
    EVIDENCE_MARKS,
    GOLD_MARKS,
    NO_EVIDENCE,
    UNANSWERABLE_FLAGS,
    RecordDropped,
    check_field,
    get_field,
    parse_flag,
    parse_id,
    parse_text,
)

NO_ANSWER = "no answer"
"""The reason for dropping a question that is marked as not answerable, or has no answer."""

PART_OF_EVIDENCE = "a supporting document is missing"
"""The reason for not training on a question that needs several documents and lacks one of them."""

NO_POSITIVE = "no positive document"
"""The reason for not training on a question of DPR's training files that has negative documents only."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its accepted answers, and its own documents.

    `response` is the text to learn; if it is empty, the first answer is. Distractors may be taken from
    `pool`. The reader of a source replaces an empty `id`.

    `missing_evidence` says why the documents are known not to support the answer. Such a question would teach
    a model to invent answers. It is empty if they do, or if the record does not say which documents do.

    `has_position` asks for the place of the evidence in the prompt as `meta.level`.
    """

    id: str
    source: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    response: str = ""
    pool: DocumentPool | None = None
    missing_evidence: str = ""
    has_position: bool = False
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
    id = parse_id(get_field(record, "id"), "field 'id'")
    check_answerable(record)
    aliases = _list(record, "answer_aliases", [])
    documents = []
    for i, paragraph in enumerate(_list(record, "paragraphs")):
        field_name = f"field 'paragraphs[{i}]"
        check_field(isinstance(paragraph, Mapping), f"{field_name}'", paragraph, "be a JSON object")
        supports = parse_flag(paragraph, "is_supporting", False, path=f"paragraphs[{i}].")
        title = get_field(paragraph, "title", "")
        documents.append(
            Document(
                title=parse_text(title, f"{field_name}.title'", may_be_blank=True),
                text=parse_text(
                    get_field(paragraph, "paragraph_text", path=f"paragraphs[{i}]."),
                    f"{field_name}.paragraph_text'",
                    may_be_blank=True,
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
        answers=accepted_answers(_placed(record, "answer", aliases)),
        documents=tuple(documents),
        missing_evidence=_missing_evidence(documents),
        meta={"type": hops[0]} if hops else {},
    )


def parse_fid(record: Any) -> Question:
    """Parse a question with retrieved passages (NQ, TriviaQA and others), as FiD and DPR write them.

    ::

        {"id": 7, "question": "who?", "answers": ["the fox", "a fox"],
         "ctxs": [{"title": "B", "text": "One.", "score": 2.5, "hasanswer": true}, ...]}
        -> answers ("the fox", "a fox"), one document per passage, relevance 2.5

    `target`, if present, is the response. The relevance of a passage is its `score`. If a passage has no
    score, the passages marked as gold (`isgold` or others of `GOLD_MARKS`) have relevance 1 and all others 0;
    without such a mark the relevance falls in the order of the file. Passages marked as gold support the
    answer; without such a mark the first passage marked `hasanswer` does. If passages are marked, but none as
    gold or as having the answer, or if there are none, no document supports the answer.

    DPR's training files have `positive_ctxs`, `hard_negative_ctxs` and `negative_ctxs` in place of `ctxs`.
    The first positive passage counts as gold, and scores are ignored, as they are not comparable.

    Raises:
        RecordDropped: the record has no answer.
        RecordError: a field is missing or has the wrong type.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    check_answerable(record)
    id = get_field(record, "id", get_field(record, "_id", None))
    answers = _fid_answers(record)
    if not answers:
        raise RecordDropped(NO_ANSWER)
    is_dpr = record.get("positive_ctxs") is not None and not record.get("ctxs")
    is_one = is_dpr or not record.get("positive_ctxs")
    check_field(is_one, "the record", list(record), "have either 'ctxs' or 'positive_ctxs'")
    passages = _dpr_passages(record) if is_dpr else _passages(record, "ctxs", ...)
    gold = _marked(passages, GOLD_MARKS)
    has_answer = sorted(_marked(passages, ANSWER_MARKS))
    supporting = gold or {*has_answer[:1]}
    scores = [_score(passage, f"field '{path}.score'") for path, passage in passages]
    documents = []
    for i, (path, passage) in enumerate(passages):
        score = scores[i] if None not in scores else int(i in gold) if gold else -i
        documents.append(
            Document(
                title=parse_text(get_field(passage, "title", ""), f"field '{path}.title'", may_be_blank=True),
                text=parse_text(
                    get_field(passage, "text", path=f"{path}."), f"field '{path}.text'", may_be_blank=True
                ),
                relevance=score or 0,
                supports=i in supporting,
            )
        )
    is_marked = any(p.get(mark) is not None for _, p in passages for mark in EVIDENCE_MARKS)
    missing = NO_POSITIVE if is_dpr else NO_EVIDENCE
    return Question(
        id="" if id is None else parse_id(id, "field 'id'"),
        source="fid",
        question=parse_text(get_field(record, "question"), "field 'question'"),
        answers=accepted_answers(answers),
        documents=tuple(documents),
        missing_evidence=missing if _missing_evidence(documents, may_be_unknown=not is_marked) else "",
    )


def accepted_answers(answers: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """Return the distinct answers, stripped, in order. Each is given with the path of its field.

    Raises:
        RecordError: an answer is blank or not a text.
    """
    return tuple(dict.fromkeys(parse_text(answer, f"field {path!r}").strip() for path, answer in answers))


def check_answerable(record: Mapping[str, Any], *, path: str = "") -> None:
    """Check that no field says that the question has no answer (`answerable`, `is_impossible`, ...).

    Raises:
        RecordDropped: a field says so.
    """
    flags = [parse_flag(record, name, True, path=path) for name in ANSWERABLE_FLAGS]
    flags += [not parse_flag(record, name, False, path=path) for name in UNANSWERABLE_FLAGS]
    if not all(flags):
        raise RecordDropped(NO_ANSWER)


def _missing_evidence(documents: Iterable[Document], *, may_be_unknown: bool = False) -> str:
    """Return why the documents do not support the answer; "" if one does that has a text.

    may_be_unknown: documents of which none is marked may all support the answer.
    """
    has_text = [document for document in documents if document.text.strip()]
    is_supported = any(document.supports for document in has_text)
    return "" if is_supported or may_be_unknown and has_text else NO_EVIDENCE


def _placed(record: Mapping[str, Any], name: str, aliases: list[Any]) -> list[tuple[str, Any]]:
    """Return the answer of a record and its aliases, each with the path of its field."""
    placed = [(f"answer_aliases[{i}]", alias) for i, alias in enumerate(aliases)]
    return [(name, get_field(record, name)), *placed]


def _fid_answers(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the target and the answers of a record, each with the path of its field."""
    answers = []
    for name in ("target", "answer", "answers"):
        value = get_field(record, name, None)
        if isinstance(value, list):
            answers += [(f"{name}[{i}]", text) for i, text in enumerate(value)]
        elif value is not None:
            answers.append((name, value))
    if all(get_field(record, name, None) is None for name in ("target", "answer")):
        get_field(record, "answers")  # raises if all three are missing
    return answers


def _marked(passages: list[tuple[str, Mapping[str, Any]]], marks: Sequence[str]) -> set[int]:
    """Return the indices of the passages that have a true field of `marks`."""
    return {
        i
        for i, (path, passage) in enumerate(passages)
        for mark in marks
        if passage.get(mark) is not None and parse_flag(passage, mark, False, path=f"{path}.")
    }


def _parse_multi_hop(record: Any, source: str, *, separator: str) -> Question:
    """Parse a record in the layout of HotpotQA; `separator` joins the sentences of a paragraph."""
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    check_answerable(record)
    question = parse_text(get_field(record, "question"), "field 'question'")
    answers = accepted_answers(_placed(record, "answer", _list(record, "answer_aliases", [])))
    id_name = "id" if record.get("_id") is None and record.get("id") is not None else "_id"
    id = parse_id(get_field(record, id_name), f"field {id_name!r}")
    context = _pairs(record, "context", "title", "sentences")
    cited = {title for title, _ in _pairs(record, "supporting_facts", "title", "sent_id")}
    supporting_titles, num_missing = _titles_in_context(cited, [title for title, _ in context])
    documents = []
    for i, (title, sentences) in enumerate(context):
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
    names = [name for name in ("type", "level") if record.get(name) is not None]
    return Question(
        id=id,
        source=source,
        question=question,
        answers=answers,
        documents=tuple(documents),
        missing_evidence=_missing_evidence(documents) or (PART_OF_EVIDENCE if num_missing else ""),
        meta={name: _parse_kind(record[name], name) for name in names},
    )


def _parse_kind(value: Any, name: str) -> str | int:
    """Return the kind or the level of a question, which is a text or a whole number."""
    if type(value) is int:
        return value
    return parse_text(value, f"field {name!r}", may_be_blank=True)


def _titles_in_context(cited: set[str], titles: list[str]) -> tuple[set[str], int]:
    """Return the titles of paragraphs that supporting facts cite, and the number of other cited titles.

    A cited title that no paragraph has is looked up again without regard to case, white space and variants of
    characters.
    """
    found = cited.intersection(titles)
    missing = cited - found
    if missing:
        missing = {normalize_text(title) for title in missing}
        normalized = {title: normalize_text(title) for title in titles}
        found |= {title for title, text in normalized.items() if text in missing}
        missing -= {*normalized.values()}
    return found, len(missing)


def _list(record: Mapping[str, Any], name: str, default: Any = ...) -> list[Any]:
    value = get_field(record, name, default)
    check_field(isinstance(value, list), f"field {name!r}", value, "be a list")
    return list(value)


def _passages(record: Mapping[str, Any], name: str, default: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the passages of a field, each with its path."""
    passages = [(f"{name}[{i}]", passage) for i, passage in enumerate(_list(record, name, default))]
    for path, passage in passages:
        check_field(isinstance(passage, Mapping), f"field {path!r}", passage, "be a JSON object")
    return passages


def _dpr_passages(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return positive and negative passages without scores; the first positive one is marked as gold."""
    positive, *negative = (
        _passages(record, name, []) for name in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
    )
    return [
        (
            path,
            {k: passage[k] for k in ("title", "text") if k in passage}
            | {"isgold": i == 0 and bool(positive)},
        )
        for i, (path, passage) in enumerate(chain(positive, *negative))
    ]


def _score(passage: Mapping[str, Any], field_name: str) -> float | None:
    """Return the retriever's score, which may be a number or its text; None if there is none."""
    value = passage.get("score")
    if value is None:
        return None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    check_field(math.isfinite(score) and type(value) is not bool, field_name, value, "be a number")
    return score


def _pairs(record: Mapping[str, Any], name: str, first: str, second: str) -> list[tuple[Any, Any]]:
    """Return a field as a list of pairs.

    The field may hold a list of pairs, a list of objects with the keys `first` and `second`, an object of two
    lists under these keys, or any of them as JSON text.
    """
    value = get_field(record, name)
    if isinstance(value, str):
        try:
            value = decode_json(value)
        except ValueError:
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
    if isinstance(value, list) and all(isinstance(v, Mapping) and {first, second} <= v.keys() for v in value):
        value = [(pair[first], pair[second]) for pair in value]
    are_pairs = isinstance(value, list) and all(_is_pair(pair) for pair in value)
    check_field(are_pairs, f"field {name!r}", value, f"be a list of pairs ({first}, {second})")
    return [(pair[0], pair[1]) for pair in value]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)
