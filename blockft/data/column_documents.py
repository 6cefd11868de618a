"""Documents of records with any fields: texts, objects, parallel lists and numbered fields."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockft.data.column_path import (
    MISSING,
    Numbered,
    decode_container,
    find_value,
    flatten,
    similar_paths,
)
from blockft.data.columns import Columns
from blockft.data.document_pool import contains_answer, normalize_text
from blockft.data.qa_formats import PART_OF_EVIDENCE
from blockft.data.rag_prompt import Document
from blockft.data.sample import NO_EVIDENCE, check_field, is_list, is_number, parse_text

DEFAULT_TITLE = ("title",)
DEFAULT_TEXT = ("text", "contents", "content")
"""The fields of a document that hold its title and its text, unless a mapping names others."""

_WRITTEN_ARRAY = re.compile(
    r"""\[\s*(?:['"].*['"]|\{.*\}|array\(\[.*\))\s*\]\Z|\{.*\barray\(\[.*\}\Z""", re.DOTALL
)
"""The text of a list or an object that neither JSON nor Python can read, as str() of NumPy arrays is."""

_LIST_RULE = "be a list, and is the text of one: name it {}[], which reads such a text"

TRUE_TEXTS, FALSE_TEXTS = ("1", "true"), ("0", "false")
"""Texts in lower case that tables hold for true and false."""


@dataclass(frozen=True, kw_only=True)
class _Passage:
    """A document as a record holds it.

    `flag` says whether it supports the answer; it is None if the record does not say so. `number` is its
    place in the list of documents, or the number of its column.
    """

    title: str
    text: str
    score: float | None
    flag: bool | None
    number: int


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a document stands: the path of the documents, its own path, and its number."""

    documents: str
    path: str
    number: int


def parse_documents(
    columns: Columns, record: Mapping[str, Any], answers: Sequence[str]
) -> tuple[tuple[Document, ...], str]:
    """Return the documents of a record, and why they are known not to support the answers; "" if they may.

    Documents of equal title and text are one document. Their relevance is the score; without scores,
    documents that support the answer have relevance 1 and all others 0; if none is known to, the relevance
    falls in the order of the record.

    Raises:
        RecordError: a document, or what is said about it, has the wrong type.
    """
    passages = _passages(columns, record)
    is_known, num_missing = True, 0
    if columns.supporting_contains_answer:
        passages = [replace(p, flag=contains_answer(normalize_text(p.text), answers)) for p in passages]
    elif any(passage.flag is not None for passage in passages):
        pass
    elif (cited := _cited(columns, record)) is not None:
        passages, num_missing = _mark_cited(passages, cited)
    else:
        is_known = False
    documents = _documents(passages)
    with_text = [document for document in documents if document.text.strip()]
    if not columns.documents:
        missing = ""  # the documents come from a corpus, or there shall be none
    elif not with_text or is_known and not any(document.supports for document in with_text):
        missing = NO_EVIDENCE
    else:
        missing = PART_OF_EVIDENCE if num_missing else ""
    return documents, missing


def parse_scalar(value: Any, path: str, *, may_be_blank: bool = False) -> str:
    """Return a text; a whole number, as tables may hold one, becomes its digits."""
    if type(value) is int:
        value = str(value)
    return parse_text(value, f"field {path!r}", may_be_blank=may_be_blank)


def refuse_written_value(value: Any, path: str, inner: Sequence[str]) -> None:
    """Check that a text is not the written form of a list, or of an object with one of the fields `inner`.

    A list of numbers may be a text, such as an interval, and so may any other object.

    Raises:
        RecordError: it is such a text, or that of a NumPy array, whose texts cannot be told apart.
    """
    if not isinstance(value, str) or not (text := value.strip()).startswith(("[", "{")):
        return
    decoded = decode_container(text)
    is_array = decoded is None and _WRITTEN_ARRAY.match(text) is not None
    rule = "be a list, and is the text of one of NumPy or pandas: save the table as parquet or JSON lines"
    check_field(not is_array, f"field {path!r}", value, rule)
    has_texts = is_list(decoded) and not all(map(is_number, decoded or ()))
    check_field(not has_texts, f"field {path!r}", value, _LIST_RULE.format(path))
    known = [name for name in inner if isinstance(decoded, Mapping) and name in decoded]
    rule = f"be a text, and is that of an object: name a field inside it, such as {path}.{''.join(known[:1])}"
    check_field(not known, f"field {path!r}", value, rule)


def _passages(columns: Columns, record: Mapping[str, Any]) -> list[_Passage]:
    """Return the documents of a record in order, with those that have no text."""
    beside = {
        "title": first_value(record, columns.title),
        "score": first_value(record, (columns.score,)),
        "flag": find_value(record, columns.supporting) if columns.supporting else MISSING,
    }
    flags = flatten(beside["flag"])
    if not flags or any(read_flag(flag) is None for flag in flags):
        del beside["flag"]  # it holds titles or texts of documents, or lies inside the documents
    beside = {name: value for name, value in beside.items() if value is not MISSING}
    found: list[_Passage] = []
    for path in columns.documents:
        value = find_value(record, path)
        refuse_written_value(value, path, columns.text or DEFAULT_TEXT)
        found += _walk(columns, value, beside, _Place(documents=path, path=path, number=len(found)))
    return found


def _walk(
    columns: Columns, value: Any, beside: Mapping[str, Any], place: _Place, *, in_list: bool = False
) -> Iterator[_Passage]:
    """Yield the documents that a value holds: a text, an object, or a list or numbered fields of them.

    `beside` holds titles, scores and flags that lie parallel to the value. One title belongs to all texts of
    a list. A list of texts inside a list is one document if it has one title: the texts are its sentences. So
    is a pair of a title and its sentences, as HotpotQA writes it.
    """
    if value is None or value is MISSING:
        return
    if isinstance(value, Mapping) and not isinstance(value, Numbered):
        yield from _walk_object(columns, value, beside, place, in_list=in_list)
    elif isinstance(value, Numbered):
        for name, other in beside.items():
            is_numbered = isinstance(other, Numbered) or name == "title" and not is_list(other)
            check_field(is_numbered, f"the {name} of the documents", other, "be in numbered fields, too")
        for number, element in value.items():
            inner = {
                n: other.get(number) if isinstance(other, Numbered) else other for n, other in beside.items()
            }
            yield from _walk(columns, element, inner, replace(place, number=number))
    elif not is_list(value):
        yield _passage(value, beside, place)
    elif in_list and isinstance(beside.get("title"), str) and all(isinstance(part, str) for part in value):
        yield _passage(_join_sentences(value), beside, place)
    elif in_list and _is_titled(value):
        yield _passage(_join_sentences(value[1]), {**beside, "title": value[0]}, place)
    else:
        yield from _walk_list(columns, value, beside, place)


def _is_titled(value: Sequence[Any]) -> bool:
    """Return whether a list is a title and a list of sentences."""
    return (
        len(value) == 2
        and isinstance(value[0], str)
        and is_list(value[1])
        and all(isinstance(sentence, str) for sentence in value[1])
    )


def _walk_list(
    columns: Columns, value: Sequence[Any], beside: Mapping[str, Any], place: _Place
) -> Iterator[_Passage]:
    has_objects = any(isinstance(element, Mapping) for element in value)
    is_mixed = any(isinstance(element, str) for element in value) and any(map(is_list, value))
    check_field(not is_mixed, f"field {place.path!r}", value, "not hold both texts and lists")
    number = place.number
    for name, other in beside.items():
        is_shared = name == "title" and not is_list(other) or other is None
        is_parallel = is_list(other) and len(other) == len(value)
        rule = f"be a list of {len(value)}, as {place.path!r} is"
        check_field(
            is_shared or is_parallel or has_objects and not is_list(other), f"the {name}", other, rule
        )
    for i, element in enumerate(value):
        parallel = {
            name: other[i] if is_list(other) else None if has_objects else other
            for name, other in beside.items()
        }
        inner = replace(place, path=f"{place.path}[{i}]", number=number)
        found = list(_walk(columns, element, parallel, inner, in_list=True))
        yield from found or [_Passage(title="", text="", score=None, flag=None, number=number)]
        number += max(1, len(found))


def _walk_object(
    columns: Columns, value: Mapping[str, Any], beside: Mapping[str, Any], place: _Place, *, in_list: bool
) -> Iterator[_Passage]:
    """Yield the document of an object, or the documents of an object of parallel lists."""

    def inside(*paths: str) -> list[str]:
        return [path.removeprefix(f"{place.documents}.") for path in paths if path]

    text_paths = inside(*(columns.text or DEFAULT_TEXT))
    text = first_value(value, text_paths)
    if text is MISSING:
        close = similar_paths(text_paths[0], value)[:1]
        hint = f"; did you mean columns.text={close[0]}?" if close else ""
        rule = f"have the field {' or '.join(text_paths)} (columns.text){hint}"
        check_field(False, f"the document {place.path!r}", [*map(str, value)], rule)
    own = {
        "title": first_value(value, inside(*(columns.title or DEFAULT_TITLE))),
        "score": first_value(value, inside(columns.score)),
        "flag": first_value(value, inside(columns.supporting)),
    }
    beside = {**beside, **{name: found for name, found in own.items() if found is not MISSING}}
    if (
        in_list
        and is_list(text)
        and not is_list(beside.get("title"))
        and all(isinstance(t, str) for t in text)
    ):
        text = _join_sentences(text)
    if is_list(text):
        yield from _walk(columns, text, beside, replace(place, path=f"{place.path}.{text_paths[0]}"))
    else:
        yield _passage("" if text is None else text, beside, place)


def _join_sentences(sentences: Sequence[str]) -> str:
    return " ".join(sentence.strip() for sentence in sentences)


def _passage(text: Any, beside: Mapping[str, Any], place: _Place) -> _Passage:
    title, score, flag = (beside.get(name) for name in ("title", "score", "flag"))
    is_flag = flag is None or read_flag(flag) is not None
    check_field(is_flag, f"the flag of the document {place.path!r}", flag, "be true or false")
    title_name = f"title of {place.path}"
    return _Passage(
        title="" if title is None else parse_scalar(title, title_name, may_be_blank=True),
        text=parse_scalar(text, place.path, may_be_blank=True),
        score=_score(score, place.path),
        flag=read_flag(flag),
        number=place.number,
    )


def first_value(record: Mapping[str, Any], paths: Sequence[str]) -> Any:
    """Return the value of the first path that the record has. A null counts if there is no other value."""
    found = [value for path in paths if path and (value := find_value(record, path)) is not MISSING]
    return next((value for value in found if value is not None), None if found else MISSING)


def read_flag(value: Any) -> bool | None:
    """Return a value that is true or false, 1 or 0, or the text of one; None for any other value."""
    if type(value) in (bool, int, float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and (text := value.strip().lower()) in TRUE_TEXTS + FALSE_TEXTS:
        return text in TRUE_TEXTS
    return None


def _score(value: Any, path: str) -> float | None:
    if value is None or isinstance(value, str) and not value.strip():
        return None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    check_field(
        math.isfinite(score) and type(value) is not bool,
        f"the score of the document {path!r}",
        value,
        "be a number",
    )
    return value if is_number(value) else score


def _cited(columns: Columns, record: Mapping[str, Any]) -> list[Any] | None:
    """Return the indices, titles or texts of the documents that support the answer; None if unknown."""
    for path in filter(None, (columns.supporting, columns.supporting_indices)):
        text = find_value(record, path)
        is_list_text = isinstance(text, str) and is_list(decode_container(text))
        check_field(not is_list_text, f"field {path!r}", text, _LIST_RULE.format(path))
    if columns.supporting_indices:
        value = find_value(record, columns.supporting_indices)
        if value in (None, MISSING):
            return None
        return [_index(index, columns.supporting_indices) for index in flatten(value)]
    value = find_value(record, columns.supporting) if columns.supporting else MISSING
    if value is None or value is MISSING:
        return None
    cited = _cited_titles(value)
    rule = "hold true or false for every document, or titles or texts of documents"
    check_field(all(isinstance(c, str) for c in cited), f"field {columns.supporting!r}", value, rule)
    return cited


def _cited_titles(value: Any) -> list[Any]:
    """Return the values of nested lists; of a pair of a title and the number of a sentence, the title."""
    if is_list(value) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
        return [value[0]]
    return (
        [inner for element in value for inner in _cited_titles(element)] if is_list(value) else flatten(value)
    )


def _index(value: Any, path: str) -> int:
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]{1,9})(\.0*)?\s*", value)):
        value = int(match[1])
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes whole numbers with gaps so
    check_field(type(value) is int, f"field {path!r}", value, "hold numbers of documents")
    return int(value)


def _mark_cited(passages: Sequence[_Passage], cited: Sequence[Any]) -> tuple[list[_Passage], int]:
    """Return the passages with their flags, and the number of citations that name none of them.

    Raises:
        RecordError: there is no document of a cited number.
    """
    numbers = {passage.number for passage in passages}
    for number in cited:
        is_known = isinstance(number, str) or number in numbers
        check_field(is_known, "the number of a document", number, f"be one of {sorted(numbers)}")
    wanted = {normalize_text(c) if isinstance(c, str) else c for c in cited} - {""}
    found = set()
    marked = []
    for passage in passages:
        keys = {passage.number, normalize_text(passage.title), normalize_text(passage.text)} & wanted
        found |= keys
        marked.append(replace(passage, flag=bool(keys)))
    return marked, len(wanted - found)


def _documents(passages: Sequence[_Passage]) -> tuple[Document, ...]:
    """Return the distinct documents of a record with their relevance."""
    scores = [passage.score for passage in passages if passage.text.strip()]
    has_scores = bool(scores) and None not in scores
    has_support = any(passage.flag for passage in passages)
    documents: dict[tuple[str, str], Document] = {}
    for i, passage in enumerate(passages):
        relevance = passage.score if has_scores else int(bool(passage.flag)) if has_support else -i
        document = Document(
            title=passage.title, text=passage.text, relevance=relevance or 0, supports=bool(passage.flag)
        )
        known = documents.get(document.key)
        if known is None and any(document.key):
            documents[document.key] = document
        elif known is not None and document.supports and not known.supports:
            documents[document.key] = replace(
                known, supports=True, relevance=max(known.relevance, document.relevance)
            )
    return tuple(documents.values())
