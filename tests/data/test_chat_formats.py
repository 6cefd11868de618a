import json
import os
from pathlib import Path
from typing import Any

import pytest

from blockft.data.chat_formats import (
    parse_alpaca,
    parse_blocks,
    parse_messages_record,
    unsupported_blocks,
)
from blockft.data.fit import trim_document
from blockft.data.sample import RecordDropped, RecordError, parse_sample, sample_to_record

AT = "file.jsonl, line 7"
TURNS = (
    ("system", "Be brief."),
    ("user", "Hi"),
    ("assistant", "Hello."),
    ("user", "Who?"),
    ("assistant", "Me."),
)
OPEN = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSome notes.\n\n"
CLOSE = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
NOTES = [
    {"title": "A", "text": " One.\n- Title: no document\nMore. ", "score": 0.5},
    {"title": "A", "text": "", "score": 0.25},
    {"title": "B", "text": "Two.", "score": 0.75},
]
WRITTEN = ["- Title: A\nOne.\n- Title: no document\nMore.\n", "- Title: A\n\n", "- Title: B\nTwo.\n"]
RAG: dict[str, Any] = {
    "prompt": OPEN + "".join(WRITTEN) + CLOSE,
    "question": "Who?",
    "answers": ["Fox", "The fox"],
    "generated": "The fox.",
    "documents": NOTES,
    "inputs": {"input_ids": [], "labels": []},
}
TRAINING: dict[str, Any] = {
    "prompt": "<|user|>\nOne.\n\nTwo?\n<|assistant|>\n",
    "blocks": ["<|user|>\nOne.\n\n", "Two?\n<|assistant|>\n"],
    "response": "Yes.<|end_of_text|>",
}


def tulu(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **fields}


def test_a_chat_is_one_sample_per_answer() -> None:
    first, second = parse_messages_record(tulu(*TURNS, id="x", source="tulu/y", extra=1), AT)
    assert [(m.role, m.content) for m in second.messages] == [(role, (text,)) for role, text in TURNS[:-1]]
    assert first.messages == second.messages[:2]
    assert (first.response, second.response) == ("Hello.", "Me.")
    assert (first.id, second.id, first.source, first.meta) == ("x#1", "x#2", "tulu/y", {})


def test_a_sample_without_id_gets_the_default_id() -> None:
    (sample,) = parse_messages_record(tulu(*TURNS[1:3], id=" "), AT)
    assert (sample.id, sample.source) == (AT, "messages")
    assert next(parse_messages_record(tulu(*TURNS[1:3], id=5), AT)).id == "5"
    for id in (5.0, True, ["x"]):
        with pytest.raises(RecordError, match="field 'id' is .* a text or a whole number"):
            parse_messages_record(tulu(*TURNS[1:3], id=id), AT)
    assert [sample.id for sample in parse_messages_record(tulu(*TURNS), AT)] == [f"{AT}#1", f"{AT}#2"]


def weighted(*weights: Any, name: str = "weight") -> dict[str, Any]:
    """Return a chat of one question and answer for each weight."""
    messages: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        messages.append({"role": "user", "content": f"Q{number}"})
        messages.append({"role": "assistant", "content": f"A{number}", name: weight})
    return {"messages": messages}


@pytest.mark.parametrize("name", ["weight", "train", "training", "trainable", "loss"])
def test_an_answer_of_weight_0_stays_in_the_prompt_and_is_not_learned(name: str) -> None:
    for no, yes in ((0, 1), (False, True), (0.0, 1.0), (0, None)):
        (sample,) = parse_messages_record(weighted(no, yes, no, name=name), AT)
        assert (sample.id, sample.response) == (f"{AT}#2", "A1")
        assert [message.text for message in sample.messages] == ["Q0", "A0", "Q1"]
    with pytest.raises(RecordDropped, match="no answer to learn"):
        parse_messages_record(weighted(0, 0, name=name), AT)
    assert len([*parse_messages_record(weighted(1, None, name=name), AT)]) == 2


@pytest.mark.parametrize("weight", [0.5, 2, -1, "0", "1", [], float("nan")])
def test_any_other_weight_of_an_answer_is_refused_by_its_place(weight: Any) -> None:
    with pytest.raises(RecordError, match=r"field 'messages\[3\].weight' is .* 0 or 1"):
        parse_messages_record(weighted(1, weight), AT)


def test_flags_of_a_message_may_not_contradict_each_other_or_its_role() -> None:
    chat = weighted(1)
    chat["messages"][1]["train"] = False
    with pytest.raises(RecordError, match=r"'messages\[1\]' .* contradict"):
        parse_messages_record(chat, AT)
    chat = weighted(1)
    chat["messages"][0]["weight"] = 0
    assert [*parse_messages_record(chat, AT)] == [*parse_messages_record(weighted(1), AT)]
    chat["messages"][0]["weight"] = 1
    with pytest.raises(RecordError, match=r"'messages\[0\].weight' is 1.* only the answers"):
        parse_messages_record(chat, AT)


