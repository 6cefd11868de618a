"""Public layouts of records with their columns, and columns that would fit a record of another layout."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from blockft.data.column_formats import ANSWER_FIELDS, expand_questions, parse_chat, parse_question
from blockft.data.column_path import MISSING, decode_container, find_value, flatten, write_name
from blockft.data.columns import Columns, absent_paths, build_columns
from blockft.data.fields import SYSTEM_FIELDS, standard_name
from blockft.data.sample import EVIDENCE_MARKS, RecordDropped, RecordError, is_list

Mapped = dict[str, str | list[str]]
"""Columns as a recipe writes them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A public layout.

    Attributes:
        name: the data set or the program that writes it.
        record: the shape of a record, for documentation.
        columns: the columns that read it.
        recognized_by: paths that every record of the layout has.
        corpus: the shape of a document, if the documents are apart.
    """

    name: str
    record: str
    columns: Mapped
    recognized_by: tuple[str, ...]
    corpus: str = ""


LAYOUTS = (
    Layout(
        name="TriviaQA (`rc`)",
        record='{"question_id", "question", "answer": {"value", "aliases": []}, "search_results": '
        '{"title": [], "search_context": []}, "entity_pages": {"title": [], "wiki_context": []}}',
        columns={
            "id": "question_id",
            "question": "question",
            "documents": ["search_results", "entity_pages"],
            "text": ["search_context", "wiki_context"],
            "answers": ["answer.value", "answer.aliases"],
        },
        recognized_by=("question", "answer.value", "search_results.search_context"),
    ),
    Layout(
        name="MS MARCO 2.1",
        record='{"query", "answers": [], "passages": {"is_selected": [], "passage_text": [], "url": []}}',
        columns={
            "question": "query",
            "documents": "passages.passage_text",
            "supporting": "passages.is_selected",
            "answers": "answers",
        },
        recognized_by=("query", "answers", "passages.passage_text", "passages.is_selected"),
    ),
    Layout(
        name="KILT with passages",
        record='{"id", "input", "output": [{"answer", "provenance": [{"title", "text"}]}]}',
        columns={
            "id": "id",
            "question": "input",
            "documents": "output.provenance",
            "answers": "output.answer",
        },
        recognized_by=("input", "output.answer", "output.provenance"),
    ),
    Layout(
        name="RAFT",
        record='{"question", "context": {"title": [[]], "sentences": [[]]}, "oracle_context", "cot_answer"}',
        columns={
            "question": "question",
            "documents": "context.sentences",
            "supporting": "oracle_context",
            "response": "cot_answer",
        },
        recognized_by=("question", "context.sentences", "oracle_context", "cot_answer"),
    ),
    Layout(
        name="MRQA",
        record='{"context", "qas": [{"qid", "question", "answers": []}]}',
        columns={
            "id": "qas.qid",
            "question": "qas.question",
            "documents": "context",
            "answers": "qas.answers",
        },
        recognized_by=("context", "qas.question", "qas.answers"),
    ),
    Layout(
        name="KVLink",
        record='{"question", "answers": [], "generated", "documents": [{"title", "text", "score"}]}',
        columns={
            "question": "question",
            "documents": "documents",
            "score": "score",
            "answers": "answers",
            "response": "generated",
        },
        recognized_by=("question", "answers", "generated", "documents.text"),
    ),
    Layout(
        name="FlashRAG, with `corpus` and `retriever`",
        record='{"id", "question", "golden_answers": []}',
        corpus='{"title", "content"} or {"id", "contents"}',
        columns={"id": "id", "question": "question", "answers": "golden_answers"},
        recognized_by=("question", "golden_answers"),
    ),
    Layout(
        name="Dolly",
        record='{"instruction", "context", "response", "category"}',
        columns={"prompt": ["instruction", "context"], "completion": "response"},
        recognized_by=("instruction", "context", "response"),
    ),
    Layout(
        name="TRL (texts or lists of messages)",
        record='{"prompt", "completion"}',
        columns={"prompt": "prompt", "completion": "completion"},
        recognized_by=("prompt", "completion"),
    ),
    Layout(
        name="a table (CSV, TSV, parquet)",
        record='{"q", "a", "passage_1", "passage_2", ...}',
        columns={"question": "q", "documents": "passage_*", "answers": "a"},
        recognized_by=("q", "a", "passage_*"),
    ),
)
"""The layouts, the most specific first. A layout is recognised by the fields of a record."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


