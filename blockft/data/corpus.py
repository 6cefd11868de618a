"""Corpora: files of documents in which a retriever searches for questions that have none of their own."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from blockft.data.column_documents import DEFAULT_TEXT, DEFAULT_TITLE, first_value, parse_scalar
from blockft.data.column_path import MISSING, similar_paths
from blockft.data.columns import Columns, describe_fields
from blockft.data.files import RECORD_SUFFIXES, find_files
from blockft.data.rag_prompt import Document
from blockft.data.records import read_file
from blockft.data.sample import SKIP_REMEDY, RecordError, check_field
from blockft.errors import UserError


def find_corpus_files(path: str) -> list[Path]:
    """Return the files of a corpus, sorted.

    Raises:
        UserError: nothing exists at `path`.
    """
    return find_files(path, RECORD_SUFFIXES, kind="corpus")


def read_corpus(path: str, columns: Columns, on_bad: Callable[[str], None] | None) -> Iterator[Document]:
    """Yield the documents of a corpus. Records without a text are left out.

    A record has a text and perhaps a title, in the fields `columns.text` and `columns.title`.

    Args:
        path: a file, a folder or a glob.
        columns: names the fields.
        on_bad: called with the message about a bad record; None raises it.

    Raises:
        UserError: nothing exists at `path`, it holds no documents, or a record is bad and `on_bad` is None.
    """
    num_documents = 0
    for place, record in chain.from_iterable(map(read_file, find_corpus_files(path))):
        try:
            document = _parse_document(record, columns)
        except RecordError as error:
            message = f"corpus {place}: {error}"
            if on_bad is None:
                raise UserError(f"{message} {SKIP_REMEDY}") from error
            on_bad(message)
            continue
        if document.text.strip():
            num_documents += 1
            yield document
    if not num_documents:
        raise UserError(f"corpus {path} holds no documents")


def _parse_document(record: Any, columns: Columns) -> Document:
    if isinstance(record, RecordError):
        raise record
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    text_paths, title_paths = columns.text or DEFAULT_TEXT, columns.title or DEFAULT_TITLE
    text, title = first_value(record, text_paths), first_value(record, title_paths)
    if text is MISSING:
        close = " or ".join(similar_paths(text_paths[0], record))
        raise RecordError(
            f"field {' or '.join(text_paths)} of columns.text is missing"
            f"{f' (did you mean {close}?)' if close else describe_fields(record)}"
        )
    return Document(
        title="" if title in (None, MISSING) else parse_scalar(title, title_paths[0], may_be_blank=True),
        text="" if text is None else parse_scalar(text, text_paths[0], may_be_blank=True),
    )
