"""Samples: text with its blocks marked, independent of any model; one JSON object a line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

FIELDS = ("id", "source", "messages", "blocks", "response", "answers", "meta")


class RecordError(ValueError):
    """A record that is no sample; the message names the field, its reader adds file and line."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat; its text is its blocks, joined."""

    role: str
    content: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.content)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt as messages whose content is cut into blocks, the response, and the accepted answers.

    A prompt that arrived already templated has no messages: `templated` holds its blocks, markers and all.
    The last block of the last message is the final block, all others are local. `meta["documents"]` lists
    which blocks (counted over the whole prompt) are documents: the chat template's markup never joins those;
    `meta["relevance"]` gives each of them a number, higher for more relevant; `meta["supporting"]` lists
    those that the answer is known to rest on. A response may be empty if there are answers: such a sample can
    be evaluated, not trained on.
    """

    id: str
    source: str
    messages: tuple[Message, ...] = ()
    templated: tuple[str, ...] = ()
    response: str
    answers: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The texts of all blocks of the prompt, in order."""
        return self.templated or tuple(text for message in self.messages for text in message.content)

    @property
    def documents(self) -> tuple[int, ...]:
        """Which of the blocks are documents."""
        return tuple(self.meta.get("documents", ()))

    def without_document(self, index: int) -> "Sample":
        """The sample without the block of its document `index`, a place in `documents`."""
        gone = self.documents[index]
        messages, start = [], 0
        for message in self.messages:
            kept = tuple(text for i, text in enumerate(message.content, start) if i != gone)
            start += len(message.content)
            if kept:
                messages.append(replace(message, content=kept))
        meta = self.meta | {"documents": [d - (d > gone) for d in self.documents if d != gone]}
        if "relevance" in meta:
            meta["relevance"] = [r for i, r in enumerate(meta["relevance"]) if i != index]
        if "supporting" in meta:
            meta["supporting"] = [d - (d > gone) for d in meta["supporting"] if d != gone]
        templated = tuple(text for i, text in enumerate(self.templated) if i != gone)
        return replace(self, messages=tuple(messages), templated=templated, meta=meta)


