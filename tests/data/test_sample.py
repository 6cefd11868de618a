import json
from typing import Any

import pytest

from blockft.data.sample import RecordError, parse_sample, sample_to_record
from tests.data.toys import rag_sample

GOOD: dict[str, Any] = json.loads(json.dumps(sample_to_record(rag_sample())))


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "meta": {}}


def test_a_sample_survives_writing_and_parsing() -> None:
    assert parse_sample(GOOD) == rag_sample()
    bare = sample_to_record(rag_sample(answers=(), meta={}))
    assert "answers" not in bare and "meta" not in bare
    assert sample_to_record(parse_sample(bare)) == bare


def test_a_templated_sample_has_blocks_in_place_of_messages() -> None:
    record = {"id": "s", "source": "toy", "blocks": ["<s>One.\n", "Who?"], "response": "Fox"}
    record |= {"meta": {"documents": [0]}}
    sample = parse_sample(record)
    assert (sample.messages, sample.blocks, sample.documents) == ((), ("<s>One.\n", "Who?"), (0,))
    assert sample_to_record(sample) == record
    for blocks in ([], ["a", ""], ["a", "\n"], [1], "a"):
        with pytest.raises(RecordError, match="'blocks"):
            parse_sample(record | {"blocks": blocks})


def test_a_response_may_be_empty_only_beside_answers() -> None:
    assert parse_sample(GOOD | {"response": ""}).response == ""
    with pytest.raises(RecordError, match="response"):
        parse_sample(GOOD | {"response": "", "answers": []})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": 3.5}, "'id'"),
        ({"id": True}, "'id'"),
        ({"id": " "}, "'id'"),
        ({"response": "\ud800"}, "'response'"),
        ({"answers": "a"}, "'answers'"),
        ({"answers": [1]}, r"'answers\[0\]'"),
        ({"meta": {"a": {"b": [float("nan")]}}}, r"'meta.a.b\[0\]'"),
        ({"meta": {"a": "\ud800"}}, "'meta.a'"),
        ({"meta": {"\ud800": 1}}, "a key of field 'meta'"),
        ({"blocks": ["a"]}, "'blocks'"),
        ({"messages": []}, "'messages'"),
        ({"messages": ["a"]}, r"'messages\[0\]'"),
        ({"messages": [{"role": "user"}]}, r"'messages\[0\]'"),
        (user("a"), r"'messages\[0\].content'"),
        (user([]), r"'messages\[0\].content'"),
        (user(["a", ""]), r"'messages\[0\].content\[1\]'"),
        (user(["a", "\n"]), "blank final block"),
        ({"messages": [{"role": "assistant", "content": ["a"]}], "meta": {}}, "role"),
        ({"meta": {"documents": [3]}}, "'meta.documents'"),
        ({"meta": {"documents": [1], "relevance": []}}, "'meta.relevance'"),
        ({"meta": {"documents": [1], "supporting": [2]}}, "'meta.supporting'"),
    ],
)
def test_an_error_names_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(RecordError, match=field):
        parse_sample(GOOD | change)


@pytest.mark.parametrize("name", ["id", "source", "messages", "response"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(RecordError, match=f"'{name}' is missing"):
        parse_sample({key: value for key, value in GOOD.items() if key != name})
