"""Unknown fields are counted; fields that change what a record means are honoured or refused."""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.config.choices import Format
from blockft.data.fields import (
    MAX_UNKNOWN_FIELDS,
    OTHER_FIELDS,
    FieldTable,
    Refusal,
    format_fields,
    standard_name,
)
from blockft.data.rag_prompt import RagPrompt
from blockft.data.request import parse_document, parse_request, unknown_document_fields
from blockft.data.sample import RecordError, Sample
from blockft.data.sources import SOURCE_FORMATS, RecordCounts, read_samples
from blockft.errors import UserError

SHARED = Path(os.environ.get("BLOCKFT_REAL_DATA", Path(__file__).parents[2] / "../shared/data")).parent
needs_cases = pytest.mark.skipif(
    not (SHARED / "cases").is_dir(), reason="needs the folder cases beside the published data sets"
)

HOTPOTQA: dict[str, Any] = {
    "_id": "h",
    "question": "who?",
    "answer": "the fox",
    "supporting_facts": [["B", 0]],
    "context": [["B", ["One."]], ["C", ["Two."]]],
}
CHAT: dict[str, Any] = {
    "id": "c",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ],
}
RECORDS: dict[str, dict[str, Any]] = {
    "samples": {
        "id": "s",
        "source": "mine",
        "messages": [{"role": "user", "content": ["One.", "Who?"]}],
        "response": "The fox",
    },
    "hotpotqa": HOTPOTQA,
    "2wikimultihopqa": HOTPOTQA,
    "musique": {
        "id": "2hop__1_2",
        "question": "who?",
        "answer": "the fox",
        "paragraphs": [{"title": "B", "paragraph_text": "One.", "is_supporting": True}],
    },
    "squad": {"title": "B", "context": "A fox.", "id": "q", "question": "who?", "answers": {"text": ["fox"]}},
    "fid": {
        "id": "f",
        "question": "who?",
        "answers": ["fox"],
        "ctxs": [{"title": "B", "text": "A fox.", "isgold": True}],
    },
    "messages": CHAT,
    "alpaca": {"id": "a", "instruction": "Say hello.", "output": "Hello"},
    "blocks": {"id": "b", "prompt": "One. Who?", "blocks": ["One. ", "Who?"], "response": "The fox"},
}
SQUAD_ARTICLE: dict[str, Any] = {
    "title": "B",
    "paragraphs": [
        {
            "context": "A fox.",
            "qas": [{"id": 7, "question": "who?", "answers": [{"text": "fox", "answer_start": 2}]}],
        }
    ],
}

# the paths of objects inside a record where further fields may stand
OBJECTS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "samples": (("messages", 0),),
    "musique": (("paragraphs", 0),),
    "fid": (("ctxs", 0),),
    "messages": (("messages", 0), ("messages", 1), ("messages", 2)),
}


def read(format: str, *records: Any, **options: Any) -> tuple[list[Sample], RecordCounts]:
    counts = RecordCounts()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return list(read_samples(format, str(path), counts, **{"prompt": RagPrompt()} | options)), counts


def with_field(record: Any, path: tuple[Any, ...], name: str, value: Any) -> Any:
    """Return a copy of the record whose object at `path` has one more field."""
    changed = deepcopy(record)
    target = changed
    for step in path:
        target = target[step]
    target[name] = value
    return changed


def message_of(format: str, record: Any, **options: Any) -> str:
    """Return the error of a record."""
    with pytest.raises(UserError) as raised:
        read(format, record, **options)
    return str(raised.value)


def test_every_format_has_a_record_here() -> None:
    assert {*RECORDS} == {*Format} - {Format.constructed, Format.columns}, "they have no fields of their own"
    for name, record in RECORDS.items():
        samples, counts = read(name, record)
        assert samples and not counts.unknown_fields, name
        assert record.keys() <= SOURCE_FORMATS[name].fields.passed
    assert read("squad", SQUAD_ARTICLE)[0][0].id == "7"


@st.composite
def changed_records(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], str, Any]:
    format = draw(st.sampled_from(sorted(RECORDS)))
    path = draw(st.sampled_from([(), *OBJECTS.get(format, ())]))
    value = draw(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
            ),
            max_leaves=3,
        )
    )
    return format, path, draw(st.text(min_size=1, max_size=90)), value


def known_names(table: FieldTable) -> set[str]:
    names = {*table.passed, *table.refused}
    return names.union(*map(known_names, table.objects.values()))


