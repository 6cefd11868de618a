import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from blockft.data.rag_prompt import RagPrompt
from blockft.data.request import parse_request
from blockft.data.sample import Message, RecordError, Sample, sample_to_record
from tests.data.toys import rag_sample

AT = "prompts.jsonl, line 7"
PROMPT = RagPrompt(
    instruction="Answer.\n\n", document="- {title}\n{text}\n\n", question="{question}?", order="given"
)
DOCUMENTS: list[Any] = [{"title": "A", "text": "One.", "score": 0.5}, {"text": "Two."}, "Three."]
TEMPLATED = ["<|user|>\nOne.\n", "Who?\n<|assistant|>\n"]


def parse(record: Any, prompt: RagPrompt = PROMPT) -> Sample:
    return parse_request(record, prompt, AT)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_documents_are_worded_as_the_prompt_says() -> None:
    sample = parse({"documents": DOCUMENTS, "question": " Who "})
    assert sample.blocks == ("Answer.\n\n", "- A\nOne.\n\n", "- Two.\n\n", "- Three.\n\n", "Who?")
    assert [message.role for message in sample.messages] == ["user"]
    assert (sample.documents, sample.id, sample.source, sample.response) == ((1, 2, 3), AT, "input", "")


def test_a_question_may_have_no_documents() -> None:
    sample = parse({"documents": [], "question": "Who"})
    assert (sample.blocks, sample.documents) == (("Answer.\n\n", "Who?"), ())


def test_a_text_is_one_block_of_a_message() -> None:
    chat = [{"role": "system", "content": "Be\n\nbrief."}, user(["One.", "Who?"])]
    expected = (
        Message(role="system", content=("Be\n\nbrief.",)),
        Message(role="user", content=("One.", "Who?")),
    )
    sample = parse({"messages": chat, "meta": {"documents": [1]}})
    assert (sample.messages, sample.documents) == (expected, (1,))
    assert chat[0]["content"] == "Be\n\nbrief."


def test_templated_blocks_are_kept_as_given() -> None:
    sample = parse({"blocks": TEMPLATED, "meta": {"documents": [0]}})
    assert (sample.templated, sample.messages, sample.documents) == (tuple(TEMPLATED), (), (0,))


@pytest.mark.parametrize(
    "sample", [rag_sample(), Sample(id="t", source="toy", templated=tuple(TEMPLATED), response="Me.")]
)
def test_a_sample_is_a_request(sample: Sample) -> None:
    found = parse(sample_to_record(sample))
    assert (found.id, found.blocks, found.documents) == (sample.id, sample.blocks, sample.documents)
    assert (found.response, found.answers) == ("", ())


def test_a_request_may_have_an_id_and_metadata() -> None:
    question = {"documents": DOCUMENTS, "question": "Who"}
    assert parse(question | {"id": 5}).id == "5"
    named = parse(question | {"id": "x", "meta": {"user": "me"}})
    assert named.id == "x" and named.meta == parse(question).meta | {"user": "me"}
    assert parse({"messages": [user("Who?")], "meta": {"user": "me"}}).meta == {"user": "me"}


def test_a_request_may_be_any_mapping() -> None:
    record: Mapping[str, Any] = MappingProxyType({"documents": ["One."], "question": "Who"})
    assert parse(record).documents == (1,)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (["Who?"], "the request is .* a JSON object"),
        ({"id": "x"}, "the request is .*'documents' and 'question', or 'messages', or 'blocks'"),
        ({"question": "Who?", "blocks": TEMPLATED}, "the request is"),
        ({"messages": [user("Who?")], "blocks": TEMPLATED}, "the request is"),
        ({"question": "Who?"}, "field 'documents' is missing"),
        ({"documents": ["One."]}, "field 'question' is missing"),
        ({"documents": ["One."], "question": " "}, "field 'question' is ' ', it should not be blank"),
        ({"documents": ["One."], "question": "Who?", "stop": ["."]}, "unknown field 'stop' .allowed: doc"),
        ({"documents": "One.", "question": "Who?"}, "field 'documents' is 'One.', .* a list"),
        ({"documents": ["One.", " "], "question": "Who?"}, r"field 'documents\[1\]' .* blank"),
        ({"documents": [{"text": ""}], "question": "Who?"}, r"field 'documents\[0\]\.text' .* blank"),
        ({"documents": [{"title": "A"}], "question": "Who?"}, r"field 'documents\[0\]' .* the key \"text\""),
        ({"documents": [{"title": 1, "text": "One."}], "question": "Who?"}, r"documents\[0\]\.title'"),
        ({"documents": [5], "question": "Who?"}, r"field 'documents\[0\]' is 5"),
        *(
            ({"documents": [{"text": "One.", "score": score}], "question": "Who?"}, r"\.score' .* finite")
            for score in (math.nan, -math.inf, "1", True)
        ),
        (
            {"blocks": TEMPLATED, "meta": {"documents": [0], "relevance": [math.nan]}},
            "'meta.relevance' .* one finite number",
        ),
        ({"documents": b"One.", "question": "Who?"}, "field 'documents' .* a list"),
        (
            {"documents": ["One."], "question": "Who?", "meta": {"documents": [1]}},
            "'meta.documents' .* absent",
        ),
        ({"documents": ["One."], "question": "Who?", "meta": []}, "field 'meta' is"),
        ({"messages": []}, "field 'messages' is"),
        ({"messages": "Who?"}, "field 'messages' is"),
        ({"messages": ["Who?"]}, r"field 'messages\[0\]' is 'Who\?'"),
        ({"messages": [user(5)]}, r"messages\[0\]\.content' is 5, it should be a text or a list of block"),
        ({"messages": [user([])]}, r"field 'messages\[0\]\.content' is \[\]"),
        ({"messages": [user(["", "Who?"])]}, r"field 'messages\[0\]\.content\[0\]' .* empty"),
        ({"messages": [user("")]}, r"field 'messages\[0\]\.content\[0\]' .* empty"),
        ({"messages": [user(["One.", " "])]}, r"field 'messages\[0\]\.content' .* blank final block"),
        ({"messages": [user("Who?") | {"name": "me"}]}, r"field 'messages\[0\]' is"),
        ({"messages": [{"content": "Who?"}]}, r"field 'messages\[0\]' is"),
        (
            {"messages": [user("Who?"), {"role": "assistant", "content": "Me."}]},
            r"messages\[1\]\.role' .* user",
        ),
        ({"messages": [user("Who?")], "meta": {"documents": [0]}}, "field 'meta.documents' is"),
        ({"blocks": "Who?"}, "field 'blocks' is 'Who\\?', it should be a list"),
        ({"blocks": ["", "Who?"]}, r"field 'blocks\[0\]' .* empty"),
        ({"blocks": ["One.", "\n"]}, "field 'blocks' .* blank final block"),
        ({"blocks": TEMPLATED, "id": 1.5}, "field 'id' is 1.5"),
        ({"blocks": TEMPLATED, "id": True}, "field 'id' is True"),
        ({"blocks": TEMPLATED, "id": " "}, "field 'id' is ' '"),
        ({"blocks": ["\ud800"]}, r"field 'blocks\[0\]' .* Unicode"),
    ],
)
def test_the_error_of_a_bad_request_names_its_field(record: Any, why: str) -> None:
    with pytest.raises(RecordError, match=why):
        parse(record)
