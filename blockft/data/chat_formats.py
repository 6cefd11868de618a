"""Instruction data as others publish it: chats, Alpaca, and prompts that arrive already templated.

Each reader takes a record and `at`, a name for it: the id of its sample if it has none of its own. A record
gives one sample per answer; several of one record are numbered (`id#1`, `id#2`).
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
"""How chats spell the roles of a message."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    role: str
    text: str
    at: str


def parse_messages_record(record: Any, at: str) -> Iterator[Sample]:
    """A chat, one sample per answer: the prompt is all that was said before.

    It is spelt as `messages` with `role` and `content` (Tulu 3, OpenAI), or as `conversations` with `from`
    and `value` (ShareGPT); a field `system` may hold the system message.

    User and assistant alternate, after at most one system message; a blank one counts as none. A blank answer
    ends the chat, as nothing can be learnt from it or from what was said in reply.

    Raises:
        RecordError: turns that do not alternate, blank questions, no answer, calls of tools.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    name = "conversations" if "messages" not in record and "conversations" in record else "messages"
    found = get_field(record, name)
    check_field(isinstance(found, list) and bool(found), f"field {name!r}", found, "be a list of messages")
    turns = [_parse_turn(message, f"field '{name}[{i}]") for i, message in enumerate(found)]
    system = _optional_text(record, "system")
    if turns[0].role == "system":
        check_field(not system, "field 'system'", system, "be absent beside a system message")
        system, turns = turns[0].text, turns[1:]
    return _samples_of_chat(record, at, "messages", system, turns)


def parse_alpaca(record: Any, at: str) -> Iterator[Sample]:
    """A record of Alpaca: `instruction`, `input`, `output`, perhaps `system` and `history` (pairs of texts).

    The prompt is the instruction, a blank line and the input; the answers of the history are learnt, too.

    Raises:
        RecordError: a field is missing, blank or ill-typed.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    history = record.get("history") or []
    check_field(isinstance(history, list), "field 'history'", history, "be a list of pairs of texts")
    turns = []
    for i, pair in enumerate(history):
        check_field(
            isinstance(pair, list | tuple) and len(pair) == 2,
            f"field 'history[{i}]'",
            pair,
            "be a pair of texts",
        )
        for j, role in enumerate(("user", "assistant")):
            name = f"field 'history[{i}][{j}]"
            turns.append(_Turn(role=role, text=parse_text(pair[j], f"{name}'"), at=name))
    instruction = parse_text(get_field(record, "instruction"), "field 'instruction'")
    given = _optional_text(record, "input")
    turns += [
        _Turn(
            role="user",
            text=f"{instruction}\n\n{given}" if given else instruction,
            at="field 'instruction",
        ),
        _Turn(
            role="assistant",
            text=parse_text(get_field(record, "output"), "field 'output'"),
            at="field 'output",
        ),
    ]
    return _samples_of_chat(record, at, "alpaca", _optional_text(record, "system"), turns)