@given(changed_records())
def test_an_unknown_field_is_counted_and_changes_no_sample(
    changed: tuple[str, tuple[Any, ...], str, Any],
) -> None:
    format, path, name, value = changed
    if standard_name(name) in known_names(SOURCE_FORMATS[format].fields):
        return
    samples, counts = read(format, with_field(RECORDS[format], path, name, value))
    assert samples == read(format, RECORDS[format])[0]
    assert counts.unknown_fields.total() == 1
    (field,) = counts.unknown_fields
    assert field.startswith("".join(f"{step}" if isinstance(step, str) else "[]." for step in path))
    field.encode()  # the manifest is UTF-8


REFUSED: list[tuple[str, Any]] = [
    ("chosen", "a"),
    ("rejected", [{"role": "assistant", "content": "a"}]),
    ("preferred_output", [1]),
    ("non_preferred_output", [1]),
    ("kto_tag", False),
    ("images", ["a.png"]),
    ("image", "a.png"),
    ("videos", ["a.mp4"]),
    ("audios", ["a.wav"]),
    ("tools", [{"name": "f"}]),
    ("tools", '[{"name": "f"}]'),
    ("functions", [{"name": "f"}]),
    ("tool_calls", [{"id": 1}]),
    ("function_call", {"name": "f"}),
    ("reasoning_content", "Well."),
    ("thinking", "Well."),
    ("weight", 0.5),
    ("weight", 2),
    ("train", False),
    ("loss_mask", [0, 1]),
    ("assistant_masks", [0, 1]),
    ("chat_template_kwargs", {"enable_thinking": True}),
]


@pytest.mark.parametrize("format", sorted(RECORDS))
@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_field_that_changes_what_a_record_means_is_refused_by_name(
    format: str, name: str, value: Any
) -> None:
    message = message_of(format, RECORDS[format] | {name: value})
    assert f"field '{name}' is " in message and "data.on_bad_record=skip" in message
    samples, counts = read(format, RECORDS[format] | {name: value}, RECORDS[format], skip_bad=True)
    assert samples == read(format, RECORDS[format])[0] and counts.dropped == {"bad record": 1}


@pytest.mark.parametrize("format", sorted(RECORDS))
@pytest.mark.parametrize("name", sorted({name for name, _ in REFUSED}))
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_an_empty_field_means_nothing(format: str, name: str, empty: Any) -> None:
    samples, counts = read(format, RECORDS[format] | {name: empty})
    assert samples == read(format, RECORDS[format])[0] and not counts.unknown_fields


