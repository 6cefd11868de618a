import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blockft.data.document_pool import DocumentPool
from blockft.data.qa_formats import Question
from blockft.data.rag_prompt import Document
from blockft.data.retrieval import bm25_indexer, dense_indexer, retrieve, sort_by_score
from blockft.errors import UserError

DOCUMENTS = [
    Document(title="Fox", text="The quick brown fox jumps."),
    Document(title="Dog", text="The lazy dog sleeps."),
    Document(title="Fox hunt", text="Hounds chase the fox, says  BO."),
    Document(title="Cat", text="The cat sleeps, too."),
    Document(title="Red fox", text="A fox is red."),
]
GOLD = Document(title="Bo", text="A dog's name is Bo.", supports=True, relevance=1)


def ask(
    text: str, *own: Document, answers: tuple[str, ...] = ("bo",), pool: DocumentPool | None = None
) -> Question:
    return Question(id="q", source="toy", question=text, answers=answers, documents=own, pool=pool)


def found(question: Question, num_documents: int, index: Any = None) -> list[Document]:
    (one,) = retrieve(iter([question]), index or bm25_indexer(), num_documents)
    return list(one.documents)


def test_a_pool_has_every_document_once() -> None:
    pool = DocumentPool(
        [*DOCUMENTS, replace(DOCUMENTS[0], relevance=3, text="The quick brown fox jumps. "), GOLD]
    )
    assert [d.title for d in pool.documents] == ["Fox", "Dog", "Fox hunt", "Cat", "Red fox", "Bo"]
    assert pool.index_of(GOLD) == 5 and not pool.documents[5].supports


def test_no_distractor_contains_an_answer_in_any_case_or_spacing() -> None:
    pool = DocumentPool([*DOCUMENTS, GOLD])
    assert list(pool.distractors([GOLD], ["says bo"], range(6))) == [0, 1, 3, 4]
    assert list(pool.distractors([GOLD], ["Cat", "hounds  CHASE"], [4, 3, 2, 1])) == [4, 1]
    # in a title, too, unless the question's own document bears it
    assert list(pool.distractors([GOLD], ["hunt"], [2])) == []
    assert list(pool.distractors([DOCUMENTS[2]], ["fox hunt"], range(6))) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Cafe\u0301 Noir", "café noir"),
        ("the fox’s den", "The Fox's den"),
        ("in 1990–95", "In 1990-95"),
        ("“so”", '"So"'),
        ("`dog´", "'DOG'"),
        ("ﬁve\u00a0foxes", "five foxes"),
    ],
)
def test_no_distractor_contains_an_answer_in_another_spelling(text: str, answer: str) -> None:
    assert list(DocumentPool([Document(title="", text=text)]).distractors([], [answer], [0])) == []
    assert list(DocumentPool([Document(title="", text=answer)]).distractors([], [text], [0])) == []


def test_questions_are_filled_up_from_the_pool() -> None:
    pool = DocumentPool([*DOCUMENTS, GOLD])
    documents = found(ask("Is the red fox a dog?", GOLD, pool=pool), 3)
    assert [d.title for d in documents] == ["Red fox", "Bo", "Dog"]
    assert [d.supports for d in documents] == [False, True, False]
    relevance = [d.relevance for d in documents]
    assert relevance == sorted(relevance, reverse=True) and len(set(relevance)) == 3
    assert found(ask("fox?", GOLD, pool=pool), 1) == [replace(GOLD, relevance=0)]
    assert [d.title for d in found(ask("fox?", GOLD, pool=pool), 99)][-2:] == ["Cat", "Bo"]


def test_a_question_without_supporting_documents_keeps_its_own_documents() -> None:
    own = replace(GOLD, supports=False)
    pool = DocumentPool([*DOCUMENTS, own])
    assert "Bo" in [d.title for d in found(ask("fox?", own, DOCUMENTS[2], pool=pool), 3)]


def test_without_a_pool_the_question_s_documents_are_ranked() -> None:
    documents = found(ask("sleepy dog", *DOCUMENTS, GOLD), 2)
    assert [d.title for d in documents] == ["Dog", "Bo", "Fox", "Fox hunt", "Cat", "Red fox"]
    assert found(ask("nothing"), 2) == [] and found(ask("?!", *DOCUMENTS), 0)[0].title == "Fox"
    assert found(ask("dog", Document(title="", text="?!")), 2)[0].relevance == 0


def test_equal_scores_keep_the_order_of_the_documents() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 63, 64, 65, 700):
        scores = rng.integers(0, 9, size).astype(float)
        assert list(sort_by_score(scores)) == sorted(range(size), key=lambda i: (-scores[i], i))


def test_scripts_without_spaces_are_searched_by_character() -> None:
    documents = [Document(title=title, text="") for title in ("東京都", "京都市", "大阪")]
    assert [d.title for d in found(ask("大きい阪", *documents), 0)][0] == "大阪"


class Letters:
    """A sentence-transformers model whose vectors count letters."""

    def __init__(self, name: str) -> None:
        if name == "none":
            raise OSError("no such model\nat all")

    def encode_query(self, texts: list[str], **how: Any) -> Any:
        counts = np.array([[text.lower().count(c) for c in "abcdefghijklmnop"] for text in texts], np.float32)
        return counts / np.maximum(1e-6, np.linalg.norm(counts, axis=1, keepdims=True))

    encode_document = encode_query


def test_dense_retrieval_ranks_by_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Letters))
    pool = DocumentPool([*DOCUMENTS, GOLD])
    documents = found(ask("cat", GOLD, pool=pool), 2, dense_indexer("letters"))
    assert [d.title for d in documents] == ["Cat", "Bo"] and 0 < documents[1].relevance < 1
    assert found(ask("cat"), 2, dense_indexer("letters")) == []
    with pytest.raises(UserError, match="data.dense_model none cannot be loaded: no such model$"):
        dense_indexer("none")


def test_dense_retrieval_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'blockft\[dense\]'"):
        dense_indexer("letters")