def parse_blocks(record: Any, at: str) -> Iterator[Sample]:
    """The two formats of the Block-Attention authors, both already templated.

    Training data is `{"prompt", "blocks", "response"}` (`chunks` in the released files): its blocks are kept
    as given. RAG data is `{"prompt", "documents": [{"title", "text", "score"}], "generated", "answers"}`: its
    prompt is cut where the documents stand, each as `- Title: title`, a new line and the text. Other fields,
    token ids among them, are passed over.

    Raises:
        RecordError: blocks that do not join to the prompt, documents that it does not hold in their order.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    prompt = parse_text(get_field(record, "prompt"), "field 'prompt'")
    own_id = _record_text(record, "id", at)
    name = "chunks" if "blocks" not in record and "chunks" in record else "blocks"
    if name not in record and "documents" in record:
        return iter([_rag_sample(record, prompt, own_id)])
    templated = parse_templated_blocks(get_field(record, name), name)
    check_field("".join(templated) == prompt, f"field {name!r}", list(templated), "join to the prompt")
    response = parse_text(get_field(record, "response"), "field 'response'")
    source = _record_text(record, "source", "blocks")
    return iter([Sample(id=own_id, source=source, templated=templated, response=response)])


def _rag_sample(record: Mapping[str, Any], prompt: str, id: str) -> Sample:
    answers = record.get("answers") or []
    check_field(isinstance(answers, list), "field 'answers'", answers, "be a list of texts")
    response = record.get("generated") or ""
    documents = get_field(record, "documents")
    check_field(isinstance(documents, list), "field 'documents'", documents, "be a list of documents")
    starts, end = _document_offsets(prompt, documents)
    # the new line after the last document is part of it, as of all others
    edges = [0, *starts, end + prompt.startswith("\n", end), len(prompt)] if starts else [0, len(prompt)]
    texts = [prompt[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    first = int(bool(texts[0]))
    check_field(bool(texts[-1].strip()), "field 'prompt'", prompt[-40:], "go on after the last document")
    meta: dict[str, Any] = {"documents": list(range(first, first + len(starts)))} if starts else {}
    scores = [document.get("score") for document in documents]
    if scores and all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        meta["relevance"] = scores
    return Sample(
        id=id,
        source=_record_text(record, "source", "blocks"),
        templated=tuple(texts if first else texts[1:]),
        response=parse_text(response, "field 'generated'", may_be_blank=bool(answers)),
        answers=tuple(parse_text(answer, f"field 'answers[{i}]'") for i, answer in enumerate(answers)),
        meta=meta,
    )


def _document_offsets(prompt: str, documents: Sequence[Any]) -> tuple[list[int], int]:
    """Where each document starts in a prompt, and where the last one ends."""
    starts, end = [], 0
    for i, document in enumerate(documents):
        name = f"field 'documents[{i}]"
        check_field(isinstance(document, Mapping), f"{name}'", document, 'be {"title", "text"}')
        title = parse_text(get_field(document, "title"), f"{name}.title'", may_be_blank=True)
        text = parse_text(get_field(document, "text"), f"{name}.text'", may_be_blank=True)
        written = f"- Title: {title}\n{text.strip()}"
        start = prompt.find(written, end)
        check_field(
            start >= 0, f"{name}'", title, "stand in the prompt after those before it, as '- Title: ...'"
        )
        starts.append(start)
        end = start + len(written)
    return starts, end


def _parse_turn(message: Any, name: str) -> _Turn:
    check_field(isinstance(message, Mapping), f"{name}'", message, 'be {"role", "content"}')
    for key in ("tool_calls", "function_call"):
        check_field(
            not message.get(key),
            f"{name}.{key}'",
            message.get(key),
            "be absent: calls of tools cannot be learnt",
        )
    role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
    role, text = (_message_text(message, key, name) for key in (role_key, text_key))
    check_field(role in ROLES, f"{name}.{role_key}'", role, f"be one of {', '.join(ROLES)}")
    # a blank question is no question; a blank answer or system message may be passed over
    return _Turn(
        role=ROLES[role],
        text=parse_text(text, f"{name}.{text_key}'", may_be_blank=ROLES[role] != "user"),
        at=name,
    )


def _samples_of_chat(
    record: Mapping[str, Any], at: str, source: str, system: str, turns: Sequence[_Turn]
) -> Iterator[Sample]:
    """One sample per answer of a chat that has passed the checks, up to the first blank answer."""
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        check_field(turn.role == expected, f"{turn.at}'", turn.role, f"be of the {expected}: turns alternate")
    num_answers = len(turns) // 2
    answers = [turn.text for turn in turns[1::2]]
    blank = next((i for i, answer in enumerate(answers) if not answer.strip()), num_answers)
    if not blank:
        raise RecordError("no answer of the assistant to learn: there is none, or the first one is blank")
    prompt = [Message(role="system", content=(system,))] if system.strip() else []
    id, source = _record_text(record, "id", at), _record_text(record, "source", source)
    samples = []
    for number, (question, answer) in enumerate(zip(turns[::2], answers[:blank], strict=False), start=1):
        prompt.append(Message(role="user", content=(question.text,)))
        numbered = id if num_answers == 1 else f"{id}#{number}"
        samples.append(Sample(id=numbered, source=source, messages=tuple(prompt), response=answer))
        prompt.append(Message(role="assistant", content=(answer,)))
    return iter(samples)


def _message_text(message: Mapping[str, Any], key: str, name: str) -> str:
    check_field(key in message, f"{name}'", list(message), f"have the key {key!r}")
    check_field(isinstance(message[key], str), f"{name}.{key}'", message[key], "be a text")
    return str(message[key])


def _record_text(record: Mapping[str, Any], name: str, default: str) -> str:
    """A text of the record, or the default where it has none."""
    found = record.get(name)
    return parse_text(found, f"field {name!r}") if isinstance(found, str) and found.strip() else default


def _optional_text(record: Mapping[str, Any], name: str) -> str:
    """A text that may be missing, null or blank; empty if it is."""
    text = parse_text(record.get(name) or "", f"field {name!r}", may_be_blank=True)
    return text if text.strip() else ""
