"""Chat and instruction formats: parsers of chats, Alpaca, and prompts that already contain a chat template.

Each parser takes a record and a default id for its samples. A record gives one sample per answer. The samples
of a record with several answers are numbered (`id#1`, `id#2`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockft.data.fields import CHAT_COPIES, LEARN_FLAGS, SYSTEM_FIELDS
from blockft.data.sample import (
    EVIDENCE_MARKS,
    NO_EVIDENCE,
    Message,
    RecordDropped,
    RecordError,
    Sample,
    check_field,
    get_field,
    is_number,
    join_text_parts,
    parse_flag,
    parse_id,
    parse_templated_blocks,
    parse_text,
)

CHAT_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model"), "assistant"),
}
"""The roles that chats use, and the role of the message. A developer's message is a system message."""

NOT_LEARNED = "no answer to learn"
"""The reason for dropping a chat whose answers all have the weight 0."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A turn of a chat; `path` is the field of its role. An answer may be context only."""

    role: str
    text: str
    path: str
    is_learned: bool = True


def parse_messages_record(record: Any, default_id: str) -> Iterator[Sample]:
    """Parse a chat into one sample per answer. The prompt of an answer is the chat before it.

    ::

        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                      {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox"}]}
        -> sample #1: Hi -> Hello    sample #2: Hi, Hello, Who? -> The fox

    Tulu 3 and OpenAI write `messages` with `role` and `content`, ShareGPT writes `conversations` with `from`
    and `value`. A field `system` (or `system_prompt`, `system_message`, `system_instruction`) may hold the
    system message. A content may be a list of text parts. A field such as `response` may repeat a message.

    User and assistant alternate, after at most one system message. A blank system message is ignored. A blank
    answer ends the chat, because nothing can be learned from it or from its continuation. An answer with the
    weight 0 (or `train`, `training`, `trainable`, `loss` false) is part of the later prompts only.

    Raises:
        RecordDropped: no answer is to be learned.
        RecordError: the turns do not alternate, a question is blank, a message has another role, or there is
            no answer.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    names = [name for name in ("messages", "conversations") if record.get(name) not in (None, [])]
    check_field(len(names) < 2, "the record", list(record), "have either 'messages' or 'conversations'")
    name = names[0] if names else "messages"
    messages = get_field(record, name)
    turns = parse_turns(messages, name)
    system = _system_text(record)
    _check_copies(record, turns)
    id, source = _id_or_default(record, default_id), _text_or_default(record, "source", "messages")
    return samples_of_chat(id, source, system, turns)


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
    history = get_field(record, "history", [])
    check_field(isinstance(history, list), "field 'history'", history, "be a list of pairs of texts")
    turns = []
    for i, pair in enumerate(history):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        check_field(is_pair, f"field 'history[{i}]'", pair, "be a pair of texts")
        for j, role in enumerate(("user", "assistant")):
            path = f"history[{i}][{j}]"
            turns.append(Turn(role=role, text=parse_text(pair[j], f"field {path!r}"), path=path))
    instruction = parse_text(get_field(record, "instruction"), "field 'instruction'")
    input = _optional_text(record, "input")
    prompt = f"{instruction}\n\n{input}" if input else instruction
    output = parse_text(get_field(record, "output"), "field 'output'")
    turns += [
        Turn(role="user", text=prompt, path="instruction"),
        Turn(role="assistant", text=output, path="output"),
    ]
    id, source = _id_or_default(record, default_id), _text_or_default(record, "source", "alpaca")
    return samples_of_chat(id, source, _system_text(record), turns)


def parse_blocks(record: Any, default_id: str) -> Iterator[Sample]:
    """Parse the two formats of the authors of Block-Attention, whose prompts contain the chat template.

    ::

        {"prompt": "<|user|>\\nOne. Who?<|assistant|>\\n", "blocks": ["<|user|>\\n", "One. ", "Who?..."],
         "response": "The fox"}
        -> the blocks as given

        {"prompt": "...- Title: A\\nOne.\\n- Title: B\\nTwo.\\nWho?...", "generated": "The fox",
         "documents": [{"title": "A", "text": "One.", "score": 0.5}, ...], "answers": ["fox"]}
        -> a block before the documents, one block per document, the rest as final block; score is relevance

    The released files of the first format say `chunks` in place of `blocks`. Their token ids are not used. If
    `train_block` is false, the prompt is one block, so that it is learned with full attention.

    Raises:
        RecordError: the blocks do not join to the prompt, or the prompt does not contain the documents in
            their order.
    """
    check_field(isinstance(record, Mapping), "the record", record, "be a JSON object")
    prompt = parse_text(get_field(record, "prompt"), "field 'prompt'")
    id = _id_or_default(record, default_id)
    kinds = ("blocks", "chunks", "documents")
    given = [name for name in kinds if record.get(name) is not None]
    names = [name for name in given if record[name] != []] or given[:1]
    check_field(len(names) < 2, "the record", list(record), "have one of 'blocks', 'chunks' and 'documents'")
    name = names[0] if names else "blocks"
    if name == "documents":
        return iter([_parse_rag_record(record, prompt, id)])
    templated = parse_templated_blocks(get_field(record, name), name)
    check_field("".join(templated) == prompt, f"field {name!r}", list(templated), "join to the prompt")
    answers = _accepted_answers(record)
    sample = Sample(
        id=id,
        source=_text_or_default(record, "source", "blocks"),
        templated=templated,
        response=_response(record, "response", "generated", answers),
        answers=answers,
        meta=_question(record),
    )
    return iter([_in_one_block(sample, record)])


def _parse_rag_record(record: Mapping[str, Any], prompt: str, id: str) -> Sample:
    answers = _accepted_answers(record)
    documents = get_field(record, "documents")
    check_field(isinstance(documents, list), "field 'documents'", documents, "be a list of documents")
    starts, end = _document_offsets(prompt, documents)
    # the new line after a document belongs to the document, also after the last one
    bounds = [0, *starts, end + prompt.startswith("\n", end), len(prompt)] if starts else [0, len(prompt)]
    texts = [prompt[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    num_before = int(bool(texts[0]))
    check_field(bool(texts[-1].strip()), "field 'prompt'", prompt[-40:], "continue after the last document")
    meta = _question(record)
    if starts:
        meta["documents"] = list(range(num_before, num_before + len(starts)))
    scores = [document.get("score") for document in documents]
    for i, (document, score) in enumerate(zip(documents, scores, strict=True)):
        for mark in EVIDENCE_MARKS:
            parse_flag(document, mark, False, path=f"documents[{i}].")  # raises if it is no flag
        is_score = score is None or is_number(score)
        check_field(is_score, f"field 'documents[{i}].score'", score, "be a number")
    if scores and None not in scores:
        meta["relevance"] = scores
    sample = Sample(
        id=id,
        source=_text_or_default(record, "source", "blocks"),
        templated=tuple(texts if num_before else texts[1:]),
        response=_response(record, "generated", "response", answers),
        answers=answers,
        meta=meta,
    )
    return _in_one_block(sample, record)


def _accepted_answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    answers = get_field(record, "answers", [])
    check_field(isinstance(answers, list), "field 'answers'", answers, "be a list of texts")
    return tuple(parse_text(answer, f"field 'answers[{i}]'") for i, answer in enumerate(answers))


def _response(record: Mapping[str, Any], name: str, other: str, answers: Sequence[str]) -> str:
    """Return the response, which may be blank if there are answers; the field `other` may only repeat it."""
    value = get_field(record, name, "") if answers else get_field(record, name)
    response = parse_text(value, f"field {name!r}", may_be_blank=bool(answers))
    repeats = record.get(other) in (None, "", response)
    check_field(repeats, f"field {other!r}", record.get(other), f"be absent: the response is {name!r}")
    return response


def _in_one_block(sample: Sample, record: Mapping[str, Any]) -> Sample:
    """Return the sample; its prompt becomes one block if `train_block` is false."""
    if parse_flag(record, "train_block", True):
        return sample
    return replace(sample, templated=("".join(sample.templated),), meta=_question(record))


def _question(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata with the question of a record, which a templated prompt does not show."""
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        return {}
    return {"question": parse_text(question, "field 'question'")}