@pytest.mark.parametrize("format", ["samples", "messages"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_calls", [{"id": "1"}]),
        ("function_call", {"name": "f"}),
        ("tool_call_id", "1"),
        ("reasoning_content", "Well."),
        ("thinking", "Well."),
        ("refusal", "I cannot."),
        ("audio", {"id": "1"}),
        ("images", ["a.png"]),
        ("name", "Ann"),
        ("mask", True),
        ("label", False),
        ("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}]),
        ("chosen", "x"),
    ],
)
def test_a_field_of_a_message_is_refused_by_its_place(format: str, name: str, value: Any) -> None:
    message = message_of(format, with_field(RECORDS[format], ("messages", 0), name, value))
    assert f"field 'messages[0].{name}' is " in message and "data.on_bad_record=skip" in message


def test_the_label_of_a_chat_is_refused_if_the_answer_is_bad() -> None:
    for format in ("messages", "alpaca", "samples"):
        assert "field 'label' is False" in message_of(format, RECORDS[format] | {"label": False})
        for good in (True, 1, None):
            assert read(format, RECORDS[format] | {"label": good})[0] == read(format, RECORDS[format])[0]


@pytest.mark.parametrize(
    "format", ["hotpotqa", "2wikimultihopqa", "musique", "squad", "fid", "blocks", "samples"]
)
def test_a_system_prompt_is_refused_where_the_prompt_has_no_place_for_it(format: str) -> None:
    for name in ("system", "system_prompt", "system_message"):
        assert f"field '{name}' is 'Be" in message_of(format, RECORDS[format] | {name: "Be brief."})


def test_unknown_fields_of_articles_and_paragraphs_are_counted_for_each_question() -> None:
    article = with_field(SQUAD_ARTICLE, (), "color", 1)
    article = with_field(article, ("paragraphs", 0), "shape", 1)
    article = with_field(article, ("paragraphs", 0, "qas", 0), "size", 1)
    article = with_field(article, ("paragraphs", 0, "qas", 0, "answers", 0), "taste", 1)
    article["paragraphs"][0]["qas"] *= 2
    expected = (
        "color",
        "paragraphs[].shape",
        "paragraphs[].qas[].size",
        "paragraphs[].qas[].answers[].taste",
    )
    samples, counts = read("squad", article)
    assert counts.unknown_fields == dict.fromkeys(expected, 2)
    assert samples == read("squad", SQUAD_ARTICLE)[0] * 2
    for path, name in (
        ((), "images"),
        (("paragraphs", 0), "images"),
        (("paragraphs", 0, "qas", 0), "images"),
    ):
        place = "".join(f"[{step}]." if isinstance(step, int) else step for step in path)
        message = message_of("squad", with_field(SQUAD_ARTICLE, path, name, ["a.png"]))
        assert f"field '{place}{name}' is ['a.png']" in message and "data.on_bad_record=skip" in message


def test_a_field_is_counted_once_for_each_record_and_by_name_up_to_a_limit() -> None:
    chats = [with_field(CHAT, ("messages", i), "color", 1) for i in (0, 1)]
    both = with_field(chats[0], ("messages", 1), "color", 1)
    assert read("messages", *chats, both)[1].unknown_fields == {"messages[].color": 3}
    records = [CHAT | {f"key {n}": n} for n in range(MAX_UNKNOWN_FIELDS + 5)]
    unknown = read("messages", *records)[1].unknown_fields
    assert len(unknown) == MAX_UNKNOWN_FIELDS + 1 and unknown[OTHER_FIELDS] == 5
    assert format_fields({"b": 1, "a": 1, "c": 2000}) == "c (2,000), a (1), b (1)"
    assert format_fields(unknown).endswith(f" and {len(unknown) - 8} more")


def test_a_refused_field_may_have_neutral_values() -> None:
    refusal = Refusal("be 1", (1,))
    empty_struct = {"enable_thinking": False, "tools": [], "id": None}
    assert all(map(refusal.is_neutral, (None, "", "  ", "[]", "null", [], {}, 1, 1.0, True, empty_struct)))
    assert not any(map(refusal.is_neutral, (0, False, "1", [1], {"a": 1}, float("nan"), "x", {"a": [1]})))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("systemPrompt", "Be kind.", "'systemPrompt' is 'Be kind.', it should be named 'system_prompt'"),
        ("System", "Be kind.", "be named 'system'"),
        ("system-message", "Be kind.", "be named 'system_message'"),
        ("sys_prompt", "Be kind.", "be named 'system'"),
        ("toolCalls", [1], "tools cannot be learned"),
        ("rejected_messages", [1], "preference data"),
        ("isTrained", False, "remove a record that is not learned"),
        ("masked", True, "a mask cannot choose"),
        ("enable_thinking", True, "same arguments"),
        ("documents", ["One."], "write the documents into the messages"),
        ("instruction", "Be kind.", "or repeat a message"),
        ("response", "Bye", "or repeat a message"),
    ],
)
def test_other_spellings_of_a_field_of_a_chat_are_refused(name: str, value: Any, problem: str) -> None:
    assert problem in message_of("messages", CHAT | {name: value})
    assert read("messages", CHAT | {name: None})[0] == read("messages", CHAT)[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reasoning", "off"),
        ("thinking", False),
        ("chat_template_kwargs", {"enable_thinking": False, "python_tools": []}),
        ("function_call", {"name": None, "arguments": None}),
        ("instruction", "Hi"),
        ("response", "Hello\n"),
        ("system_prompt", " Be brief."),
        ("system", [{"type": "text", "text": "Be brief."}]),
    ],
)
def test_a_field_that_only_repeats_the_chat_is_read(name: str, value: Any) -> None:
    samples, counts = read("messages", CHAT | {name: value})
    assert samples == read("messages", CHAT)[0] and not counts.unknown_fields


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_trained", False),
        ("train_on_turn", 0),
        ("masked", True),
        ("ignore", True),
        ("documents", ["One."]),
    ],
)
def test_a_message_that_is_not_learned_is_marked_by_a_known_flag(name: str, value: Any) -> None:
    place = f"field 'messages[2].{name}'"
    assert place in message_of("messages", with_field(CHAT, ("messages", 2), name, value))


