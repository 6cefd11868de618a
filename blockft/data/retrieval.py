"""Retrieval: rank the documents of questions by a search, and find distractors with it."""

import os
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
from blockft.hub_access import check_hub

BATCH_QUESTIONS = 256
"""Number of questions scored together."""

NOT_RETRIEVED = "no retrieved document contains the answer"
"""The reason for not training on a question whose documents were found by a search in a corpus."""

Scorer = Callable[[Sequence[str]], Iterator[NDArray[np.float64]]]
"""Takes questions and yields, for each question, the scores (N,) of the N indexed texts."""

Indexer = Callable[[Sequence[str]], Scorer]
"""Indexes N texts and returns their scorer."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""A word, or one character of a script that puts no spaces between words."""


def retrieve(
    questions: Iterator[Question], indexer: Indexer, num_documents: int, *, has_corpus: bool = False
) -> Iterator[Question]:
    """Yield the questions with retrieved documents, best first. The relevance of a document is its score.

    A question keeps its supporting documents, or all its documents if none is known to support the answer.
    It is filled up to `num_documents` with the best documents of its pool that contain no answer. A question
    without a pool keeps its own documents, which are ranked. Equal scores keep the order of the pool.

    If the pool is a corpus (`has_corpus`), a question without documents gets the best `num_documents` of it.
    Those that contain an answer count as its support (as in DPR, Karpukhin et al. 2020).
    """
    for pool, group in groupby(questions, key=attrgetter("pool")):
        if pool is None:
            yield from (_rank_documents(question, indexer) for question in group)
            continue
        score = indexer([_search_text(document) for document in pool.documents])
        while batch := list(islice(group, BATCH_QUESTIONS)):
            for question, scores in zip(batch, score([q.question for q in batch]), strict=True):
                choose = _search_pool if has_corpus and not question.documents else _choose_documents
                yield choose(question, scores, num_documents)


def bm25_indexer() -> Indexer:
    """Return an indexer for BM25 scores in Lucene's form (Robertson and Zaragoza 2009).

    It uses no list of stop words, so it works for any language.
    """
    return _index_bm25


def dense_indexer(model: str) -> Indexer:
    """Return an indexer for cosine similarities of sentence embeddings.

    `model` is a sentence-transformers model: a folder or an id on the Hub.

    Raises:
        UserError: sentence-transformers is not installed, or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "retriever: dense needs sentence-transformers, which is not installed: "
            "pip install 'blockft[dense]'"
        ) from error
    if not os.path.isdir(model):
        check_hub(f"data.dense_model {model}", model)
    try:
        encoder = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.dense_model {model} cannot be loaded: {reason}") from error
    return partial(_index_dense, encoder)


def document_similarity(documents: Sequence[Document], indexer: Indexer) -> list[NDArray[np.float64]]:
    """Return, for each of N documents, the scores (N,) of all documents in a search for its text."""
    texts = [_search_text(document) for document in documents]
    return list(indexer(texts)(texts))


def sort_by_score(scores: NDArray[np.float64]) -> Iterator[int]:
    """Yield indices by falling score, equal scores by index. Sort only as many as the caller takes."""
    num_yielded, num_sorted = 0, 64
    while num_yielded < len(scores):
        top = np.arange(len(scores))
        if num_sorted < len(scores):
            top = np.flatnonzero(scores >= np.partition(scores, -num_sorted)[-num_sorted])
        top = top[np.argsort(-scores[top], kind="stable")]
        yield from top[num_yielded:].tolist()
        num_yielded, num_sorted = len(top), 4 * num_sorted


def _choose_documents(question: Question, scores: NDArray[np.float64], num_documents: int) -> Question:
    pool = question.pool
    assert pool
    supporting = [d for d in question.documents if d.supports]
    supports_of = {pool.index_of(d): d.supports for d in supporting or question.documents}
    kept_documents = [pool.documents[i] for i in supports_of]
    distractors = pool.distractors(kept_documents, question.answers, sort_by_score(scores))
    chosen = [*supports_of, *islice(distractors, max(0, num_documents - len(supports_of)))]
    chosen.sort(key=lambda i: (-scores[i], i))
    documents = (
        replace(pool.documents[i], relevance=float(scores[i]), supports=supports_of.get(i, False))
        for i in chosen
    )
    return replace(question, documents=tuple(documents))


def _search_pool(question: Question, scores: NDArray[np.float64], num_documents: int) -> Question:
    """Return a question without documents with the best documents of its pool."""
    pool = question.pool
    assert pool
    documents = tuple(
        replace(
            pool.documents[i],
            relevance=float(scores[i]),
            supports=pool.contains_answer(pool.documents[i], question.answers),
        )
        for i in islice(sort_by_score(scores), num_documents)
    )
    is_supported = any(document.supports for document in documents) or not question.answers
    missing = "" if is_supported or not num_documents else NOT_RETRIEVED
    return replace(question, documents=documents, missing_evidence=missing)


def _rank_documents(question: Question, indexer: Indexer) -> Question:
    score = indexer([_search_text(document) for document in question.documents])
    (scores,) = score([question.question])
    documents = (replace(question.documents[i], relevance=float(scores[i])) for i in sort_by_score(scores))
    return replace(question, documents=tuple(documents))


def _search_text(document: Document) -> str:
    return "\n".join(document.key)


def _import_bm25() -> Any:
    """Import bm25s without JAX: bm25s does not need JAX here, and JAX would reserve most GPU memory."""
    hide_jax = "jax" not in sys.modules
    if hide_jax:
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        from bm25s import BM25
    finally:
        if hide_jax:
            del sys.modules["jax"]
    return BM25


def _index_bm25(texts: Sequence[str]) -> Scorer:
    BM25 = _import_bm25()
    vocabulary: dict[str, int] = {}
    text_ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in _words(text)] for text in texts]
    index = BM25()
    if vocabulary:
        index.index((text_ids, vocabulary), create_empty_token=False, show_progress=False)

    def score(questions: Sequence[str]) -> Iterator[NDArray[np.float64]]:
        for question in questions:
            known_ids = [vocabulary[word] for word in _words(question) if word in vocabulary]
            yield _round(index.get_scores_from_ids(known_ids)) if known_ids else np.zeros(len(texts))

    return score


def _index_dense(encoder: Any, texts: Sequence[str]) -> Scorer:
    options = {"normalize_embeddings": True, "show_progress_bar": False}
    text_embeddings = encoder.encode_document(list(texts), **options) if texts else []

    def score(questions: Sequence[str]) -> Iterator[NDArray[np.float64]]:
        for embedding in encoder.encode_query(list(questions), **options):
            yield _round(text_embeddings @ embedding) if texts else np.zeros(0)

    return score


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _round(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Round scores, so that the order of a sum makes no difference between equal texts."""
    return np.asarray(np.round(scores.astype(np.float64), 4))
