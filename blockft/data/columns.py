"""Columns: a mapping that says which field of a record holds the question, the documents, the answers, ..."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from blockft.data.column_path import (
    find_value,
    first_step,
    flatten,
    has_path,
    list_paths,
    parse_path,
)
from blockft.data.fields import printable_name
from blockft.data.sample import RecordError

MAX_SHOWN_FIELDS = 12
"""Number of fields of a record that an error lists."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The paths to the parts of a record (see `column_path`); an empty path is a part that records lack.

    A record is a question (`question`, with `answers` or `response`), a chat (`messages`) or a pair of
    `prompt` and `completion`. The settings `data.sources[].columns` describe every path.
    """

    id: str = ""
    question: str = ""
    documents: tuple[str, ...] = ()
    title: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    score: str = ""
    supporting: str = ""
    supporting_indices: str = ""
    supporting_contains_answer: bool = False
    answers: tuple[str, ...] = ()
    no_answer: tuple[str, ...] = ()
    response: str = ""
    messages: str = ""
    prompt: tuple[str, ...] = ()
    completion: str = ""
    system: str = ""

    @property
    def is_question(self) -> bool:
        return bool(self.question)

    @cached_property
    def paths(self) -> tuple[tuple[str, str], ...]:
        """Every path with the name of its column."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "no_answer")
        paths = ((name, (value,) if isinstance(value, str) else value) for name, value in values)
        return tuple(
            (name, path) for name, found in paths if isinstance(found, tuple) for path in found if path
        )

    @cached_property
    def first_steps(self) -> frozenset[str]:
        """The starts of all paths, which name fields of the record itself."""
        return frozenset(first_step(path) for _, path in self.paths)


def build_columns(mapping: Mapping[str, Any]) -> Columns:
    """Return the columns of a mapping as a recipe writes it: a text or a list of texts for each part."""
    several = {f.name for f in fields(Columns) if isinstance(f.default, tuple)}
    values: dict[str, Any] = {
        name: ((value,) if isinstance(value, str) else tuple(value)) if name in several else value
        for name, value in mapping.items()
    }
    return Columns(**values)


def unread_fields(columns: Columns, record: Any) -> set[str]:
    """Return the fields of a record that no path reads."""
    if not isinstance(record, Mapping):
        return set()
    named = {step.name for path in columns.first_steps for step in parse_path(path)}
    patterns = [step.pattern for path in columns.first_steps for step in parse_path(path) if step.pattern]
    return {
        printable_name(name)
        for name in map(str, record.keys() - named)
        if not any(pattern.fullmatch(name) for pattern in patterns)
    }


def absent_paths(columns: Columns, record: Any) -> set[tuple[str, str]]:
    """Return the columns and paths of which a record has nothing, not even null."""
    if not isinstance(record, Mapping):
        return set()
    absent = {(column, path) for column, path in columns.paths if not has_path(record, path)}
    inner = {(column, path) for column, path in absent if column in ("title", "text", "score", "supporting")}
    return absent - {entry for entry in inner if _is_in_documents(record, columns, entry[1])}


def is_header(record: Mapping[str, Any]) -> bool:
    """Return whether a record is the header of a file, such as MRQA writes into the first line."""
    return record.keys() == {"header"}


def describe_fields(record: Any) -> str:
    """Return the part of an error message that lists the fields of a record; "" if it has none."""
    paths = list_paths(record)
    shown = ", ".join(map(printable_name, paths[:MAX_SHOWN_FIELDS]))
    more = ", ..." if len(paths) > MAX_SHOWN_FIELDS else ""
    return f"; the record has the fields {shown}{more}" if paths else ""


def _is_in_documents(record: Mapping[str, Any], columns: Columns, path: str) -> bool:
    """Return whether a document has the field of a path, which may be written from the record on."""
    for documents in columns.documents:
        if has_path(record, documents):
            inner = path.removeprefix(f"{documents}.")
            try:
                elements = flatten(find_value(record, documents))
            except RecordError:
                return True
            if any(isinstance(element, Mapping) and has_path(element, inner) for element in elements):
                return True
    return False