def test_other_names_of_evidence_and_of_missing_answers_are_honoured() -> None:
    for mark in ("is_gold", "gold", "is_supporting", "is_positive", "is_relevant", "is_selected"):
        fid = RECORDS["fid"] | {"ctxs": [{"title": "B", "text": "A fox.", mark: False}]}
        assert read("fid", fid)[1].dropped == {"no supporting document": 1}
        documents = [{"title": "A", "text": "One.", mark: 0}]
        blocks = {"prompt": "- Title: A\nOne.\nWho?", "documents": documents, "generated": "Fox"}
        assert read("blocks", blocks)[1].dropped == {"no supporting document": 1}
    assert "be named 'has_answer'" in message_of(
        "fid", RECORDS["fid"] | {"ctxs": [{"title": "B", "text": "A fox.", "hasAnswer": False}]}
    )
    for format in ("hotpotqa", "2wikimultihopqa", "musique", "squad", "fid"):
        for name, value in (("unanswerable", True), ("is_answerable", False), ("no_answer", 1)):
            counts = read(format, RECORDS[format] | {name: value, "color": 1})[1]
            assert counts.dropped == {"no answer": 1} and counts.unknown_fields == {"color": 1}


def test_fields_beside_the_articles_of_a_file_are_counted_or_refused(tmp_path: Path) -> None:
    def read_article(**fields: Any) -> RecordCounts:
        counts = RecordCounts()
        content = {"version": "1.1", "data": [SQUAD_ARTICLE], **fields}
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert len([*read_samples("squad", str(tmp_path / "x.json"), counts, prompt=RagPrompt())]) == 1
        return counts

    assert not read_article(license="MIT").unknown_fields
    assert read_article(color="red").unknown_fields == {"color": 1}
    with pytest.raises(UserError, match="x.json: field 'weight' is 0"):
        read_article(weight=0)


def test_requests_honour_or_refuse_every_field() -> None:
    prompt = RagPrompt()
    request: dict[str, Any] = {"documents": [{"text": "One.", "id": 3, "url": "x"}], "question": "Who?"}
    plain = parse_request({"documents": ["One."], "question": "Who?"}, prompt, "r")
    assert parse_request(request, prompt, "r") == plain and not unknown_document_fields(request)
    request["documents"][0]["color"] = 1
    assert parse_request(request, prompt, "r") == plain
    assert unknown_document_fields(request) == {"documents[].color"}
    for bad in (
        request | {"tools": [1]},
        request | {"documents": [{"text": "One.", "image": "a.png"}]},
        {"messages": [{"role": "user", "content": "Hi", "weight": 1}]},
        {"messages": [{"role": "user", "content": "Hi", "reasoning_content": "x"}]},
    ):
        with pytest.raises(RecordError):
            parse_request(bad, prompt, "r")
    with pytest.raises(RecordError, match="field 'image' is"):
        parse_document({"text": "One.", "image": "a.png"})
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "barks?"}]
    asked = parse_request({"messages": [{"role": "user", "content": parts}]}, prompt, "r")
    assert asked.blocks == ("Who barks?",)
    with pytest.raises(RecordError, match=r"field 'messages\[0\].content\[1\]'"):
        parse_request(
            {"messages": [{"role": "user", "content": [*parts[:1], {"type": "image"}]}]}, prompt, "r"
        )


def without_wording(record: dict[str, Any]) -> Callable[[], Sample]:
    return lambda: parse_request(record, None, "r")


def test_documents_need_a_wording() -> None:
    with pytest.raises(RecordError, match="trained without a wording for documents"):
        without_wording({"documents": ["One."], "question": "Who?"})()
    assert without_wording({"messages": [{"role": "user", "content": ["One.", "Who?"]}]})().blocks


@needs_cases
def test_the_given_cases_give_what_their_readme_says() -> None:
    cases = SHARED / "cases"
    options: dict[str, Any] = {"prompt": RagPrompt()}
    (weighted,) = read_samples("messages", str(cases / "weight.jsonl"), RecordCounts(), **options)
    assert weighted.response == "Four."
    assert [message.text for message in weighted.messages] == ["Two plus two?", "Five.", "Sure?"]
    (parts,) = read_samples("messages", str(cases / "parts.jsonl"), RecordCounts(), **options)
    assert (parts.blocks, parts.response) == (("Two plus two?",), "Four.")
    counts = RecordCounts()
    assert not [*read_samples("hotpotqa", str(cases / "hotpot_without_gold.json"), counts, **options)]
    assert counts.dropped == {"no supporting document": 2}
    counts = RecordCounts()
    (question,) = read_samples("squad", str(cases / "squad_int_id.json"), counts, **options)
    assert (question.id, question.response) == ("262", "Ida Kroll") and not counts.unknown_fields
