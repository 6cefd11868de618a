"""Questions and chats of records with any fields, which a mapping names (`columns`)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from blockft.data.chat_formats import Turn, parse_turns, samples_of_chat
from blockft.data.column_documents import parse_documents, parse_scalar, read_flag, refuse_written_value
from blockft.data.column_path import (
    MISSING,
    find_value,
    flatten,
    missing_field_error,
    parent_path,
    path_names,
    split_lists,
)
from blockft.data.columns import Columns, is_header
from blockft.data.document_pool import normalize_text
from blockft.data.fields import CHAT_MESSAGE
from blockft.data.qa_formats import NO_ANSWER, Question
from blockft.data.records import PlacedRecord
from blockft.data.sample import (
    ANSWERABLE_FLAGS,
    UNANSWERABLE_FLAGS,
    RecordDropped,
    RecordError,
    Sample,
    check_field,
    is_list,
    parse_id,
)

ANSWER_FIELDS = ("text", "texts", "value", "answer", "answers", "spans", "aliases", "input_text")
"""Fields by which the text of an object of answers is recognized, such as that of SQuAD in a table."""

_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
"""Start of the text of a list of messages."""


def expand_questions(columns: Columns, records: Iterator[PlacedRecord]) -> Iterator[PlacedRecord]:
    """Convert records into one record per question if the path of the question goes through lists.

    ::

        {"context": c, "qas": [{"question": q1}, {"question": q2}]}, question: qas.question
        -> {"context": c, "qas": [{"question": q1}]}   {"context": c, "qas": [{"question": q2}]}

    A first line that holds a header only (`{"header": ...}`, as in files of MRQA) is skipped.
    """
    for place, record in records:
        if isinstance(record, RecordError) or not isinstance(record, Mapping):
            yield place, record
        elif not (is_header(record) and place.endswith(", line 1")):
            yield from _questions_of_record(columns, place, record)


def _questions_of_record(columns: Columns, place: str, record: Mapping[str, Any]) -> Iterator[PlacedRecord]:
    parts = list(split_lists(record, columns.question))
    if len(parts) > 1:
        names = parts[0][1]
        outside = [
            (column, path)
            for column, path in columns.paths
            if column in ("id", "answers", "response") and path_names(path)[: len(names)] != names
        ]
        if outside:
            column, path = outside[0]
            error = RecordError(
                f"columns.{column} is {path!r}, it should lie in {'.'.join(names)!r} as columns.question "
                f"does: the list holds {len(parts)} questions"
            )
            error.record = record
            yield place, error
            return
    for inner, _, part in parts:
        yield f"{place}, {inner}" if inner else place, part


def parse_question(columns: Columns, record: Any) -> Question:
    """Parse a record into a question, its answers and its documents.

    The first answer is the response, unless `columns.response` names another text.

    Raises:
        RecordDropped: the record has no answer, or says that there is none.
        RecordError: a field is missing or has the wrong type.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    _check_answerable(columns, record)
    question = _single_text(record, "question", columns.question)
    answers = _answers(columns, record)
    response = _single_text(record, "response", columns.response) if columns.response else ""
    documents, missing_evidence = parse_documents(columns, record, answers)
    return Question(
        id=_id(columns, record, ""),
        source="columns",
        question=question,
        answers=answers,
        response=response,
        documents=documents,
        missing_evidence=missing_evidence,
    )