def parse_sample(record: Any) -> Sample:
    """The sample that a JSON object describes.

    Raises:
        RecordError: a field is missing, unknown or ill-typed, or there is nothing to train or evaluate on.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    if unknown := [key for key in record if key not in FIELDS]:
        raise RecordError(f"unknown field {unknown[0]!r} (allowed: {', '.join(FIELDS)})")
    check_field(
        not {"messages", "blocks"} <= record.keys(),
        "the record",
        sorted(record),
        "have either 'messages' or 'blocks'",
    )
    templated = parse_templated_blocks(record["blocks"], "blocks") if "blocks" in record else ()
    messages = () if templated else parse_messages(get_field(record, "messages"))
    answers = get_field(record, "answers", [])
    check_field(isinstance(answers, list), "field 'answers'", answers, "be a list of texts")
    response = parse_text(get_field(record, "response"), "field 'response'", may_be_blank=bool(answers))
    num_blocks = len(templated) or sum(len(message.content) for message in messages)
    return Sample(
        id=parse_text(get_field(record, "id"), "field 'id'"),
        source=parse_text(get_field(record, "source"), "field 'source'"),
        messages=messages,
        templated=templated,
        response=response,
        answers=tuple(parse_text(answer, f"field 'answers[{i}]'") for i, answer in enumerate(answers)),
        meta=parse_meta(get_field(record, "meta", {}), num_blocks),
    )


def sample_to_record(sample: Sample) -> dict[str, Any]:
    """The JSON object of a sample; `from_record` reads it back."""
    record: dict[str, Any] = {"id": sample.id, "source": sample.source}
    if sample.templated:
        record["blocks"] = list(sample.templated)
    else:
        record["messages"] = [{"role": m.role, "content": list(m.content)} for m in sample.messages]
    record["response"] = sample.response
    if sample.answers:
        record["answers"] = list(sample.answers)
    if sample.meta:
        record["meta"] = sample.meta
    return record


def get_field(record: Mapping[str, Any], name: str, default: Any = ...) -> Any:
    """A field of a record.

    Raises:
        RecordError: it is missing and has no default.
    """
    if name in record:
        return record[name]
    if default is ...:
        raise RecordError(f"field {name!r} is missing")
    return default


def check_field(holds: bool, name: str, found: Any, rule: str) -> None:
    """Raise RecordError unless the rule holds."""
    if not holds:
        shown = repr(found)
        raise RecordError(f"{name} is {shown[:60]}{'...' if len(shown) > 60 else ''}, it should {rule}")


def is_number(found: Any) -> bool:
    """Whether it is a number that can be compared with others; JSON as Python reads it knows NaN."""
    return type(found) in (int, float) and abs(found) < math.inf


def is_list(found: Any) -> bool:
    """Whether it is what JSON calls a list, or a caller any other sequence but a text."""
    return isinstance(found, Sequence) and not isinstance(found, str | bytes)


def parse_text(value: Any, name: str, *, may_be_blank: bool = False) -> str:
    """A text that can be encoded.

    Raises:
        RecordError: no text, a blank one, or one with a lone surrogate, which JSON can spell.
    """
    check_field(isinstance(value, str), name, value, "be a text")
    check_field(may_be_blank or bool(value.strip()), name, value, "not be blank")
    check_field(not any("\ud800" <= c <= "\udfff" for c in value), name, value, "be valid Unicode")
    return str(value)


def parse_messages(found: Any) -> tuple[Message, ...]:
    """The messages of a prompt, from the field `messages` of a record.

    Raises:
        RecordError: something in it is missing or ill-typed, or no prompt ends there.
    """
    check_field(is_list(found) and bool(found), "field 'messages'", found, "be a list of messages")
    messages = []
    for i, message in enumerate(found):
        at = f"field 'messages[{i}]"
        check_field(isinstance(message, Mapping), f"{at}'", message, 'be {"role", "content"}')
        check_field(
            set(message) == {"role", "content"}, f"{at}'", list(message), 'have the keys "role" and "content"'
        )
        content = message["content"]
        check_field(is_list(content) and bool(content), f"{at}.content'", content, "be a list of block texts")
        texts = [parse_text(text, f"{at}.content[{j}]'", may_be_blank=True) for j, text in enumerate(content)]
        for j, text in enumerate(texts):
            check_field(bool(text), f"{at}.content[{j}]'", text, "not be empty")
        messages.append(Message(role=parse_text(message["role"], f"{at}.role'"), content=tuple(texts)))
    last = messages[-1]
    check_field(
        last.role != "assistant",
        f"{at}.role'",
        last.role,
        "not be assistant: the answer goes into 'response'",
    )
    check_field(
        bool(last.content[-1].strip()), f"{at}.content'", last.content[-1], "not end in a blank final block"
    )
    return tuple(messages)


def parse_templated_blocks(found: Any, name: str) -> tuple[str, ...]:
    """The blocks of a prompt that is already templated, from the field `name` of a record.

    Raises:
        RecordError: no list of texts, an empty block, or a blank final block.
    """
    check_field(is_list(found) and bool(found), f"field {name!r}", found, "be a list of block texts")
    texts = tuple(parse_text(text, f"field '{name}[{i}]'", may_be_blank=True) for i, text in enumerate(found))
    for i, text in enumerate(texts):
        check_field(bool(text), f"field '{name}[{i}]'", text, "not be empty")
    check_field(bool(texts[-1].strip()), f"field {name!r}", texts[-1], "not end in a blank final block")
    return texts


def parse_meta(found: Any, num_blocks: int) -> dict[str, Any]:
    check_field(isinstance(found, dict), "field 'meta'", found, "be a JSON object")
    documents, relevance = found.get("documents", []), found.get("relevance")
    local = range(num_blocks - 1)
    check_field(
        isinstance(documents, list) and all(type(d) is int and d in local for d in documents),
        "field 'meta.documents'",
        documents,
        f"list numbers of local blocks, 0 to {num_blocks - 2}"
        if local
        else "be empty: there are no local blocks",
    )
    check_field(
        relevance is None
        or isinstance(relevance, list)
        and len(relevance) == len(documents)
        and all(is_number(r) for r in relevance),
        "field 'meta.relevance'",
        relevance,
        "list one finite number for each of meta.documents",
    )
    supporting = found.get("supporting", [])
    check_field(
        isinstance(supporting, list) and all(type(s) is int and s in documents for s in supporting),
        "field 'meta.supporting'",
        supporting,
        "list some of meta.documents",
    )
    return dict(found)
