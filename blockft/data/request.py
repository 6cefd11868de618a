"""Requests: parse a prompt to answer, from a line of the input of `generate` or a call of the API."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blockft.data.fields import REQUEST_DOCUMENT, FieldTable
from blockft.data.rag_prompt import Document, RagPrompt
from blockft.data.sample import (
    SAMPLE_FIELDS,
    Message,
    RecordError,
    Sample,
    check_field,
    get_field,
    is_list,
    is_number,
    join_text_parts,
    parse_id,
    parse_messages,
    parse_meta,
    parse_templated_blocks,
    parse_text,
)

REQUEST_KINDS = (("documents", "question"), ("messages",), ("blocks",))
"""The kinds of requests, by their fields. A request is of one kind."""

ALLOWED_FIELDS = tuple(dict.fromkeys([name for kind in REQUEST_KINDS for name in kind] + list(SAMPLE_FIELDS)))

REQUEST_FIELDS = FieldTable(
    read=frozenset(ALLOWED_FIELDS),
    objects={"documents": REQUEST_DOCUMENT},
)

OWN_WORDING = (
    "the model was trained without a wording for documents (data.prompt): ask with 'messages', whose content "
    "is a list of blocks, or give a wording in Python: Engine.load(..., prompt=RagPrompt(...))"
)
"""Why documents cannot be put into a prompt of a model that saw no prompt worded by `data.prompt`."""


def parse_request(record: Any, prompt: RagPrompt | None, default_id: str) -> Sample:
    """Parse a JSON object that asks for an answer into a sample without a response.

    A request is one of three kinds:

    - `{"documents": [{"title"?, "text", "score"?} or text, ...], "question"}`, formatted with `prompt`; None
      if there is no wording. Unknown fields of a document have no effect; see `unknown_document_fields`.
    - `{"messages": [{"role", "content"}, ...]}`; the last message is from the user. A content is the list of
      its blocks, or a text or a list of text parts (`{"type": "text", "text"}`), which is one block.
    - `{"blocks": [text, ...]}`, the blocks of a prompt that already contains the chat template.

    The last block is the final block. `id` is optional and defaults to `default_id`. `meta` is the metadata
    of a sample; with `documents` it may not hold the block indices of documents. The record of a sample is a
    request, too; its source, response and answers are ignored.

    Raises:
        RecordError: the record is of no kind or of several kinds; a field is unknown, blank or of the wrong
            type; or there are documents, but no wording for them.
    """
    check_field(isinstance(record, Mapping), "the request", record, "be a JSON object")
    unknown = REQUEST_FIELDS.unknown_fields(record) - unknown_document_fields(record)
    if unknown:
        raise RecordError(f"unknown field {min(unknown)!r} (allowed: {', '.join(ALLOWED_FIELDS)})")
    check_field(
        sum(not record.keys().isdisjoint(kind) for kind in REQUEST_KINDS) == 1,
        "the request",
        list(record),
        "have 'documents' and 'question', or 'messages', or 'blocks'",
    )
    sample = Sample(id=_parse_id(record, default_id), source="input", response="")
    meta = get_field(record, "meta", {})
    if "messages" in record:
        sample = replace(sample, messages=_parse_chat(record["messages"]))
    elif "blocks" in record:
        sample = replace(sample, templated=parse_templated_blocks(record["blocks"], "blocks"))
    else:
        documents = _parse_documents(get_field(record, "documents"))
        question = parse_text(get_field(record, "question"), "field 'question'")
        if prompt is None:
            raise RecordError(OWN_WORDING)
        messages, document_meta = prompt.build(question, documents, sample.id)
        sample, meta = replace(sample, messages=messages), _merge_meta(meta, document_meta)
    return replace(sample, meta=parse_meta(meta, len(sample.blocks)))


def unknown_document_fields(record: Any) -> set[str]:
    """Return the fields of a request's documents that have no effect and are not known, as paths."""
    unknown = REQUEST_FIELDS.unknown_fields(record)
    return {name for name in unknown if name.startswith("documents[].")}


def unknown_corpus_fields(document: Any) -> set[str]:
    """Return the fields of a document that have no effect and are not known."""
    return REQUEST_DOCUMENT.unknown_fields(document)


def parse_document(value: Any, field: str = "") -> Document:
    """Parse a document from `{"title"?, "text", "score"?}`, or from a text. The score is its relevance.

    `field` is the path of the document in its record, for error messages; "" if it is the whole record.

    Raises:
        RecordError: a field is missing, blank or of the wrong type.
    """
    name, prefix = (f"field '{field}'", f"{field}.") if field else ("the document", "")
    if isinstance(value, str):
        return Document(title="", text=parse_text(value, name))
    check_field(isinstance(value, Mapping), name, value, 'be {"title", "text"} or a text')
    check_field("text" in value, name, list(value), 'have the key "text"')
    REQUEST_DOCUMENT.unknown_fields(value, path=prefix)  # raises if the document has an image, for example
    title = parse_text(get_field(value, "title", ""), f"field '{prefix}title'", may_be_blank=True)
    score = get_field(value, "score", 0)
    check_field(is_number(score), f"field '{prefix}score'", score, "be a finite number")
    return Document(title=title, text=parse_text(value["text"], f"field '{prefix}text'"), relevance=score)


def _parse_id(record: Mapping[str, Any], default_id: str) -> str:
    return parse_id(get_field(record, "id", default_id), "field 'id'")


def _parse_chat(value: Any) -> tuple[Message, ...]:
    check_field(is_list(value) and bool(value), "field 'messages'", value, "be a list of messages")
    last, role_name = value[-1], f"field 'messages[{len(value) - 1}].role'"
    if isinstance(last, Mapping) and "role" in last:
        check_field(
            last["role"] == "user",
            role_name,
            last["role"],
            "be user, because the last message is the question",
        )
    return parse_messages([_with_content_list(message, f"messages[{i}]") for i, message in enumerate(value)])


def _with_content_list(message: Any, path: str) -> Any:
    """Return the message with a content that is a list of blocks; a text, or text parts, become one block."""
    if not isinstance(message, Mapping) or "content" not in message:
        return message
    has_only = message.keys() <= {"role", "content"}
    check_field(has_only, f"field {path!r}", list(message), 'have the keys "role" and "content" only')
    content = message["content"]
    check_field(
        isinstance(content, str) or is_list(content),
        f"field '{path}.content'",
        content,
        "be a text or a list of block texts",
    )
    if is_list(content) and content and all(isinstance(part, Mapping) for part in content):
        content = join_text_parts(content, f"{path}.content")
    return {**message, "content": [content]} if isinstance(content, str) else message


def _parse_documents(value: Any) -> list[Document]:
    check_field(is_list(value), "field 'documents'", value, "be a list of documents")
    return [parse_document(document, f"documents[{i}]") for i, document in enumerate(value)]


def _merge_meta(request_meta: Any, document_meta: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a request together with the metadata of its document blocks."""
    check_field(isinstance(request_meta, Mapping), "field 'meta'", request_meta, "be a JSON object")
    for name in ("documents", "relevance", "supporting"):
        check_field(
            name not in request_meta,
            f"field 'meta.{name}'",
            request_meta.get(name),
            "be absent if there is a field 'documents'",
        )
    return {**request_meta, **document_meta}