def unsupported_blocks(record: Mapping[str, Any]) -> str:
    """Return why the documents of a `blocks` record are known not to support the answer; "" if they may.

    Documents may be marked as gold or as having the answer. Without any mark all of them may support it.
    """
    documents = get_field(record, "documents", [])
    marks = [bool(d[mark]) for d in documents for mark in EVIDENCE_MARKS if d.get(mark) is not None]
    return NO_EVIDENCE if marks and not any(marks) else ""


def _document_offsets(prompt: str, documents: Sequence[Any]) -> tuple[list[int], int]:
    """Return where each document starts in the prompt, and where the last one ends (0 without documents)."""
    starts, end = [], 0
    for i, document in enumerate(documents):
        name = f"field 'documents[{i}]"
        check_field(isinstance(document, Mapping), f"{name}'", document, 'be {"title", "text"}')
        path = f"documents[{i}]."
        title = parse_text(get_field(document, "title", path=path), f"{name}.title'", may_be_blank=True)
        text = parse_text(get_field(document, "text", path=path), f"{name}.text'", may_be_blank=True)
        expected = f"- Title: {title}\n{text.strip()}"
        start = prompt.find(expected, end)
        rule = "be in the prompt after the documents before it, as '- Title: ...'"
        check_field(start >= 0, f"{name}'", title, rule)
        starts.append(start)
        end = start + len(expected)
    return starts, end