def test_text_parts_are_read_as_one_text() -> None:
    parts = [{"type": "text", "text": "Two plus "}, {"type": "text", "text": "two?"}]
    answer = [{"type": "text", "text": "Four."}]
    (sample,) = parse_messages_record(tulu(("user", parts), ("assistant", answer)), AT)
    assert (sample.blocks, sample.response) == (("Two plus two?",), "Four.")


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "system_instruction"])
def test_every_spelling_of_a_system_prompt_is_honoured(name: str) -> None:
    expected = [*parse_messages_record(tulu(*TURNS), AT)]
    assert [*parse_messages_record(tulu(*TURNS[1:], **{name: "Be brief."}), AT)] == expected
    (sample,) = parse_alpaca({"instruction": "Add.", "output": "3", name: "Be brief."}, AT)
    assert sample.blocks == ("Be brief.", "Add.")
    developer = [("developer", "Be brief."), *TURNS[1:]]
    assert [*parse_messages_record(tulu(*developer), AT)] == expected


def test_a_prompt_that_is_not_learned_in_blocks_is_one_block() -> None:
    (whole,) = parse_blocks(TRAINING | {"train_block": False}, AT)
    assert whole.blocks == (TRAINING["prompt"],)
    assert [*parse_blocks(TRAINING | {"train_block": True}, AT)] == [*parse_blocks(TRAINING, AT)]


@pytest.mark.parametrize(
    ("marks", "reason"),
    [
        ((None, None, None), ""),
        ((False, None, None), "no supporting document"),
        ((0, False, False), "no supporting document"),
        ((False, True, False), ""),
    ],
)
def test_marked_documents_of_a_templated_prompt_say_whether_they_support_it(
    marks: tuple[Any, ...], reason: str
) -> None:
    documents = [note | {"hasanswer": mark} for note, mark in zip(NOTES, marks, strict=True)]
    assert [*parse_blocks(RAG | {"documents": documents}, AT)] == [*parse_blocks(RAG, AT)]
    assert unsupported_blocks(RAG | {"documents": documents}) == reason
    with pytest.raises(RecordError, match=r"'documents\[0\].isgold' is 'no'"):
        parse_blocks(RAG | {"documents": [NOTES[0] | {"isgold": "no"}, *NOTES[1:]]}, AT)


def test_sharegpt_chats_are_read() -> None:
    spelt = {"user": "human", "assistant": "gpt"}
    conversation = [{"from": spelt[role], "value": text} for role, text in TURNS[1:]]
    assert [*parse_messages_record({"conversations": conversation, "system": "Be brief."}, AT)] == [
        *parse_messages_record(tulu(*TURNS), AT)
    ]
    assert [*parse_messages_record({"conversations": conversation, "system": ""}, AT)] == [
        *parse_messages_record(tulu(*TURNS[1:]), AT)
    ]
    system = {"from": "system", "value": "Be brief."}
    assert [*parse_messages_record({"conversations": [system, *conversation]}, AT)] == [
        *parse_messages_record(tulu(*TURNS), AT)
    ]


def test_a_blank_answer_ends_the_chat() -> None:
    (sample,) = parse_messages_record(tulu(*TURNS[1:4], ("assistant", " "), *TURNS[1:3], id="x"), AT)
    assert (sample.id, sample.response, len(sample.messages)) == ("x#1", "Hello.", 1)


