"""Samples: prompts with marked blocks and their responses, independent of any model; stored as JSON lines."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ROLES = ("system", "user", "assistant")
"""The roles of messages. A chat template pastes a role into the prompt, so no other text may be a role."""

SAMPLE_FIELDS = ("id", "source", "messages", "blocks", "response", "answers", "meta")
"""The fields of a sample's JSON object."""


_SURROGATE = re.compile("[\ud800-\udfff]")

MAX_META_DEPTH = 32
"""Number of lists and objects of `meta` that may be inside each other."""

GOLD_MARKS = ("isgold", "is_gold", "gold", "is_supporting", "is_positive", "is_relevant", "is_selected")
ANSWER_MARKS = ("hasanswer", "has_answer")
EVIDENCE_MARKS = GOLD_MARKS + ANSWER_MARKS
"""The fields of a document that say whether it supports the answer, or whether it contains the answer."""

ANSWERABLE_FLAGS = ("answerable", "is_answerable")
UNANSWERABLE_FLAGS = ("is_impossible", "unanswerable", "is_unanswerable", "no_answer")
"""The fields of a question that say whether it has an answer."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""The types of content parts that hold text."""

NO_EVIDENCE = "no supporting document"
"""The reason for not training on a question none of whose documents supports the answer."""

SKIP_REMEDY = "(data.on_bad_record=skip passes over it)"
"""The remedy at the end of every error about a single record."""


class RecordError(ValueError):
    """A record is not valid. The message names the field; the reader adds file and line.

    `record` is the record, if the error takes its place.
    """

    record: Any = None


class RecordDropped(Exception):
    """A valid record gives no sample to train on; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat. `content` holds the texts of its blocks."""

    role: str
    content: tuple[str, ...]

    @property
    def text(self) -> str:
        """The text of the message: its blocks joined."""
        return "".join(self.content)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with marked blocks, its response, and the accepted answers.

    The prompt is either `messages`, which a chat template renders later, or `templated`: the blocks of a
    prompt that already contains the chat template with its control tokens. The last block of the prompt is
    the final block; all other blocks are local.

    `response` may be empty if there are `answers`. Such a sample is for evaluation, not for training.

    `meta` may hold, besides anything else:

    - `documents`: the indices of the blocks that are documents, counted over the whole prompt. The chat
      template's markup never becomes part of a document block.
    - `relevance`: one number per document; higher is more relevant.
    - `supporting`: the block indices of the documents that are known to support the answer.
    - `question`: the question without any wording, by which leaks are found (`blockft.data.leaks`).
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
        """The indices of the blocks that are documents."""
        return tuple(self.meta.get("documents", ()))

    def without_document(self, index: int) -> "Sample":
        """Return the sample without the block of document `index`, an index into `documents`."""
        removed = self.documents[index]
        messages, start = [], 0
        for message in self.messages:
            kept = tuple(text for i, text in enumerate(message.content, start) if i != removed)
            start += len(message.content)
            if kept:
                messages.append(replace(message, content=kept))
        meta = self.meta | {"documents": [d - (d > removed) for d in self.documents if d != removed]}
        if "relevance" in meta:
            meta["relevance"] = [r for i, r in enumerate(meta["relevance"]) if i != index]
        if "supporting" in meta:
            meta["supporting"] = [d - (d > removed) for d in meta["supporting"] if d != removed]
        templated = tuple(text for i, text in enumerate(self.templated) if i != removed)
        return replace(self, messages=tuple(messages), templated=templated, meta=meta)


