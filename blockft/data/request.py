"""Requests: what a line of `generate`'s input, or a call of a service, asks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blockft.data.rag_prompt import Document, RagPrompt
from blockft.data.sample import (
    FIELDS,
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
"""The fields of a prompt: one of these."""

ALLOWED_FIELDS = tuple(dict.fromkeys([name for kind in REQUEST_KINDS for name in kind] + list(FIELDS)))


def parse_request(record: Any, prompt: RagPrompt, id: str) -> Sample:
    """The prompt that a JSON object asks to answer, as a sample without a response. It is one of three kinds:

    - `{"documents": [{"title", "text"} or text, ...], "question"}`, worded by `prompt`; a document may have
      fields of its own;
    - `{"messages": [{"role", "content"}, ...]}`, the last one of the user; a content is the list of its
      blocks, or one text, which is one block;
    - `{"blocks": [text, ...]}`, the blocks of a prompt that is already templated.

    The last block is the final block. `id` names a record without one. `meta` is that of a sample; beside
    documents it may not say which blocks they are. A sample is a request, too: its source, response and
    answers are passed over.

    Raises:
        RecordError: none of the kinds, or several; a field that is unknown, ill-typed or blank.
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
    asked = Sample(id=_id(record, id), source="input", response="")
    meta = get_field(record, "meta", {})
    if "messages" in record:
        asked = replace(asked, messages=_parse_chat(record["messages"]))
    elif "blocks" in record:
        asked = replace(asked, templated=parse_templated_blocks(record["blocks"], "blocks"))
    else:
        documents = _parse_documents(get_field(record, "documents"))
        question = parse_text(get_field(record, "question"), "field 'question'")
        messages, built = prompt.build(question, documents, asked.id)
        asked, meta = replace(asked, messages=messages), _merge_meta(meta, built)
    return replace(asked, meta=parse_meta(meta, len(asked.blocks)))


def _id(record: Mapping[str, Any], default: str) -> str:
    found = record.get("id", default)
    check_field(type(found) in (str, int), "field 'id'", found, "be a text or a number")
    return parse_text(str(found), "field 'id'")


def _parse_chat(found: Any) -> tuple[Message, ...]:
    check_field(is_list(found) and bool(found), "field 'messages'", found, "be a list of messages")
    last, at = found[-1], f"field 'messages[{len(found) - 1}].role'"
    if isinstance(last, Mapping) and "role" in last:
        check_field(last["role"] == "user", at, last["role"], "be user: the last message asks")
    return parse_messages(
        [_content_as_list(message, f"field 'messages[{i}]") for i, message in enumerate(found)]
    )


def _content_as_list(message: Any, at: str) -> Any:
    """A message whose content is a list if it was one text."""
    if not isinstance(message, Mapping) or "content" not in message:
        return message
    content = message["content"]
    check_field(
        isinstance(content, str) or is_list(content),
        f"{at}.content'",
        content,
        "be a text or a list of block texts",
    )
    return {**message, "content": [content]} if isinstance(content, str) else message


def _parse_documents(found: Any) -> list[Document]:
    check_field(is_list(found), "field 'documents'", found, "be a list of documents")
    return [parse_document(document, f"documents[{i}]") for i, document in enumerate(found)]


def parse_document(found: Any, field: str = "") -> Document:
    """A document, from `{"title", "text"}`, or a text alone; its `score` is its relevance.

    Raises:
        RecordError: it is none; `field` is where it stands, if it is not the whole record.
    """
    whole, inside = (f"field '{field}'", f"{field}.") if field else ("the document", "")
    if isinstance(found, str):
        return Document(title="", text=parse_text(found, whole))
    check_field(isinstance(found, Mapping), whole, found, 'be {"title", "text"} or a text')
    check_field("text" in found, whole, list(found), 'have the key "text"')
    title = parse_text(found.get("title", ""), f"field '{inside}title'", may_be_blank=True)
    score = found.get("score", 0)
    check_field(is_number(score), f"field '{inside}score'", score, "be a finite number")
    return Document(title=title, text=parse_text(found["text"], f"field '{inside}text'"), relevance=score)


def _merge_meta(given: Any, built: dict[str, Any]) -> dict[str, Any]:
    """The meta data of a record, and what the wording of its documents adds."""
    check_field(isinstance(given, Mapping), "field 'meta'", given, "be a JSON object")
    for name in ("documents", "relevance", "supporting"):
        check_field(
            name not in given, f"field 'meta.{name}'", given.get(name), "be absent beside 'documents'"
        )
    return {**given, **built}
