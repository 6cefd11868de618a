"""Requests: parse a prompt to answer, from a line of the input of `generate` or a call of the API."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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
    parse_messages,
    parse_meta,
    parse_templated_blocks,
    parse_text,
)

REQUEST_KINDS = (("documents", "question"), ("messages",), ("blocks",))
"""The kinds of requests, by their fields. A request is of one kind."""

ALLOWED_FIELDS = tuple(dict.fromkeys([name for kind in REQUEST_KINDS for name in kind] + list(SAMPLE_FIELDS)))


def parse_request(record: Any, prompt: RagPrompt, default_id: str) -> Sample:
    """Parse a JSON object that asks for an answer into a sample without a response.

    A request is one of three kinds:

    - `{"documents": [{"title"?, "text", "score"?} or text, ...], "question"}`, formatted with `prompt`. Other
      fields of a document are ignored.
    - `{"messages": [{"role", "content"}, ...]}`; the last message is from the user. A content is the list of
      its blocks, or a text, which is one block.
    - `{"blocks": [text, ...]}`, the blocks of a prompt that already contains the chat template.

    The last block is the final block. `id` is optional and defaults to `default_id`. `meta` is the metadata
    of a sample; with `documents` it may not hold the block indices of documents. The record of a sample is a
    request, too; its source, response and answers are ignored.

    Raises:
        RecordError: the record is of no kind or of several kinds, or a field is unknown, blank or of the
            wrong type.
    """
    check_field(isinstance(record, Mapping), "the request", record, "be a JSON object")
    if unknown := [key for key in record if key not in ALLOWED_FIELDS]:
        raise RecordError(f"unknown field {unknown[0]!r} (allowed: {', '.join(ALLOWED_FIELDS)})")
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
        messages, document_meta = prompt.build(question, documents, sample.id)
        sample, meta = replace(sample, messages=messages), _merge_meta(meta, document_meta)
    return replace(sample, meta=parse_meta(meta, len(sample.blocks)))


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
    title = parse_text(value.get("title", ""), f"field '{prefix}title'", may_be_blank=True)
    score = value.get("score", 0)
    check_field(is_number(score), f"field '{prefix}score'", score, "be a finite number")
    return Document(title=title, text=parse_text(value["text"], f"field '{prefix}text'"), relevance=score)


def _parse_id(record: Mapping[str, Any], default_id: str) -> str:
    value = record.get("id", default_id)
    check_field(type(value) in (str, int), "field 'id'", value, "be a text or a number")
    return parse_text(str(value), "field 'id'")


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
    return parse_messages(
        [_with_content_list(message, f"field 'messages[{i}]") for i, message in enumerate(value)]
    )


def _with_content_list(message: Any, field_name: str) -> Any:
    """Return the message with a content that is a list; a text becomes a list of one text."""
    if not isinstance(message, Mapping) or "content" not in message:
        return message
    content = message["content"]
    check_field(
        isinstance(content, str) or is_list(content),
        f"{field_name}.content'",
        content,
        "be a text or a list of block texts",
    )
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
