"""Retrieval: the documents that a search would set before a question, its distractors among them."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockft.data.qa_formats import Question
from blockft.data.rag_prompt import Document
from blockft.errors import UserError

BATCH_QUESTIONS = 256
"""Questions scored together."""

Scorer = Callable[[Sequence[str]], Iterator[NDArray[np.float64]]]
"""Gives for each question the score of every text of an index."""

Index = Callable[[Sequence[str]], Scorer]
"""Makes a scorer of texts."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""A word, or a character of a script that puts no space between words."""


def retrieve(questions: Iterator[Question], index: Index, num_documents: int) -> Iterator[Question]:
    """Questions with the documents that retrieval finds, the best first; relevance is the score of each.

    A question keeps the documents that support it (all of its own, if none is known to) and takes from its
    pool, in the order of their scores, others that hold no answer, up to `num_documents`. One without a pool
    has its own documents ranked. Equal scores stand in the order of the pool.
    """
    for pool, group in groupby(questions, key=attrgetter("pool")):
        if pool is None:
            yield from (_rank_documents(question, index) for question in group)
            continue
        scorer = index([_search_text(document) for document in pool.documents])
        while batch := list(islice(group, BATCH_QUESTIONS)):
            for question, scores in zip(batch, scorer([q.question for q in batch]), strict=True):
                yield _choose_documents(question, scores, num_documents)


def build_bm25_index() -> Index:
    """Lexical scores (Robertson and Zaragoza 2009, Lucene's form); no stop words, so for any language."""
    return _index_bm25


def build_dense_index(model: str) -> Index:
    """Scores of a sentence-transformers model, a folder or an id on the Hub: cosines of its vectors.

    Raises:
        UserError: sentence-transformers is not installed, or there is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "retriever: dense needs sentence-transformers, not installed here: pip install 'blockft[dense]'"
        ) from error
    try:
        encoder = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.dense_model {model} cannot be loaded: {reason}") from error
    return partial(_index_dense, encoder)


def document_similarity(documents: Sequence[Document], index: Index) -> list[NDArray[np.float64]]:
    """For each document, the scores of all (N,) in a search for its text."""
    texts = [_search_text(document) for document in documents]
    return list(index(texts)(texts))


def sort_by_score(scores: NDArray[np.float64]) -> Iterator[int]:
    """Indices by falling score, equals in order; sorted only as far as they are taken."""
    done, num_sorted = 0, 64
    while done < len(scores):
        top = np.arange(len(scores))
        if num_sorted < len(scores):
            top = np.flatnonzero(scores >= np.partition(scores, -num_sorted)[-num_sorted])
        top = top[np.argsort(-scores[top], kind="stable")]
        yield from top[done:].tolist()
        done, num_sorted = len(top), 4 * num_sorted


def _choose_documents(question: Question, scores: NDArray[np.float64], num_documents: int) -> Question:
    pool = question.pool
    assert pool
    supporting = [d for d in question.documents if d.supports]
    kept = {pool.index_of(d): d.supports for d in supporting or question.documents}
    own = [pool.documents[i] for i in kept]
    found = pool.distractors(own, question.answers, sort_by_score(scores))
    chosen = [*kept, *islice(found, max(0, num_documents - len(kept)))]
    chosen.sort(key=lambda i: (-scores[i], i))
    documents = (
        replace(pool.documents[i], relevance=float(scores[i]), supports=kept.get(i, False)) for i in chosen
    )
    return replace(question, documents=tuple(documents))


def _rank_documents(question: Question, index: Index) -> Question:
    (scores,) = index([_search_text(document) for document in question.documents])([question.question])
    documents = (replace(question.documents[i], relevance=float(scores[i])) for i in sort_by_score(scores))
    return replace(question, documents=tuple(documents))


def _search_text(document: Document) -> str:
    return "\n".join(document.key)


def _import_bm25() -> Any:
    """bm25s without JAX, of which it has no use here: importing it would take most of a GPU's memory."""
    hidden = "jax" not in sys.modules
    if hidden:
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        from bm25s import BM25
    finally:
        if hidden:
            del sys.modules["jax"]
    return BM25


def _index_bm25(texts: Sequence[str]) -> Scorer:
    BM25 = _import_bm25()
    ids_of: dict[str, int] = {}
    ids = [[ids_of.setdefault(word, len(ids_of)) for word in _words(text)] for text in texts]
    scores = BM25()
    if ids_of:
        scores.index((ids, ids_of), create_empty_token=False, show_progress=False)

    def score(questions: Sequence[str]) -> Iterator[NDArray[np.float64]]:
        for question in questions:
            known = [ids_of[word] for word in _words(question) if word in ids_of]
            yield _rounded(scores.get_scores_from_ids(known)) if known else np.zeros(len(texts))

    return score


def _index_dense(encoder: Any, texts: Sequence[str]) -> Scorer:
    how = {"normalize_embeddings": True, "show_progress_bar": False}
    metadata = encoder.encode_document(list(texts), **how) if texts else []

    def score(questions: Sequence[str]) -> Iterator[NDArray[np.float64]]:
        for vector in encoder.encode_query(list(questions), **how):
            yield _rounded(metadata @ vector) if texts else np.zeros(0)

    return score


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _rounded(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Differences that hang on the order of a sum are none."""
    return np.asarray(np.round(scores.astype(np.float64), 4))