def test_a_question_without_answer_and_a_blank_system_message_are_ignored() -> None:
    (sample,) = parse_messages_record(tulu(("system", " "), *TURNS[1:4], id="x"), AT)
    assert (sample.id, len(sample.messages)) == ("x", 1)


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ((("user", "Hi"),), "no answer"),
        ((("user", "Hi"), ("assistant", "")), "no answer"),
        ((("system", "Hi"),), "no answer"),
        ((("assistant", "Hi"), ("user", "Hi")), r"'messages\[0\].role' is 'assistant'"),
        ((("user", "Hi"), ("user", "Hi")), r"'messages\[1\].role' is 'user'"),
        ((*TURNS[1:3], ("system", "Hi"), ("assistant", "Hi")), r"'messages\[2\].role' is 'system'"),
        ((*TURNS[1:3], ("user", " \n"), ("assistant", "Hi")), r"'messages\[2\].content'"),
        ((("user", "Hi"), ("assistant", None)), r"'messages\[1\].content' is None"),
        ((("user", ["Hi"]), ("assistant", "Hi")), r"'messages\[0\].content\[0\]' is 'Hi'"),
        (
            (("user", "Hi"), ("assistant", [{"type": "text", "text": "Hi"}, {"type": "image_url"}])),
            r"'messages\[1\].content\[1\]'",
        ),
        (
            (("user", "Hi"), ("assistant", [{"type": "text", "text": 3}])),
            r"'messages\[1\].content\[0\].text' is 3",
        ),
        ((("user", []), ("assistant", "Hi")), r"'messages\[0\].content' .* blank"),
        ((("user", "\ud800"), ("assistant", "Hi")), "valid Unicode"),
        ((("user", "Hi"), ("tool", "Hi")), r"'messages\[1\].role' is 'tool'"),
    ],
)
def test_a_bad_chat_names_the_field(turns: tuple[tuple[str, Any], ...], field: str) -> None:
    with pytest.raises(RecordError, match=field):
        parse_messages_record(tulu(*turns), AT)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ([], "the record"),
        ({}, "'messages' is missing"),
        ({"messages": {}}, "'messages'"),
        ({"messages": ["Hi"]}, r"'messages\[0\]'"),
        ({"messages": [{"content": "Hi"}]}, r"'messages\[0\].role' is missing"),
        ({"conversations": [{"from": "human"}]}, r"'conversations\[0\].value' is missing"),
        (tulu(("user", "Hi"), ("assistant", "Yo"), system=3), "'system'"),
        (tulu(*TURNS, system="Be kind."), "or equal the first message, which is a system message"),
        ({"messages": [{"role": "user", "content": "Hi", "from": "gpt"}]}, r"'messages\[0\]'"),
        (tulu(*TURNS) | {"conversations": [{"from": "human", "value": "Hi"}]}, "either 'messages' or"),
        (tulu(*TURNS[1:], system="Be kind.", system_prompt="Be brief."), "one field"),
    ],
)
def test_a_record_that_is_not_a_chat_names_the_field(record: Any, field: str) -> None:
    with pytest.raises(RecordError, match=field):
        parse_messages_record(record, AT)


def test_alpaca_records_become_samples() -> None:
    record = {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "ignored"}
    (sample,) = parse_alpaca(record, AT)
    assert (sample.blocks, sample.response, sample.id) == (("Add.\n\n1, 2",), "3", AT)
    assert next(parse_alpaca(record | {"input": ""}, AT)).blocks == ("Add.",)
    first, last = parse_alpaca(record | {"system": "Be brief.", "history": [["Hi", "Hello."]], "id": "x"}, AT)
    assert (first.blocks, first.response) == (("Be brief.", "Hi"), "Hello.")
    assert (last.blocks, last.response) == (("Be brief.", "Hi", "Hello.", "Add.\n\n1, 2"), "3")
    assert [m.role for m in last.messages] == ["system", "user", "assistant", "user"]
    assert (first.id, last.id, last.source) == ("x#1", "x#2", "alpaca")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"instruction": ""}, "'instruction'"),
        ({"input": 3}, "'input'"),
        ({"input": 0}, "'input' is 0"),
        ({"input": False}, "'input' is False"),
        ({"system": ["x"]}, r"'system\[0\]'"),
        ({"output": " "}, "'output'"),
        ({"history": "Hi"}, "'history'"),
        ({"history": [["Hi"]]}, r"'history\[0\]'"),
        ({"history": [["Hi", ""]]}, r"'history\[0\]\[1\]'"),
    ],
)
def test_a_bad_alpaca_record_names_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(RecordError, match=field):
        parse_alpaca({"instruction": "Add.", "input": "", "output": "3"} | change, AT)


@pytest.mark.parametrize("name", ["blocks", "chunks"])
def test_training_records_of_the_authors_keep_their_blocks(name: str) -> None:
    record = {"prompt": TRAINING["prompt"], name: TRAINING["blocks"], "response": TRAINING["response"]}
    record |= {
        "uuid": {"$oid": "1"},
        "train_block": True,
        "block_tokens": [3, 4],
        "inputs": {"labels": [-100]},
    }
    (sample,) = parse_blocks(record, AT)
    assert sample.blocks == sample.templated == tuple(TRAINING["blocks"])
    assert (sample.messages, sample.response, sample.id) == ((), "Yes.<|end_of_text|>", AT)
    assert parse_sample(json.loads(json.dumps(sample_to_record(sample)))) == sample


def test_rag_records_of_the_authors_are_split_at_their_documents() -> None:
    (sample,) = parse_blocks(RAG, AT)
    assert sample.blocks == (OPEN, *WRITTEN, CLOSE)
    assert "".join(sample.blocks) == RAG["prompt"]
    assert (sample.response, sample.answers) == ("The fox.", ("Fox", "The fox"))
    assert sample.meta == {"question": "Who?", "documents": [1, 2, 3], "relevance": [0.5, 0.25, 0.75]}
    assert parse_sample(json.loads(json.dumps(sample_to_record(sample)))) == sample


