"""Chat and instruction formats: parsers of chats, Alpaca, and prompts that already contain a chat template.

Each parser takes a record and a default id for its samples. A record gives one sample per answer. The samples
of a record with several answers are numbered (`id#1`, `id#2`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockft.data.sample import (
    Message,
    RecordError,
    Sample,
    check_field,
    get_field,
    parse_templated_blocks,
    parse_text,
)

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""The roles that chats use, and the role of the message."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A turn of a chat; `field_name` is its field, for error messages, without the closing quote."""

    role: str
    text: str
    field_name: str


def parse_messages_record(record: Any, default_id: str) -> Iterator[Sample]:
    """Parse a chat into one sample per answer. The prompt of an answer is the chat before it.

    ::

        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                      {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox"}]}
        -> sample #1: Hi -> Hello    sample #2: Hi, Hello, Who? -> The fox

    Tulu 3 and OpenAI write `messages` with `role` and `content`, ShareGPT writes `conversations` with `from`
    and `value`. A field `system` may hold the system message.

    User and assistant alternate, after at most one system message. A blank system message is ignored. A blank
    answer ends the chat, because nothing can be learned from it or from its continuation.

    Raises:
        RecordError: the turns do not alternate, a question is blank, a message calls a tool, or there is no
            answer.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    name = "conversations" if "messages" not in record and "conversations" in record else "messages"
    messages = get_field(record, name)
    is_nonempty_list = isinstance(messages, list) and bool(messages)
    check_field(is_nonempty_list, f"field {name!r}", messages, "be a list of messages")
    turns = [_parse_turn(message, f"field '{name}[{i}]") for i, message in enumerate(messages)]
    system = _optional_text(record, "system")
    if turns[0].role == "system":
        check_field(
            not system, "field 'system'", system, "be absent if the first message is a system message"
        )
        system, turns = turns[0].text, turns[1:]
    return _samples_of_chat(record, default_id, "messages", system, turns)


def parse_alpaca(record: Any, default_id: str) -> Iterator[Sample]:
    """Parse a record of Alpaca into one sample per answer.

    ::

        {"instruction": "Translate.", "input": "Hallo", "output": "Hello",
         "system": "Be brief.", "history": [["Hi", "Hey"]]}
        -> sample #1: Be brief., Hi -> Hey    sample #2: Be brief., Hi, Hey, Translate.\\n\\nHallo -> Hello

    The prompt is the instruction, a blank line and the input. `input`, `system` and `history` are optional.

    Raises:
        RecordError: a field is missing, blank or of the wrong type.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    history = record.get("history") or []
    check_field(isinstance(history, list), "field 'history'", history, "be a list of pairs of texts")
    turns = []
    for i, pair in enumerate(history):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        check_field(is_pair, f"field 'history[{i}]'", pair, "be a pair of texts")
        for j, role in enumerate(("user", "assistant")):
            name = f"field 'history[{i}][{j}]"
            turns.append(_Turn(role=role, text=parse_text(pair[j], f"{name}'"), field_name=name))
    instruction = parse_text(get_field(record, "instruction"), "field 'instruction'")
    input = _optional_text(record, "input")
    prompt = f"{instruction}\n\n{input}" if input else instruction
    output = parse_text(get_field(record, "output"), "field 'output'")
    turns += [
        _Turn(role="user", text=prompt, field_name="field 'instruction"),
        _Turn(role="assistant", text=output, field_name="field 'output"),
    ]
    return _samples_of_chat(record, default_id, "alpaca", _optional_text(record, "system"), turns)