def parse_sample(record: Any) -> Sample:
    """Parse the JSON object of a sample; `sample_to_record` writes it.

    ::

        {"id": "s1", "source": "mine", "messages": [{"role": "user", "content": ["Read.", "One.", "Who?"]}],
         "response": "The fox", "answers": ["The fox"], "meta": {"documents": [1]}}
        -> local blocks "Read." and "One." (a document), final block "Who?"

    A prompt that already contains the chat template has `"blocks": [text, ...]` in place of `messages`.

    Raises:
        RecordError: a field is missing or of the wrong type, or the sample has neither response nor answers.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    has_messages, has_blocks = (record.get(name) is not None for name in ("messages", "blocks"))
    check_field(
        not (has_messages and has_blocks), "the record", list(record), "have either 'messages' or 'blocks'"
    )
    templated = parse_templated_blocks(record["blocks"], "blocks") if has_blocks else ()
    messages = () if templated else parse_messages(get_field(record, "messages"))
    answers = get_field(record, "answers", [])
    check_field(isinstance(answers, list), "field 'answers'", answers, "be a list of texts")
    response = parse_text(get_field(record, "response"), "field 'response'", may_be_blank=bool(answers))
    num_blocks = len(templated) or sum(len(message.content) for message in messages)
    return Sample(
        id=parse_id(get_field(record, "id"), "field 'id'"),
        source=parse_text(get_field(record, "source"), "field 'source'"),
        messages=messages,
        templated=templated,
        response=response,
        answers=tuple(parse_text(answer, f"field 'answers[{i}]'") for i, answer in enumerate(answers)),
        meta=parse_meta(get_field(record, "meta", {}), num_blocks),
    )


def sample_to_record(sample: Sample) -> dict[str, Any]:
    """Return the JSON object of a sample; `parse_sample` reads it."""
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


def get_field(record: Mapping[str, Any], name: str, default: Any = ..., *, path: str = "") -> Any:
    """Return a field of a record. A field that may be missing may be null as well, as in parquet files.

    `path` is the path of the record's own object for error messages, with the dot at its end.

    Raises:
        RecordError: the field is missing and there is no default.
    """
    value = record.get(name, ...)
    if value is not ... and (value is not None or default is ...):
        return value
    if default is ...:
        raise RecordError(f"field '{path}{name}' is missing")
    return default


def check_field(is_valid: bool, name: str, value: Any, rule: str) -> None:
    """Check a value of a record.

    Raises:
        RecordError: `is_valid` is False. The message reads "NAME is VALUE, it should RULE".
    """
    if not is_valid:
        try:
            shown = repr(value)
        except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
            shown = f"a {type(value).__name__}"
        raise RecordError(f"{name} is {shown[:60]}{'...' if len(shown) > 60 else ''}, it should {rule}")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number. Python's JSON decoder also reads NaN and Infinity.

    A whole number beyond the range of floats is none.
    """
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_list(value: Any) -> bool:
    """Return whether a value is a sequence other than a text: a JSON list, or a sequence from Python."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def parse_text(value: Any, name: str, *, may_be_blank: bool = False) -> str:
    """Return a text that can be encoded as UTF-8.

    Raises:
        RecordError: the value is not a text, is blank, or has a lone surrogate, which JSON can express.
    """
    check_field(isinstance(value, str), name, value, "be a text")
    check_field(may_be_blank or bool(value.strip()), name, value, "not be blank")
    check_field(value.isascii() or not _SURROGATE.search(value), name, value, "be valid Unicode")
    return str(value)


def parse_role(value: Any, name: str) -> str:
    """Return the role of a message.

    Raises:
        RecordError: there is no such role. Messages of tools are refused, too.
    """
    check_field(isinstance(value, str) and value in ROLES, name, value, f"be one of {', '.join(ROLES)}")
    return str(value)


def parse_id(value: Any, name: str) -> str:
    """Return an id, which may be a whole number, as a text.

    Raises:
        RecordError: the value is neither a text nor a whole number, or is blank.
    """
    is_id = isinstance(value, str) or type(value) is int
    check_field(is_id, name, value, "be a text or a whole number")
    return parse_text(str(value), name)


def parse_flag(record: Mapping[str, Any], name: str, default: bool, *, path: str = "") -> bool:
    """Return a field that is true or false, or 1 or 0; the default if the field is missing or null.

    Raises:
        RecordError: the field has another value.
    """
    value = get_field(record, name, default, path=path)
    is_flag = type(value) in (bool, int, float) and value in (0, 1)
    check_field(is_flag, f"field '{path}{name}'", value, "be true or false")
    return bool(value)


def join_text_parts(parts: Sequence[Any], path: str) -> str:
    """Return the text of a message whose content is a list of parts: `[{"type": "text", "text"}, ...]`.

    Raises:
        RecordError: a part is no text, such as an image; the message names its place below `path`.
    """
    texts = []
    for i, part in enumerate(parts):
        is_text = isinstance(part, Mapping) and part.get("type") in TEXT_PARTS
        check_field(is_text, f"field '{path}[{i}]'", part, 'be a text part: {"type": "text", "text"}')
        text = get_field(part, "text", path=f"{path}[{i}].")
        texts.append(parse_text(text, f"field '{path}[{i}].text'", may_be_blank=True))
    return "".join(texts)


def parse_messages(value: Any) -> tuple[Message, ...]:
    """Parse the field `messages` of a record: the messages of a prompt.

    Raises:
        RecordError: a field is missing or of the wrong type, or the last message cannot end a prompt.
    """
    check_field(is_list(value) and bool(value), "field 'messages'", value, "be a list of messages")
    messages = []
    for i, message in enumerate(value):
        name = f"field 'messages[{i}]"
        check_field(isinstance(message, Mapping), f"{name}'", message, 'be {"role", "content"}')
        has_keys = {"role", "content"} <= message.keys()
        check_field(has_keys, f"{name}'", list(message), 'have the keys "role" and "content"')
        content = message["content"]
        check_field(
            is_list(content) and bool(content), f"{name}.content'", content, "be a list of block texts"
        )
        texts = [
            parse_text(text, f"{name}.content[{j}]'", may_be_blank=True) for j, text in enumerate(content)
        ]
        for j, text in enumerate(texts):
            check_field(bool(text), f"{name}.content[{j}]'", text, "not be empty")
        messages.append(Message(role=parse_role(message["role"], f"{name}.role'"), content=tuple(texts)))
    last = messages[-1]
    is_prompt = last.role != "assistant"
    check_field(is_prompt, f"{name}.role'", last.role, "not be assistant: the answer goes into 'response'")
    final_block = last.content[-1]
    check_field(bool(final_block.strip()), f"{name}.content'", final_block, "not end in a blank final block")
    return tuple(messages)


def parse_templated_blocks(value: Any, name: str) -> tuple[str, ...]:
    """Parse the field `name` of a record: the blocks of a prompt that already contains the chat template.

    Raises:
        RecordError: the value is not a list of texts, a block is empty, or the final block is blank.
    """
    check_field(is_list(value) and bool(value), f"field {name!r}", value, "be a list of block texts")
    texts = tuple(parse_text(text, f"field '{name}[{i}]'", may_be_blank=True) for i, text in enumerate(value))
    for i, text in enumerate(texts):
        check_field(bool(text), f"field '{name}[{i}]'", text, "not be empty")
    check_field(bool(texts[-1].strip()), f"field {name!r}", texts[-1], "not end in a blank final block")
    return texts


def parse_meta(value: Any, num_blocks: int) -> dict[str, Any]:
    """Parse the field `meta` of a record whose prompt has `num_blocks` blocks; see `Sample`.

    Raises:
        RecordError: the entries about documents contradict the blocks or each other.
    """
    check_field(isinstance(value, dict), "field 'meta'", value, "be a JSON object")
    documents, relevance = value.get("documents", []), value.get("relevance")
    local_blocks = range(num_blocks - 1)
    check_field(
        isinstance(documents, list)
        and all(type(d) is int and d in local_blocks for d in documents)
        and len({*documents}) == len(documents),
        "field 'meta.documents'",
        documents,
        f"list different numbers of local blocks, 0 to {num_blocks - 2}"
        if local_blocks
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
    supporting = value.get("supporting", [])
    check_field(
        isinstance(supporting, list) and all(type(s) is int and s in documents for s in supporting),
        "field 'meta.supporting'",
        supporting,
        "list some of meta.documents",
    )
    _check_json(value, "meta")
    return dict(value)


def _check_json(value: Any, path: str, depth: int = 0) -> None:
    """Check that a value can be written as JSON in UTF-8.

    Raises:
        RecordError: the value is nested too deeply, or holds a number that is not finite, a text that is not
            valid Unicode, or anything that JSON does not know.
    """
    name = f"field {path!r}"
    check_field(depth <= MAX_META_DEPTH, name, value, f"have at most {MAX_META_DEPTH} levels")
    if isinstance(value, str):
        parse_text(value, name, may_be_blank=True)
    elif isinstance(value, dict):
        for key, element in value.items():
            parse_text(key, f"a key of {name}", may_be_blank=True)
            _check_json(element, f"{path}.{key}", depth + 1)
    elif is_list(value):
        for i, element in enumerate(value):
            _check_json(element, f"{path}[{i}]", depth + 1)
    else:
        check_field(value is None or type(value) is bool or is_number(value), name, value, "be JSON")