def test_a_rag_record_without_response_can_be_evaluated() -> None:
    (sample,) = parse_blocks(RAG | {"generated": ""}, AT)
    assert (sample.response, sample.answers) == ("", ("Fox", "The fox"))
    with pytest.raises(RecordError, match="'generated'"):
        parse_blocks(RAG | {"generated": "", "answers": []}, AT)


def test_a_rag_record_may_start_with_a_document_or_have_none() -> None:
    (sample,) = parse_blocks(RAG | {"prompt": RAG["prompt"].removeprefix(OPEN)}, AT)
    assert (sample.blocks, sample.documents) == ((*WRITTEN, CLOSE), (0, 1, 2))
    (sample,) = parse_blocks(RAG | {"documents": []}, AT)
    assert (sample.blocks, sample.meta) == ((RAG["prompt"],), {"question": "Who?"})


def test_a_long_rag_record_loses_its_least_relevant_document() -> None:
    (sample,) = parse_blocks(RAG, AT)
    trimmed = trim_document(sample, keep_evidence=True)
    assert trimmed and trimmed.blocks == (OPEN, WRITTEN[0], WRITTEN[2], CLOSE)
    assert trimmed.meta == {"question": "Who?", "documents": [1, 2], "relevance": [0.5, 0.75]}


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ("x", "the record"),
        (TRAINING | {"prompt": "One."}, "'blocks'.*join to the prompt"),
        (TRAINING | {"blocks": None}, "'blocks'"),
        (TRAINING | {"blocks": ["", TRAINING["prompt"]]}, r"'blocks\[0\]'"),
        (TRAINING | {"response": ""}, "'response'"),
        ({"prompt": "Hi", "response": "Yo"}, "'blocks' is missing"),
        ({"response": "Yo"}, "'prompt' is missing"),
        (RAG | {"documents": NOTES[::-1]}, r"'documents\[1\]'.*be in the prompt"),
        (RAG | {"documents": [{"title": "A"}]}, "documents\\[0\\].text' is missing"),
        (RAG | {"documents": ["A"]}, r"'documents\[0\]'"),
        (RAG | {"answers": "Fox"}, "'answers'"),
        (RAG | {"prompt": OPEN + "".join(WRITTEN)}, "'prompt'.*after the last document"),
    ],
)
def test_a_bad_templated_record_names_the_field(record: Any, field: str) -> None:
    with pytest.raises(RecordError, match=field):
        parse_blocks(record, AT)


def real_data(name: str) -> Path:
    path = Path(os.environ.get("BLOCKFT_REAL_DATA", "../shared/data")) / name
    if not path.exists():
        pytest.skip(f"{path} is not there (set BLOCKFT_REAL_DATA)")
    return path


@pytest.mark.real_data
def test_instructions_as_published() -> None:
    records = [json.loads(line) for line in real_data("instructions_t0.jsonl").open(encoding="utf-8")]
    samples = [sample for i, r in enumerate(records) for sample in parse_messages_record(r, f"line {i}")]
    assert [s.response for s in samples] == [r["messages"][1]["content"] for r in records]
    assert [s.source for s in samples] == [r["source"] for r in records]
    assert len({s.id for s in samples}) == len(samples) == 4000


@pytest.mark.real_data
def test_alpaca_as_published() -> None:
    records = json.loads(real_data("alpaca_en_demo.json").read_text(encoding="utf-8"))
    samples = [sample for i, r in enumerate(records) for sample in parse_alpaca(r, f"record {i}")]
    assert [s.response for s in samples] == [r["output"] for r in records]
    assert sum("\n\n" in s.blocks[0] for s in samples) >= sum(bool(r["input"]) for r in records) == 412


def test_both_formats_of_blocks_read_answers_and_full_mode() -> None:
    blocks = {"prompt": "One. Who?", "blocks": ["One. ", "Who?"], "response": "The fox", "answers": ["fox"]}
    (sample,) = parse_blocks(blocks, "x")
    assert sample.answers == ("fox",)
    rag = {
        "prompt": "- Title: A\nOne.\nWho?",
        "documents": [{"title": "A", "text": "One.", "score": 1}],
        "generated": "The fox",
        "train_block": False,
    }
    (sample,) = parse_blocks(rag, "x")
    assert sample.templated == (rag["prompt"],) and not sample.meta
    for record in (blocks | {"generated": "A dog"}, rag | {"response": "A dog"}):
        with pytest.raises(RecordError, match="be absent: the response is"):
            parse_blocks(record, "x")


def test_parts_of_the_responses_api_are_text() -> None:
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Who?"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "The fox", "annotations": []}]},
    ]
    (sample,) = parse_messages_record({"messages": turns}, "x")
    assert (sample.blocks, sample.response) == (("Who?",), "The fox")