def parse_blocks(record: Any, default_id: str) -> Iterator[Sample]:
    """Parse the two formats of the authors of Block-Attention, whose prompts contain the chat template.

    ::

        {"prompt": "<|user|>\\nOne. Who?<|assistant|>\\n", "blocks": ["<|user|>\\n", "One. ", "Who?..."],
         "response": "The fox"}
        -> the blocks as given

        {"prompt": "...- Title: A\\nOne.\\n- Title: B\\nTwo.\\nWho?...", "generated": "The fox",
         "documents": [{"title": "A", "text": "One.", "score": 0.5}, ...], "answers": ["fox"]}
        -> a block before the documents, one block per document, the rest as final block; score is relevance

    The released files of the first format say `chunks` in place of `blocks`. Other fields are ignored, token
    ids among them.

    Raises:
        RecordError: the blocks do not join to the prompt, or the prompt does not contain the documents in
            their order.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    prompt = parse_text(get_field(record, "prompt"), "field 'prompt'")
    id = _text_or_default(record, "id", default_id)
    name = "chunks" if "blocks" not in record and "chunks" in record else "blocks"
    if name not in record and "documents" in record:
        return iter([_parse_rag_record(record, prompt, id)])
    templated = parse_templated_blocks(get_field(record, name), name)
    check_field("".join(templated) == prompt, f"field {name!r}", list(templated), "join to the prompt")
    response = parse_text(get_field(record, "response"), "field 'response'")
    source = _text_or_default(record, "source", "blocks")
    return iter([Sample(id=id, source=source, templated=templated, response=response)])


def _parse_rag_record(record: Mapping[str, Any], prompt: str, id: str) -> Sample:
    answers = record.get("answers") or []
    check_field(isinstance(answers, list), "field 'answers'", answers, "be a list of texts")
    response = record.get("generated") or ""
    documents = get_field(record, "documents")
    check_field(isinstance(documents, list), "field 'documents'", documents, "be a list of documents")
    starts, end = _document_offsets(prompt, documents)
    # the new line after a document belongs to the document, also after the last one
    bounds = [0, *starts, end + prompt.startswith("\n", end), len(prompt)] if starts else [0, len(prompt)]
    texts = [prompt[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    num_before = int(bool(texts[0]))
    check_field(bool(texts[-1].strip()), "field 'prompt'", prompt[-40:], "continue after the last document")
    meta: dict[str, Any] = {}
    if starts:
        meta["documents"] = list(range(num_before, num_before + len(starts)))
    scores = [document.get("score") for document in documents]
    if scores and all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        meta["relevance"] = scores
    return Sample(
        id=id,
        source=_text_or_default(record, "source", "blocks"),
        templated=tuple(texts if num_before else texts[1:]),
        response=parse_text(response, "field 'generated'", may_be_blank=bool(answers)),
        answers=tuple(parse_text(answer, f"field 'answers[{i}]'") for i, answer in enumerate(answers)),
        meta=meta,
    )


def _document_offsets(prompt: str, documents: Sequence[Any]) -> tuple[list[int], int]:
    """Return where each document starts in the prompt, and where the last one ends (0 without documents)."""
    starts, end = [], 0
    for i, document in enumerate(documents):
        name = f"field 'documents[{i}]"
        check_field(isinstance(document, Mapping), f"{name}'", document, 'be {"title", "text"}')
        title = parse_text(get_field(document, "title"), f"{name}.title'", may_be_blank=True)
        text = parse_text(get_field(document, "text"), f"{name}.text'", may_be_blank=True)
        expected = f"- Title: {title}\n{text.strip()}"
        start = prompt.find(expected, end)
        rule = "be in the prompt after the documents before it, as '- Title: ...'"
        check_field(start >= 0, f"{name}'", title, rule)
        starts.append(start)
        end = start + len(expected)
    return starts, end


def _parse_turn(message: Any, name: str) -> _Turn:
    check_field(isinstance(message, Mapping), f"{name}'", message, 'be {"role", "content"}')
    for key in ("tool_calls", "function_call"):
        value = message.get(key)
        check_field(not value, f"{name}.{key}'", value, "be absent: calls of tools cannot be learned")
    role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
    role, text = (_message_text(message, key, name) for key in (role_key, text_key))
    check_field(role in ROLES, f"{name}.{role_key}'", role, f"be one of {', '.join(ROLES)}")
    # a blank question is an error; a blank answer ends the chat and a blank system message is ignored
    may_be_blank = ROLES[role] != "user"
    text = parse_text(text, f"{name}.{text_key}'", may_be_blank=may_be_blank)
    return _Turn(role=ROLES[role], text=text, field_name=name)


def _samples_of_chat(
    record: Mapping[str, Any], default_id: str, source: str, system: str, turns: Sequence[_Turn]
) -> Iterator[Sample]:
    """Return one sample per answer of a chat, up to the first blank answer."""
    for i, turn in enumerate(turns):
        role = ("user", "assistant")[i % 2]
        check_field(turn.role == role, f"{turn.field_name}'", turn.role, f"be of the {role}: turns alternate")
    num_answers = len(turns) // 2
    answers = [turn.text for turn in turns[1::2]]
    num_before_blank = next((i for i, answer in enumerate(answers) if not answer.strip()), num_answers)
    if not num_before_blank:
        raise RecordError("no answer of the assistant to learn: there is none, or the first one is blank")
    prompt = [Message(role="system", content=(system,))] if system.strip() else []
    id, source = _text_or_default(record, "id", default_id), _text_or_default(record, "source", source)
    samples = []
    pairs = zip(turns[::2], answers[:num_before_blank], strict=False)
    for number, (question, answer) in enumerate(pairs, start=1):
        prompt.append(Message(role="user", content=(question.text,)))
        sample_id = id if num_answers == 1 else f"{id}#{number}"
        samples.append(Sample(id=sample_id, source=source, messages=tuple(prompt), response=answer))
        prompt.append(Message(role="assistant", content=(answer,)))
    return iter(samples)


def _message_text(message: Mapping[str, Any], key: str, name: str) -> str:
    check_field(key in message, f"{name}'", list(message), f"have the key {key!r}")
    check_field(isinstance(message[key], str), f"{name}.{key}'", message[key], "be a text")
    return str(message[key])


def _text_or_default(record: Mapping[str, Any], name: str, default: str) -> str:
    """Return a text of the record, or the default if the field is missing, blank or not a text."""
    value = record.get(name)
    return parse_text(value, f"field {name!r}") if isinstance(value, str) and value.strip() else default


def _optional_text(record: Mapping[str, Any], name: str) -> str:
    """Return a text of the record; "" if the field is missing, null or blank."""
    text = parse_text(record.get(name) or "", f"field {name!r}", may_be_blank=True)
    return text if text.strip() else ""