def parse_chat(columns: Columns, record: Any, default_id: str) -> Iterator[Sample]:
    """Parse a record into one sample per answer of a chat, or into the sample of a prompt and its completion.

    Several fields of `columns.prompt` are joined by blank lines; those without a text are left out. A prompt
    or a completion may be a list of messages, of which only those of the completion are learned.

    Raises:
        RecordDropped: no answer is to be learned.
        RecordError: a field is missing or has the wrong type.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    for name in ("label", "kto_tag"):
        rule = "be true or absent: the labels of preference data cannot be learned"
        label = record.get(name)
        is_false = label is False or isinstance(label, str) and label.strip().lower() == "false"
        check_field(not is_false, f"field {name!r}", label, rule)
    if columns.messages:
        turns = _messages(record, "messages", columns.messages)
    else:
        turns = _prompt_turns(columns, record) + _completion_turns(columns, record)
    system = find_value(record, columns.system) if columns.system else None
    system = "" if system in (None, MISSING) else parse_scalar(system, columns.system, may_be_blank=True)
    return samples_of_chat(_id(columns, record, default_id), "columns", system, turns)


def _prompt_turns(columns: Columns, record: Mapping[str, Any]) -> list[Turn]:
    values = [(path, find_value(record, path)) for path in columns.prompt]
    if all(value in (None, MISSING) for _, value in values):
        raise missing_field_error("prompt", columns.prompt[0], record)
    if len(values) == 1 and is_list(values[0][1]):
        turns = _messages(record, "prompt", values[0][0])
        return [replace(turn, is_learned=False) for turn in turns]
    for path, value in values:
        _refuse_written_messages(value, path)
    texts = [
        parse_scalar(value, path, may_be_blank=True) for path, value in values if value not in (None, MISSING)
    ]
    text = "\n\n".join(text for text in texts if text.strip())
    check_field(bool(text), f"field {columns.prompt[0]!r}", text, "not be blank")
    return [Turn(role="user", text=text, path=columns.prompt[0])]


def _completion_turns(columns: Columns, record: Mapping[str, Any]) -> list[Turn]:
    value = find_value(record, columns.completion)
    if value in (None, MISSING):
        raise missing_field_error("completion", columns.completion, record)
    if is_list(value):
        return _messages(record, "completion", columns.completion)
    _refuse_written_messages(value, columns.completion)
    text = parse_scalar(value, columns.completion)
    # raw completions begin with the space after their prompt, which a chat template replaces
    return [Turn(role="assistant", text=text.strip(), path=columns.completion)]


def _refuse_written_messages(value: Any, path: str) -> None:
    """Check that a text is not the written form of a list of messages; any other JSON may be a text.

    Raises:
        RecordError: it is such a text.
    """
    if isinstance(value, str) and _WRITTEN_MESSAGES.match(value):
        refuse_written_value(value, path, ())


def _messages(record: Mapping[str, Any], column: str, path: str) -> list[Turn]:
    value = find_value(record, path)
    if value in (None, MISSING):
        raise missing_field_error(column, path, record)
    refuse_written_value(value, path, ())
    if is_list(value):
        for i, message in enumerate(value):
            CHAT_MESSAGE.unknown_fields(message, path=f"{path}[{i}].")  # raises if a field is refused
    return parse_turns(value, path)


def _check_answerable(columns: Columns, record: Mapping[str, Any]) -> None:
    """Check that no flag of the record, or of the object that holds the question, says that it has no answer.

    Raises:
        RecordDropped: a flag says so.
    """
    objects = [record]
    if prefix := parent_path(columns.question):
        objects += [
            element for element in flatten(find_value(record, prefix)) if isinstance(element, Mapping)
        ]
    for element in objects:
        is_answerable = [read_flag(element.get(name)) is not False for name in ANSWERABLE_FLAGS]
        is_answerable += [read_flag(element.get(name)) is not True for name in UNANSWERABLE_FLAGS]
        if not all(is_answerable):
            raise RecordDropped(NO_ANSWER)


def _id(columns: Columns, record: Mapping[str, Any], default: str) -> str:
    found = flatten(find_value(record, columns.id)) if columns.id else []
    if not found or isinstance(found[0], str) and not found[0].strip():
        return default
    check_field(len(found) == 1, f"field {columns.id!r}", found, "be one id")
    return parse_id(found[0], f"field {columns.id!r}")


def _single_text(record: Mapping[str, Any], column: str, path: str) -> str:
    found = flatten(find_value(record, path))
    if not found:
        raise missing_field_error(column, path, record)
    check_field(len(found) == 1, f"field {path!r}", found, "be one text")
    return parse_scalar(found[0], path)


def _answers(columns: Columns, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the distinct answers of a record, stripped, without those that say that there is none.

    Raises:
        RecordDropped: no answer is left.
        RecordError: the record has none of the fields, or an answer is no text.
    """
    if not columns.answers:
        return ()
    values = [(path, find_value(record, path)) for path in columns.answers]
    if all(value is MISSING for _, value in values):
        raise missing_field_error("answers", columns.answers[0], record)
    for path, value in values:
        refuse_written_value(value, path, ANSWER_FIELDS)
    texts = [
        parse_scalar(answer, path, may_be_blank=True).strip()
        for path, value in values
        for answer in flatten(value)
    ]
    refused = {_fold_answer(text) for text in columns.no_answer}
    answers = tuple(dict.fromkeys(text for text in texts if text and _fold_answer(text) not in refused))
    if not answers:
        raise RecordDropped(NO_ANSWER)
    return answers


def _fold_answer(text: str) -> str:
    return normalize_text(text).rstrip(".")
