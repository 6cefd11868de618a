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
    check,
    is_list,
    is_number,
    messages_of,
    meta_of,
    take,
    templated_of,
    text_of,
)

KINDS = (("documents", "question"), ("messages",), ("blocks",))
"""The fields of a prompt: one of these."""

ALLOWED = tuple(dict.fromkeys([name for kind in KINDS for name in kind] + list(FIELDS)))


def request_of(record: Any, prompt: RagPrompt, id: str) -> Sample:
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
    check(isinstance(record, Mapping), "the request", record, "be a JSON object")
    if unknown := [key for key in record if key not in ALLOWED]:
        raise RecordError(f"unknown field {unknown[0]!r} (allowed: {', '.join(ALLOWED)})")
    check(
        sum(not record.keys().isdisjoint(kind) for kind in KINDS) == 1,
        "the request",
        list(record),
        "have 'documents' and 'question', or 'messages', or 'blocks'",
    )
    asked = Sample(id=_id(record, id), source="input", response="")
    meta = take(record, "meta", {})
    if "messages" in record:
        asked = replace(asked, messages=_messages(record["messages"]))
    elif "blocks" in record:
        asked = replace(asked, templated=templated_of(record["blocks"], "blocks"))
    else:
        documents = _documents(take(record, "documents"))
        question = text_of(take(record, "question"), "field 'question'")
        messages, built = prompt.build(question, documents, asked.id)
        asked, meta = replace(asked, messages=messages), _joined(meta, built)
    return replace(asked, meta=meta_of(meta, len(asked.blocks)))


def _id(record: Mapping[str, Any], default: str) -> str:
    found = record.get("id", default)
    check(type(found) in (str, int), "field 'id'", found, "be a text or a number")
    return text_of(str(found), "field 'id'")


def _messages(found: Any) -> tuple[Message, ...]:
    check(is_list(found) and bool(found), "field 'messages'", found, "be a list of messages")
    last, at = found[-1], f"field 'messages[{len(found) - 1}].role'"
    if isinstance(last, Mapping) and "role" in last:
        check(last["role"] == "user", at, last["role"], "be user: the last message asks")
    return messages_of([_in_blocks(message, f"field 'messages[{i}]") for i, message in enumerate(found)])


def _in_blocks(message: Any, at: str) -> Any:
    """A message whose content is a list if it was one text."""
    if not isinstance(message, Mapping) or "content" not in message:
        return message
    content = message["content"]
    check(
        isinstance(content, str) or is_list(content),
        f"{at}.content'",
        content,
        "be a text or a list of block texts",
    )
    return {**message, "content": [content]} if isinstance(content, str) else message


def _documents(found: Any) -> list[Document]:
    check(is_list(found), "field 'documents'", found, "be a list of documents")
    return [document_of(document, f"documents[{i}]") for i, document in enumerate(found)]


def document_of(found: Any, field: str = "") -> Document:
    """A document, from `{"title", "text"}`, or a text alone; its `score` is its relevance.

    Raises:
        RecordError: it is none; `field` is where it stands, if it is not the whole record.
    """
    whole, inside = (f"field '{field}'", f"{field}.") if field else ("the document", "")
    if isinstance(found, str):
        return Document(title="", text=text_of(found, whole))
    check(isinstance(found, Mapping), whole, found, 'be {"title", "text"} or a text')
    check("text" in found, whole, list(found), 'have the key "text"')
    title = text_of(found.get("title", ""), f"field '{inside}title'", may_be_blank=True)
    score = found.get("score", 0)
    check(is_number(score), f"field '{inside}score'", score, "be a finite number")
    return Document(title=title, text=text_of(found["text"], f"field '{inside}text'"), relevance=score)


def _joined(given: Any, built: dict[str, Any]) -> dict[str, Any]:
    """The meta data of a record, and what the wording of its documents adds."""
    check(isinstance(given, Mapping), "field 'meta'", given, "be a JSON object")
    for name in ("documents", "relevance", "supporting"):
        check(name not in given, f"field 'meta.{name}'", given.get(name), "be absent beside 'documents'")
    return {**given, **built}
