import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.data.column_path import (
    MISSING,
    decode_container,
    find_value,
    first_step,
    flatten,
    list_paths,
    parent_path,
    path_names,
    similar_paths,
    split_lists,
    write_name,
)
from blockft.data.sample import RecordError
from blockft.inputs import column_path_problem

RECORD: dict[str, Any] = {
    "answer": {"value": "fox", "aliases": ["a fox", "Fox"]},
    "output": [{"answer": "x", "provenance": [{"text": "1"}, {"text": "2"}]}, {"answer": None}, {}],
    "passage_10": "j",
    "passage_2": "b",
    "passage_x": "not numbered",
    "passage_1_title": "no passage",
    "a.b": 1,
    "a[]": 2,
    "star*": 3,
    "json": '["one", {"t": "two"}]',
    "python": "['one', 'it\\'s']",
    "numpy": "['one' 'two']",
    "null": None,
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("answer.value", "fox"),
        ("answer.aliases", ["a fox", "Fox"]),
        ("answer.aliases[1]", "Fox"),
        ("answer.aliases[9]", None),
        ("answer.other", MISSING),
        ("other.value", MISSING),
        ("output.answer", ["x", None, None]),
        ("output[].answer", ["x", None, None]),
        ("output[0].answer", "x"),
        ("output.provenance.text", [["1", "2"], None, None]),
        ("output.other", MISSING),
        ("passage_*", {2: "b", 10: "j"}),
        ("paragraph_*", MISSING),
        (r"a\.b", 1),
        (r"a\[\]", 2),
        (r"star\*", 3),
        ("json[]", ["one", {"t": "two"}]),
        ("json[1].t", "two"),
        ("python[]", ["one", "it's"]),
        ("null.value", None),
        ("null[]", None),
    ],
)
def test_a_path_finds_its_value(path: str, value: Any) -> None:
    assert find_value(RECORD, path) == value


@pytest.mark.parametrize("path", ["answer.value.more", "numpy[]", "answer[]", "answer.value[0]"])
def test_a_path_into_a_value_that_holds_nothing_is_refused(path: str) -> None:
    with pytest.raises(RecordError, match="should hold a list"):
        find_value(RECORD, path)


def test_two_fields_of_one_number_are_refused() -> None:
    with pytest.raises(RecordError, match="one field number 1"):
        find_value({"p_1": "a", "p_01": "b"}, "p_*")


@pytest.mark.parametrize(
    "path", ["", " ", ".", "a.", ".a", "a..b", "a[", "a]", "a[x]", "a[-1]", "[0]", "a\\", "*_*"]
)
def test_a_text_that_is_no_path_is_refused(path: str) -> None:
    assert column_path_problem(path)


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.text(min_size=1), inner, max_size=3)))
def test_every_listed_path_is_found(record: Any) -> None:
    for path in list_paths(record):
        if not column_path_problem(path):  # a name may hold characters that no recipe can hold
            assert find_value(record, path) is not MISSING


@given(
    st.text(min_size=1).filter(lambda name: not column_path_problem(write_name(name))), st.text(min_size=1)
)
def test_any_name_of_a_field_can_be_written(name: str, inner: str) -> None:
    path = f"{write_name(name)}.value"
    assert find_value({name: {"value": inner}}, path) == inner
    assert path_names(path) == (name, "value")
    assert parent_path(path) == first_step(path) == write_name(name)
    assert parent_path(write_name(name)) == ""


@given(st.lists(st.one_of(st.none(), st.integers(), st.lists(st.integers(), max_size=2)), max_size=4))
def test_a_path_through_a_list_keeps_its_shape(values: list[Any]) -> None:
    record = {"items": [{"value": value} for value in values]}
    assert find_value(record, "items.value") == values
    flat = [v for value in values for v in (value if isinstance(value, list) else [value]) if v is not None]
    assert flatten(find_value(record, "items.value")) == flat


@given(st.lists(st.text()))
def test_lists_are_read_from_texts_as_json_and_as_python_write_them(texts: list[str]) -> None:
    assert decode_container(json.dumps(texts)) == texts
    assert decode_container(repr(texts)) == texts


@pytest.mark.parametrize(
    "text", ["x", "", "[1", "['a' 'b']", "['a'\n 'b']", "array(['a'])", "[" * 9999, "[f()]"]
)
def test_other_texts_are_no_lists(text: str) -> None:
    assert decode_container(text) is None


def test_lists_on_the_way_to_a_question_are_split() -> None:
    record = {
        "context": "c",
        "qas": [{"question": "q1", "answers": ["a"]}, {"question": "q2", "answers": ["b"]}],
    }
    (first, names, part), (second, _, other) = split_lists(record, "qas.question")
    assert (first, second, names) == ("qas[0]", "qas[1]", ("qas",))
    assert find_value(part, "qas.answers") == [["a"]] and find_value(other, "qas.answers") == [["b"]]
    assert part["context"] == other["context"] == "c"
    assert list(split_lists(record, "context")) == [("", (), record)]
    assert list(split_lists({"qas": []}, "qas.question")) == []
    nested = {"paragraphs": [{"context": "c1", "qas": [{"q": "1"}]}, {"context": "c2", "qas": [{"q": "2"}]}]}
    parts = list(split_lists(nested, "paragraphs.qas.q"))
    assert [place for place, _, _ in parts] == ["paragraphs[0].qas[0]", "paragraphs[1].qas[0]"]
    assert [find_value(part, "paragraphs.context") for _, _, part in parts] == [["c1"], ["c2"]]


def test_similar_names_are_found() -> None:
    record = {"query": "q", "passages": {"passage_text": ["p"]}}
    assert similar_paths("qury", record) == ["query"]
    assert similar_paths("passage_text", record) == ["passages.passage_text", "passages"]
    assert similar_paths("QUERY", record) == ["query"]
    assert similar_paths("zzz", record) == []