QUESTION_NAMES = _names(
    "question query q user_query user_question user_input input prompt problem ambiguous_question"
)
ANSWER_NAMES = _names(
    "answers answer a golden_answers gold_answers gold_answer ground_truths ground_truth short_answers "
    "targets target reference_answer expected_answer reference references gold output outputs response "
    "solution correct_answer possible_answers answers_spans long_answer"
)
DOCUMENT_NAMES = _names(
    "documents docs passages contexts ctxs chunks paragraphs retrieved_contexts retrieved_documents "
    "retrieval_result search_results results evidences evidence document doc passage context chunk paragraph "
    "support story"
)
TEXT_NAMES = _names(
    "text contents content passage_text page_content document_text chunk_text paragraph_text body snippet "
    "passage context contexts chunk paragraph sentences search_context wiki_context"
)
TITLE_NAMES = _names("title passage_title document_title page_title heading")
SCORE_NAMES = _names("score similarity relevance relevance_score")
MESSAGES_NAMES = _names("messages conversations conversation chat dialog dialogue turns")
PROMPT_NAMES = _names("prompt instruction input question query user user_prompt")
COMPLETION_NAMES = _names("completion response output answer assistant target reply model_output")
"""Names by which fields of unknown layouts are recognised, the most telling first."""


def suggest_columns(record: Any, *, has_corpus: bool = False) -> str:
    """Return the columns that would read a record, as a recipe writes them; "" if none are known.

    The columns are tried on the record: those that are returned read it. For questions without documents, the
    setting of the corpus follows, whose file the user fills in. `has_corpus` says that the source has a
    corpus, so that its records are questions.
    """
    if not isinstance(record, Mapping):
        return ""
    candidates = map(partial(_without_absent, record), _candidates(record, has_corpus))
    try:
        fitting = next((candidate for candidate in candidates if _reads(candidate, record)), None)
    except RecursionError:  # the record is nested too deeply
        fitting = None
    if fitting is None:
        return ""
    needs_corpus = "question" in fitting and "documents" not in fitting and not has_corpus
    return format_columns(fitting) + (", corpus: FILE_OF_DOCUMENTS, retriever: bm25" if needs_corpus else "")


def mrqa_columns() -> str:
    """Return the columns of MRQA, whose files begin with a header instead of a record."""
    return next(format_columns(layout.columns) for layout in LAYOUTS if layout.name == "MRQA")


def format_columns(columns: Mapped) -> str:
    """Return columns as YAML in one line: `{question: query, answers: "qas[].answers"}`."""
    names = sorted(columns, key=[field.name for field in fields(Columns)].index)
    return f"{{{', '.join(f'{name}: {_format_value(columns[name])}' for name in names)}}}"


def _format_value(value: str | list[str]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_format_value, value))}]"
    is_plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.*-]*", value)
    is_word = value.lower() in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    escaped = re.sub(r"\$\{", r"\\${", value)
    return value if is_plain and not is_word else json.dumps(escaped, ensure_ascii=False)


def _candidates(record: Mapping[str, Any], has_corpus: bool) -> Iterator[Mapped]:
    """Yield columns that may read a record. Those that read documents of the record stand before others."""
    known = [
        layout
        for layout in LAYOUTS
        if all(_has(record, path) for path in layout.recognized_by)
        and (not has_corpus or "question" in layout.columns)
    ]
    guessed = list(_guess_questions(record, has_corpus))
    yield from (dict(layout.columns) for layout in known if not layout.corpus)
    yield from (columns for columns in guessed if "documents" in columns)
    yield from (dict(layout.columns) for layout in known if layout.corpus)
    yield from guessed or _guess_chats(record)


def _without_absent(record: Mapping[str, Any], columns: Mapped) -> Mapped:
    """Return the columns without paths that the record does not have."""
    absent = absent_paths(build_columns(columns), record)
    kept = {
        name: [path for path in value if (name, path) not in absent] if isinstance(value, list) else value
        for name, value in columns.items()
        if isinstance(value, list) or (name, value) not in absent
    }
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in kept.items()
        if value
    }


def _has(record: Mapping[str, Any], path: str) -> bool:
    try:
        return find_value(record, path) is not MISSING
    except RecordError:
        return False


def _reads(columns: Mapped, record: Mapping[str, Any]) -> bool:
    """Return whether the columns read a record into at least one question or chat."""
    if not ({"question", "messages"} & columns.keys() or {"prompt", "completion"} <= columns.keys()):
        return False
    mapping = build_columns(columns)
    try:
        if not mapping.is_question:
            return bool(list(parse_chat(mapping, record, "id")))
        parts = list(expand_questions(mapping, iter([("", record)])))
        for _, part in parts:
            if isinstance(part, RecordError):
                raise part
            try:
                parse_question(mapping, part)
            except RecordDropped:
                continue
        return bool(parts)
    except RecordDropped:
        return True
    except RecordError:
        return False


