from typing import Any

import pytest

from blockft.data.rag import Document, RagPrompt, trim
from blockft.data.sample import Message
from blockft.errors import UserError
from tests.data.toys import rag_sample

DOCUMENTS = [
    Document(title=t, text=f"{t} {{x}}", relevance=r) for t, r in (("A", 0), ("B", 1), ("C", 0), ("D", 1))
]


def build(**options: Any) -> RagPrompt:
    wording = {"instruction": "Read.\n", "document": "{title}: {text}\n", "question": "Q: {question}"}
    return RagPrompt(**wording | options)


def titles(documents: list[Document] = DOCUMENTS, sample_id: str = "s", **options: Any) -> str:
    messages, meta = build(**options).build("why?", documents, sample_id)
    blocks = [text for message in messages for text in message.content]
    return "".join(blocks[i][0] for i in meta["documents"])


def test_documents_are_ordered_by_relevance() -> None:
    assert titles() == "ACBD"
    assert titles(order="descending") == "BDAC"
    assert titles(order="given") == "ABCD"
    shuffles = {titles(order="shuffled", seed=seed) for seed in range(20)}
    assert len(shuffles) > 5
    assert titles(order="shuffled", seed=3) == titles(order="shuffled", seed=3)


@pytest.mark.parametrize(("limit", "kept"), [(0, ""), (1, "B"), (2, "BD"), (3, "ABD"), (9, "ABCD")])
def test_a_limit_keeps_the_most_relevant_documents(limit: int, kept: str) -> None:
    assert titles(order="given", num_documents=limit) == kept


def test_a_prompt_is_instruction_documents_question() -> None:
    messages, meta = build().build("{y}?", DOCUMENTS[:1], "s")
    assert messages == (Message(role="user", content=("Read.\n", "A: A {x}\n", "Q: {y}?")),)
    assert meta == {"documents": [1], "relevance": [0]}
    messages, _ = build(documents_in="system").build("y?", DOCUMENTS[:1], "s")
    assert [(m.role, m.content) for m in messages] == [
        ("system", ("Read.\n", "A: A {x}\n")),
        ("user", ("Q: y?",)),
    ]


@pytest.mark.parametrize(
    ("wording", "named"),
    [
        ({"document": "{text} {rank}"}, "{rank}"),
        ({"document": "{title}"}, "{text}"),
        ({"document": "{text.__class__} {text}"}, "__class__"),
        ({"question": "Q:"}, "{question}"),
        ({"question": "{question"}, "question"),
        ({"instruction": "{}"}, "instruction"),
        ({"num_documents": -1}, "num_documents"),
    ],
)
def test_a_wrong_template_is_refused(wording: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build(**wording)


def test_trimming_takes_the_least_relevant_and_never_the_evidence() -> None:
    sample = rag_sample(documents=("gold", "x", "y"), meta={"documents": [1, 2, 3], "relevance": [1, 0, 0.5]})
    once = trim(sample)
    assert once and once.blocks == ("Answer.\n\n", "gold", "y", "Who?")
    assert once.meta == {"documents": [1, 2], "relevance": [1, 0.5]}
    twice = trim(once)
    assert twice and twice.blocks == ("Answer.\n\n", "gold", "Who?")
    assert trim(twice) is None
