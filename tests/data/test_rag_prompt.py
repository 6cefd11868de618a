from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.config.settings import PromptSettings
from blockft.data.rag_prompt import Document, RagPrompt
from blockft.data.sample import Message
from blockft.errors import UserError

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


@pytest.mark.parametrize(
    ("limit", "kept"), [(0, {""}), (1, {"B", "D"}), (2, {"BD"}), (3, {"ABD", "BCD"}), (9, {"ABCD"})]
)
def test_a_limit_keeps_the_most_relevant_documents_and_breaks_ties_at_random(
    limit: int, kept: set[str]
) -> None:
    assert {titles(order="given", num_documents=limit, seed=seed) for seed in range(20)} == kept


def test_a_limit_never_drops_a_supporting_document() -> None:
    documents = [replace(d, supports=d.title in "AC") for d in DOCUMENTS]
    kept = [titles(documents, order="given", num_documents=limit) for limit in (0, 1, 2, 4)]
    assert kept == ["", "AC", "AC", "ABCD"]
    assert titles(documents, order="given", num_documents=3, seed=0) in ("ABC", "ACD")
    _, meta = build(num_documents=1).build("why?", documents, "s")
    assert meta == {"documents": [1, 2], "relevance": [0, 0], "supporting": [1, 2]}


def test_equal_sets_of_shared_documents_have_one_order() -> None:
    turned = [replace(d, relevance=-d.relevance) for d in reversed(DOCUMENTS)]
    for order in ("ascending", "shuffled"):
        both = {titles(ds, id, order=order, shared_context=True) for ds in (DOCUMENTS, turned) for id in "st"}
        assert len(both) == 1
    orders = {titles(DOCUMENTS[:n], shared_context=True, seed=seed) for n in (3, 4) for seed in range(20)}
    assert len(orders) > 10
    assert titles(order="given", shared_context=True) == "ABCD"


DEFAULT = PromptSettings()
TEXTS = st.text(max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=5), st.data())
def test_a_document_is_the_same_block_in_any_prompt_also_after_a_template_trims(
    texts: list[tuple[str, str]], data: st.DataObject
) -> None:
    """The text of a block depends only on its document, also after a template has trimmed the message."""
    documents = [Document(title=title, text=text) for title, text in texts]
    seen: dict[tuple[str, str], str] = {}
    for documents_in in ("user", "system"):
        some = data.draw(st.permutations(documents))[: data.draw(st.integers(0, 5))]
        prompt = RagPrompt(
            instruction=DEFAULT.instruction,
            document=DEFAULT.document,
            question=DEFAULT.question,
            documents_in=documents_in,
            order="given",
        )
        messages, meta = prompt.build(" why? ", some, "s")
        blocks = [text for message in messages for text in message.content]
        kept = [d for d in some if any(d.key)]
        assert [blocks[i] for i in meta["documents"]] == [
            seen.setdefault(d.key, blocks[i]) for i, d in zip(meta["documents"], kept, strict=True)
        ]
        assert all(message.text == message.text.strip() for message in messages)
        assert blocks[-1].lstrip() == "Question: why?\nAnswer in a few words."


def test_documents_are_stripped_and_need_no_title() -> None:
    prompt = replace(build(), document=DEFAULT.document)
    ragged = [
        Document(title=" A\n", text="\n one "),
        Document(title=" ", text="two"),
        Document(title="C", text=""),
    ]
    messages, meta = prompt.build("why?", [*ragged, Document(title="", text=" \n")], "s")
    assert messages[0].content == ("Read.\n", "\n\nA\none", "\n\ntwo", "\n\nC", "Q: why?")
    assert meta["documents"] == [1, 2, 3]
    braces = replace(prompt, document="{{{title}}} {text!s:>4}")
    messages, _ = braces.build("why?", ragged[1:2], "s")
    assert messages[0].content[1] == "{} two".replace("} t", "}  t")


def test_a_template_may_separate_documents_at_their_end() -> None:
    messages, _ = build(document="{title}\n{text}\n\n").build("why?", DOCUMENTS[:1], "s")
    assert messages[0].content[1] == "A\nA {x}\n\n"


def test_a_prompt_consists_of_instruction_documents_and_question() -> None:
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
