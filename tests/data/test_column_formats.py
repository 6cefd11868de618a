import json
from pathlib import Path
from typing import Any

import pytest

from blockft.data.column_formats import parse_chat, parse_question
from blockft.data.columns import Columns, absent_paths, build_columns, unread_fields
from blockft.data.rag_prompt import RagPrompt
from blockft.data.sample import RecordDropped, RecordError, Sample
from blockft.data.sources import RecordCounts, read_samples
from blockft.errors import UserError

PROMPT = RagPrompt(instruction="", document="{title}|{text}", question="{question}")
QUESTION = {"question": "q", "documents": "docs", "answers": "a"}
NO_ANSWERS = ("No Answer Present.", "CANNOTANSWER")


def columns(**mapped: Any) -> Columns:
    return build_columns(QUESTION | mapped)


def chat_columns(**mapped: Any) -> Columns:
    return build_columns(mapped)


def read(
    tmp_path: Path, records: list[Any], mapping: Columns, **options: Any
) -> tuple[list[Sample], RecordCounts]:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = RecordCounts()
    given: dict[str, Any] = {"prompt": PROMPT, "columns": mapping} | options
    return list(read_samples("columns", str(path), counts, **given)), counts


def record(**changes: Any) -> dict[str, Any]:
    return {"q": "who?", "docs": ["A fox."], "a": "fox"} | changes


@pytest.mark.parametrize(
    ("answers", "mapped", "expected"),
    [
        ("fox", "a", ("fox",)),
        (["fox", "a fox", " fox "], "a", ("fox", "a fox")),
        ([["fox"], ["a fox", None]], "a", ("fox", "a fox")),
        ({"value": "fox", "aliases": ["Fox", "fox"]}, ["a.value", "a.aliases"], ("fox", "Fox")),
        ([{"answer": "fox"}, {"answer": ""}, {"other": 1}], "a.answer", ("fox",)),
        ('["fox", "Fox"]', "a[]", ("fox", "Fox")),
        (1912, "a", ("1912",)),
        (["fox", "No answer present"], "a", ("fox",)),
    ],
)
def test_answers_are_texts_lists_and_aliases(answers: Any, mapped: Any, expected: tuple[str, ...]) -> None:
    mapping = columns(answers=mapped, no_answer=NO_ANSWERS)
    question = parse_question(mapping, record(a=answers))
    assert question.answers == expected and question.question == "who?"


@pytest.mark.parametrize(
    "changes",
    [
        {"a": []},
        {"a": None},
        {"a": [" "]},
        {"a": ["No Answer Present."]},
        {"a": "cannotanswer"},
        {"answerable": False},
        {"is_impossible": True},
        {"is_impossible": "true"},
        {"unanswerable": 1},
    ],
)
def test_a_question_without_an_answer_is_dropped(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordDropped, match="no answer"):
        parse_question(columns(no_answer=NO_ANSWERS), record(**changes))


def test_a_flag_beside_the_question_of_a_list_counts() -> None:
    mapping = columns(question="qas.q", answers="qas.a")
    held = {"qas": [{"q": "who?", "a": "fox", "is_impossible": True}], "docs": "A fox."}
    with pytest.raises(RecordDropped, match="no answer"):
        parse_question(mapping, held)