def _guess_questions(record: Mapping[str, Any], has_corpus: bool) -> Iterator[Mapped]:
    """Yield columns of questions by the names of the fields.

    A question without documents needs a corpus or several answers: with one answer, it is taken as a prompt.
    """
    names = {standard_name(name): write_name(name) for name in record if isinstance(name, str)}
    question = next((names[name] for name in QUESTION_NAMES if name in names), None)
    answers = next((names[n] for n in ANSWER_NAMES if n in names and names[n] != question), None)
    if not question or not answers:
        return
    known = {
        "question": _path_of_text(record, question, ("text", "question", "input_text")),
        "answers": _path_of_text(record, answers, ANSWER_FIELDS),
    }
    ids = {"id": names["id"]} if "id" in names else {}
    for documents in _guess_documents(record, names):
        for optional in ({**ids, **_guess_cited(record, documents)}, {}):
            yield {**optional, **known, **documents}
    if has_corpus or is_list(find_value(record, answers)) or known["answers"].endswith("[]"):
        yield {**ids, **known}


def _guess_cited(record: Mapping[str, Any], documents: Mapped) -> Mapped:
    """Return the column of the titles of supporting documents, as HotpotQA names it."""
    path = _path_of_text(record, "supporting_facts", ("title",))
    return {"supporting": path} if _has(record, path) and "supporting" not in documents else {}


def _path_of_text(record: Mapping[str, Any], path: str, fields: Sequence[str]) -> str:
    """Return the path of the texts in a field: inside of it, if it holds objects with one of these fields."""
    value = find_value(record, path)
    if isinstance(value, str):
        value = decode_container(value)
    element = next((e for e in flatten(value) if isinstance(e, Mapping)), {})
    inner = next((name for name in fields if name in element), None)
    return f"{path}.{inner}" if inner else _as_list(record, path)


def _guess_documents(record: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[Mapped]:
    for name in DOCUMENT_NAMES:
        if name in names:
            yield _guess_inside(record, names[name])
    for name in (n for n in names if "positive" in n and _negative(n) in names):
        documents: Mapped = {"documents": [names[name], names[_negative(name)]]}
        yield {**documents, "supporting": names[name]}
        yield documents
    numbered = (re.fullmatch(r"(.*?)[0-9]+", name) for name in record if isinstance(name, str))
    for prefix in dict.fromkeys(match[1] for match in numbered if match):
        stem = standard_name(prefix).strip("_")
        if stem in DOCUMENT_NAMES or f"{stem}s" in DOCUMENT_NAMES:
            yield {"documents": f"{write_name(prefix)}*"}


def _negative(name: str) -> str:
    """Return the name of the field of distractors beside that of supporting documents (RGB, Tevatron)."""
    return name.replace("positive", "negative")


def _guess_inside(record: Mapping[str, Any], path: str) -> Mapped:
    """Return the columns of documents in a field, with those of titles, scores and marks inside of it."""
    path = _as_list(record, path)
    element = next((e for e in flatten(find_value(record, path)) if isinstance(e, Mapping)), None)
    if element is None:
        return {"documents": path}
    names = {standard_name(name): write_name(name) for name in map(str, element)}

    def first(known: Any) -> str:
        return next((names[name] for name in known if name in names), "")

    found: Mapped = {"documents": path}
    for column, known, default in (
        ("title", TITLE_NAMES, "title"),
        ("text", TEXT_NAMES, "text"),
        ("score", SCORE_NAMES, ""),
        ("supporting", EVIDENCE_MARKS, ""),
    ):
        if (inner := first(known)) and inner != default:
            found[column] = inner
    return found


def _guess_chats(record: Mapping[str, Any]) -> Iterator[Mapped]:
    """Yield columns of chats, or of a prompt and its completion, by the names of the fields."""
    names = {standard_name(name): write_name(name) for name in record if isinstance(name, str)}
    system: Mapped = next(({"system": names[n]} for n in SYSTEM_FIELDS if n in names), {})
    for name in MESSAGES_NAMES:
        if name in names:
            yield {"messages": _as_list(record, names[name]), **system}
    prompt = next((names[name] for name in PROMPT_NAMES if name in names), None)
    completion = next((names[n] for n in COMPLETION_NAMES if n in names and names[n] != prompt), None)
    if prompt and completion:
        if {"instruction", "input"} <= names.keys():
            prompts = [names["instruction"], names["input"]]
            yield {"prompt": prompts, "completion": completion, **system}
        yield {"prompt": prompt, "completion": completion, **system}
        yield {"prompt": _as_list(record, prompt), "completion": _as_list(record, completion), **system}


def _as_list(record: Mapping[str, Any], path: str) -> str:
    """Return the path, with brackets if the field holds the text of a list."""
    value = find_value(record, path)
    return f"{path}[]" if isinstance(value, str) and is_list(decode_container(value)) else path