def parse_turns(messages: Any, name: str) -> list[Turn]:
    """Parse the list of messages in the field `name` of a record.

    Raises:
        RecordError: a field is missing or has the wrong type, or a question is blank.
    """
    is_nonempty_list = isinstance(messages, list) and bool(messages)
    check_field(is_nonempty_list, f"field {name!r}", messages, "be a list of messages")
    return [_parse_turn(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _parse_turn(message: Any, path: str) -> Turn:
    check_field(isinstance(message, Mapping), f"field {path!r}", message, 'be {"role", "content"}')
    kinds = (("role", "content"), ("from", "value"))
    given = [kind for kind in kinds if any(message.get(key) is not None for key in kind)]
    check_field(len(given) == 1, f"field {path!r}", list(message), 'have the keys "role" and "content"')
    role_key, text_key = given[0]
    given_role = get_field(message, role_key, path=f"{path}.")
    is_role = isinstance(given_role, str) and given_role in CHAT_ROLES
    check_field(is_role, f"field '{path}.{role_key}'", given_role, f"be one of {', '.join(CHAT_ROLES)}")
    role = CHAT_ROLES[given_role]
    content = get_field(message, text_key, path=f"{path}.")
    if isinstance(content, list):
        content = join_text_parts(content, f"{path}.{text_key}")
    # a blank question is an error; a blank answer ends the chat and a blank system message is ignored
    text = parse_text(content, f"field '{path}.{text_key}'", may_be_blank=role != "user")
    return Turn(role=role, text=text, path=f"{path}.{role_key}", is_learned=_is_learned(message, role, path))


def _check_copies(record: Mapping[str, Any], turns: Sequence[Turn]) -> None:
    """Check that fields such as `response` only repeat a message.

    Raises:
        RecordError: a field holds something else, which may be a system message or another answer.
    """
    for name in CHAT_COPIES:
        value = record.get(name)
        text = value.strip() if isinstance(value, str) else value
        repeats = text in (None, "", [], {}) or any(text == turn.text.strip() for turn in turns)
        rule = "be absent, or repeat a message: the chat stands in the messages"
        check_field(repeats, f"field {name!r}", value, rule)


def _is_learned(message: Mapping[str, Any], role: str, path: str) -> bool:
    """Return whether an answer is learned; its flags may say that it is context only.

    Raises:
        RecordError: a flag is neither true nor false, or two flags contradict each other, or a message that
            is no answer should be learned.
    """
    if message.keys().isdisjoint(LEARN_FLAGS):
        return True
    flags = {name: message[name] for name in LEARN_FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        is_flag = type(value) in (bool, int, float) and value in (0, 1)
        check_field(is_flag, f"field '{path}.{name}'", value, "be 0 or 1: an answer is learned, or it is not")
        rule = "be 0 or absent: only the answers of the assistant are learned"
        check_field(role == "assistant" or not value, f"field '{path}.{name}'", value, rule)
    check_field(len({*map(bool, flags.values())}) < 2, f"field {path!r}", flags, "not contradict itself")
    return all(flags.values())


def samples_of_chat(id: str, source: str, system: str, turns: Sequence[Turn]) -> Iterator[Sample]:
    """Return one sample per learned answer of a chat, up to the first blank answer.

    Raises:
        RecordDropped: no answer is to be learned.
        RecordError: the turns do not alternate, the first turn is another system message than `system`, or
            there is no answer.
    """
    if turns and turns[0].role == "system":
        rule = "be absent, or equal the first message, which is a system message"
        is_same = not system or system.strip() == turns[0].text.strip()
        check_field(is_same, "the system message of the record", system, rule)
        system, turns = turns[0].text, turns[1:]
    for i, turn in enumerate(turns):
        role = ("user", "assistant")[i % 2]
        rule = f"be {role}: turns alternate, after at most one system message"
        check_field(turn.role == role, f"field {turn.path!r}", turn.role, rule)
    num_answers = len(turns) // 2
    answers = [turn.text for turn in turns[1::2]]
    num_before_blank = next((i for i, answer in enumerate(answers) if not answer.strip()), num_answers)
    if not num_before_blank:
        raise RecordError("no answer of the assistant to learn: there is none, or the first one is blank")
    prompt = [Message(role="system", content=(system,))] if system.strip() else []
    samples = []
    pairs = zip(turns[::2], turns[1 : 2 * num_before_blank : 2], strict=False)
    for number, (question, answer) in enumerate(pairs, start=1):
        prompt.append(Message(role="user", content=(question.text,)))
        sample_id = id if num_answers == 1 else f"{id}#{number}"
        if answer.is_learned:
            samples.append(Sample(id=sample_id, source=source, messages=tuple(prompt), response=answer.text))
        prompt.append(Message(role="assistant", content=(answer.text,)))
    if not samples:
        raise RecordDropped(NOT_LEARNED)
    return iter(samples)


def _id_or_default(record: Mapping[str, Any], default: str) -> str:
    """Return the id of the record, or the default if the id is missing, null or blank."""
    value = get_field(record, "id", default)
    is_blank = isinstance(value, str) and not value.strip()
    return default if is_blank else parse_id(value, "field 'id'")


def _text_or_default(record: Mapping[str, Any], name: str, default: str) -> str:
    """Return a text of the record, or the default if the field is missing, blank or not a text."""
    value = record.get(name)
    return parse_text(value, f"field {name!r}") if isinstance(value, str) and value.strip() else default


def _optional_text(record: Mapping[str, Any], name: str, *, may_be_parts: bool = False) -> str:
    """Return a text of the record, or its text parts joined; "" if the field is missing, null or blank."""
    value = get_field(record, name, "")
    if may_be_parts and isinstance(value, list):
        value = join_text_parts(value, name)
    text = parse_text(value, f"field {name!r}", may_be_blank=True)
    return text if text.strip() else ""


def _system_text(record: Mapping[str, Any]) -> str:
    """Return the system message that a field of the record holds; "" if there is none.

    Raises:
        RecordError: two fields hold different system messages.
    """
    texts = {
        name: text for name in SYSTEM_FIELDS if (text := _optional_text(record, name, may_be_parts=True))
    }
    is_one = len(set(texts.values())) < 2
    check_field(is_one, "the record", list(texts), "hold its system message in one field")
    return next(iter(texts.values()), "")