@pytest.mark.parametrize(
    ("changes", "mapped", "message"),
    [
        ({"q": None}, {}, "field 'q' of columns.question is empty"),
        ({"q": float("nan")}, {}, "field 'q' of columns.question is empty"),
        (
            {"a": "['fox'\n 'hound']"},
            {},
            "field 'a' .* text of one of NumPy or pandas: save the table as parquet",
        ),
        ({"a": "{'text': array(['fox'], dtype=object)}"}, {}, "text of one of NumPy or pandas"),
        ({"a": "{'text': ['fox']}"}, {}, r"is that of an object: name a field inside it, such as a\.text"),
        ({"q": " "}, {}, "field 'q' is ' ', it should not be blank"),
        ({"q": ["who?", "what?"]}, {}, "be one text"),
        ({"q": 1.5}, {}, "field 'q' is 1.5, it should be a text"),
        ({"a": 1.5}, {}, "field 'a' is 1.5"),
        ({"a": True}, {}, "field 'a' is True"),
        ({"a": '["fox"]'}, {}, r"is the text of one: name it a\[\]"),
        ({}, {"answers": "answer"}, "field 'answer' of columns.answers is missing"),
        ({}, {"question": "Q"}, r"field 'Q' .* is missing \(did you mean q\?\)"),
        ({"text": "x"}, {"response": "txt"}, r"'txt' of columns.response is missing \(did you mean text\?\)"),
        ({"id": 1.5}, {"id": "id"}, "field 'id' is 1.5"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_field(
    changes: dict[str, Any], mapped: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        parse_question(columns(**mapped), record(**changes))


def test_the_response_may_be_another_text_than_the_first_answer(tmp_path: Path) -> None:
    (sample,), _ = read(tmp_path, [record(long="It is the fox.", n=7)], columns(response="long", id="n"))
    assert (sample.id, sample.response, sample.answers) == ("7", "It is the fox.", ("fox",))
    mapping = build_columns({"question": "q", "documents": "docs", "response": "long"})
    (sample,), _ = read(tmp_path, [record(long="Fox!")], mapping)
    assert (sample.id, sample.response, sample.answers) == ("r-1", "Fox!", ())


QAS = {
    "qas": [{"q": "one?", "a": "fox", "n": 1}, {"q": "two?", "a": "dog", "n": 2}],
    "docs": "A fox, a dog.",
    "a": "x",
}


def test_every_element_of_a_list_gives_a_question(tmp_path: Path) -> None:
    mapping = columns(question="qas.q", answers="qas.a", id="qas.n")
    header = {"header": {"dataset": "x"}}
    samples, counts = read(tmp_path, [header, QAS, QAS], mapping, skip_samples=1, max_samples=2)
    assert [(s.id, s.response, s.blocks[-1]) for s in samples] == [("2", "dog", "two?"), ("1", "fox", "one?")]
    assert counts.read == 2 and samples[0].blocks[0] == samples[1].blocks[0] == "|A fox, a dog."
    assert read(tmp_path, [header, QAS], columns(question="qas[].q", answers="qas[].a"))[0][1].id == "r-2"


@pytest.mark.parametrize(
    "wrong", [{"answers": "a"}, {"answers": "qas.a", "response": "a"}, {"answers": "qas.a", "id": "a"}]
)
def test_parts_of_a_question_lie_in_the_list_of_the_question(tmp_path: Path, wrong: dict[str, str]) -> None:
    mapping = build_columns({"question": "qas.q", "documents": "docs"} | wrong)
    with pytest.raises(UserError, match=r"line 1: columns.\w+ is 'a', it should lie in 'qas'"):
        read(tmp_path, [QAS], mapping)


def test_an_error_in_a_list_names_the_question(tmp_path: Path) -> None:
    broken = {"qas": [QAS["qas"][0], {"q": 1.5, "a": "x"}], "docs": "x"}
    with pytest.raises(UserError, match=r"line 1, qas\[1\]: field 'qas.q' is 1.5"):
        read(tmp_path, [broken], columns(question="qas.q", answers="qas.a"))


def test_questions_over_one_context_share_it(tmp_path: Path) -> None:
    prompt = RagPrompt(instruction="", document="{text}", question="{question}", shared_context=True)
    mapping = columns(question="qas.q", answers="qas.a", documents="docs")
    held = QAS | {"docs": ["A fox.", "A dog."]}
    (first, second), _ = read(tmp_path, [held], mapping, prompt=prompt)
    assert first.blocks[:-1] == second.blocks[:-1] and len(first.documents) == 2


def test_questions_without_evidence_are_dropped_in_training_and_asked_in_an_evaluation(
    tmp_path: Path,
) -> None:
    records = [record(ok=[1]), record(ok=[0]), record(docs=[])]
    mapping = columns(supporting="ok")
    samples, counts = read(tmp_path, records, mapping)
    assert len(samples) == 1 and counts.dropped == {"no supporting document": 2}
    assert len(read(tmp_path, records, mapping, needs_evidence=False)[0]) == 3


def test_a_search_fills_prompts_with_documents_of_the_whole_source(tmp_path: Path) -> None:
    colours = ("red", "blue", "green", "red")
    records = [
        record(q=f"number {n}?", docs=[f"{n} is {colour}."], a=colour) for n, colour in enumerate(colours)
    ]
    prompt = RagPrompt(instruction="", document="{text}", question="{question}", num_documents=3)
    samples, _ = read(tmp_path, records, columns(), prompt=prompt, retriever="bm25", max_samples=2)
    assert {*samples[0].blocks[:-1]} == {"0 is red.", "1 is blue.", "2 is green."}
    assert len(samples) == 2 and all(len(sample.documents) == 3 for sample in samples)


def test_a_column_that_no_record_has_is_an_error_with_near_misses(tmp_path: Path) -> None:
    records = [record(titel=["T"]), record()]
    with pytest.raises(
        UserError,
        match=r"columns.title is 'title', a field that none of its 2 records has \(did you mean titel\?\)",
    ):
        read(tmp_path, records[::-1], columns(title="title"))
    # one record with the field is enough, also if it is null there
    for found in ({"title": ["T"]}, {"title": None}, {"docs": [{"text": "A fox.", "title": "T"}]}):
        assert len(read(tmp_path, [record(), record(**found)], columns(title="title"))[0]) == 2
    with pytest.raises(
        UserError, match=r"columns.documents is 'passages', .* fields q, docs, a: correct the name"
    ):
        read(tmp_path, records[1:], columns(documents="passages"))


def test_the_error_of_a_bad_record_lists_its_fields_and_columns_that_fit(tmp_path: Path) -> None:
    held = {"query": "who?", "passages": ["A fox."], "answer": "fox", **{f"x{n}": n for n in range(20)}}
    with pytest.raises(UserError) as raised:
        read(tmp_path, [held], columns())
    message = str(raised.value)
    assert (
        "line 1: field 'q' of columns.question is missing; the record has the fields query, passages,"
        in message
    )
    assert "x8, ..." in message and "x9" not in message
    assert "this would fit: columns: {question: query, documents: passages, answers: answer} (data" in message


def test_fields_without_a_column_are_listed_in_the_counts(tmp_path: Path) -> None:
    more = {"url": "u", "doc_1": "A fox.", "doc_x": "-", "images": ["a.png"], "weight": 0.5}
    _, counts = read(tmp_path, [record(**more)], columns(documents=["docs", "doc_*"]))
    assert counts.unknown_fields == {"url": 1, "doc_x": 1, "images": 1, "weight": 1}
    assert unread_fields(columns(), {"a\ud800": 1, "b" * 200: 2}) == {"a\\ud800", f"{'b' * 80}..."}
    assert absent_paths(columns(), {"q": 1, "a": 2}) == {("documents", "docs")}


def test_questions_need_documents_unless_they_are_asked_without(tmp_path: Path) -> None:
    mapping = build_columns({"question": "q", "answers": "a"})
    with pytest.raises(UserError, match="has questions and no documents: add documents"):
        read(tmp_path, [record()], mapping)
    closed = RagPrompt(instruction="Answer.", num_documents=0)
    (sample,), _ = read(tmp_path, [record()], mapping, prompt=closed)
    assert sample.documents == () and sample.response == "fox"


MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hey"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Fox"},
]


def chat(mapping: Columns, held: dict[str, Any]) -> list[tuple[list[str], str]]:
    return [([m.text for m in s.messages], s.response) for s in parse_chat(mapping, held, "id")]


def test_chats_are_read_as_in_the_format_messages() -> None:
    mapping = chat_columns(messages="data.turns", system="sys")
    held = {"data": {"turns": MESSAGES}, "sys": "Be brief."}
    learned = [(["Be brief.", "Hi"], "Hey"), (["Be brief.", "Hi", "Hey", "Who?"], "Fox")]
    assert chat(mapping, held) == learned
    assert chat(mapping, held | {"sys": None}) == [(texts[1:], response) for texts, response in learned]
    as_text = {"turns": json.dumps(MESSAGES)}
    assert len(chat(chat_columns(messages="turns[]"), as_text)) == 2


def test_only_the_completion_is_learned() -> None:
    mapping = chat_columns(prompt="p", completion="c")
    assert chat(mapping, {"p": MESSAGES[:3], "c": MESSAGES[3:]}) == [(["Hi", "Hey", "Who?"], "Fox")]
    assert chat(mapping, {"p": MESSAGES[:3], "c": " Fox "}) == [(["Hi", "Hey", "Who?"], "Fox")]
    assert chat(mapping, {"p": "Hi", "c": MESSAGES[1:]}) == [(["Hi"], "Hey"), (["Hi", "Hey", "Who?"], "Fox")]
    several = chat_columns(prompt=["i", "ctx"], completion="c", system="s")
    assert chat(several, {"i": "Do.", "ctx": "Text.", "c": "Done", "s": "S"}) == [
        (["S", "Do.\n\nText."], "Done")
    ]
    assert chat(several, {"i": "Do.", "ctx": None, "c": "Done"}) == [(["Do."], "Done")]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"p": "Hi"}, "'c' of columns.completion is missing"),
        ({"c": "Hi"}, "'p' of columns.prompt is missing"),
        ({"p": " ", "c": "Hi"}, "not be blank"),
        ({"p": "Hi", "c": " "}, "not be blank"),
        ({"p": "Hi", "c": ["Hey"]}, r"field 'c\[0\]' is 'Hey', it should be \{"),
        ({"p": MESSAGES[:2], "c": "Hey"}, "turns alternate"),
        ({"p": "Hi", "c": "Hey", "label": False}, "labels of preference data cannot be learned"),
        ({"p": "Hi", "c": "Hey", "label": "False"}, "labels of preference data cannot be learned"),
        ({"p": '[{"role": "user", "content": "Hi"}]', "c": "Hey"}, r"is the text of one: name it p\[\]"),
        ({"p": "Hi", "c": "[{'content': 'Hey', 'role': 'assistant'}]"}, r"name it c\[\]"),
        ({"p": "Hi", "c": "[{'role': 'a'}\n {'role': 'b'}]"}, "text of one of NumPy or pandas"),
        ({"p": "Hi", "c": "Hey", "kto_tag": False}, "labels of preference data"),
        (
            {"p": "Hi", "c": [MESSAGES[1] | {"tool_calls": [1]}]},
            r"field 'c\[0\].tool_calls' .* tools cannot be",
        ),
        ({"p": [MESSAGES[0] | {"images": ["a"]}], "c": "Hey"}, r"field 'p\[0\].images' .* images"),
    ],
)
def test_a_chat_that_cannot_be_learned_is_refused(held: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        list(parse_chat(chat_columns(prompt="p", completion="c"), held, "id"))


def test_a_text_that_spells_messages_needs_brackets() -> None:
    with pytest.raises(RecordError, match=r"name it m\[\]"):
        list(parse_chat(chat_columns(messages="m"), {"m": json.dumps(MESSAGES)}, "id"))


def test_a_question_for_a_teacher_needs_no_answer(tmp_path: Path) -> None:
    mapping = build_columns({"question": "q", "documents": "docs"})
    (sample,), _ = read(tmp_path, [record()], mapping)
    assert (sample.response, sample.answers) == ("", ())


@pytest.mark.parametrize("field", ["q", "docs", "a", "x"])
def test_a_record_that_is_nested_too_deeply_is_a_bad_record(tmp_path: Path, field: str) -> None:
    deep: Any = "text"
    for _ in range(600):
        deep = [deep]
    _, counts = read(tmp_path, [record(**{field: deep}), record()], columns(), skip_bad=True)
    assert counts.read == 2 and counts.samples >= 1
    with pytest.raises(UserError, match=r"line 1: .* passes over it"):
        read(tmp_path, [record(**{field: deep}) | {"q": None}], columns())


def test_a_retriever_of_a_chat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a retriever, but its columns have no question"):
        read(tmp_path, [], chat_columns(messages="m"), retriever="bm25")


def test_an_error_in_a_path_below_a_text_has_no_traceback(tmp_path: Path) -> None:
    records = [record(docs=[{"text": "A fox.", "m": {"ok": 1}}]), record(docs=[{"text": "A fox.", "m": "x"}])]
    with pytest.raises(UserError, match=r"line 2: field 'm.ok' is 'x', it should hold a list or an object"):
        read(tmp_path, records, columns(supporting="m.ok"))
