"""SQuAD's layout: questions about the paragraphs of an article, of which the others are the distractors."""

import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockft.data.document_pool import Pool
from blockft.data.qa_formats import NO_ANSWER, Dropped, Question, accepted
from blockft.data.rag_prompt import Document, RagPrompt
from blockft.data.records import Placed
from blockft.data.retrieval import Index, likeness
from blockft.data.sample import RecordError, check, take, text_of

Waiting = deque[tuple[int, Question]]
"""Questions about one paragraph, each with its number in the article."""


@dataclass(frozen=True, eq=False)
class Posed:
    """A question as an article poses it: the article's paragraphs, its own, and the JSON object."""

    pool: Pool
    own: Document
    record: Any


def pose(articles: Iterable[Placed]) -> Iterator[Placed]:
    """A record per question, article by article.

    Articles come nested (`paragraphs` with `qas`), or flat, as the Hub has them: a row per question with
    `title` and `context`, consecutive rows with one title being an article. An article is in memory whole.
    """
    for _, group in groupby(articles, key=_article_of):
        placed = list(group)
        yield from _rows(placed) if _is_flat(placed[0][1]) else _paragraphs(*placed[0])


def question(posed: Any) -> Question:
    """One question; the answer that most annotators gave is the response.

    Raises:
        Dropped: the question has no answer (SQuAD 2).
    """
    assert isinstance(posed, Posed)
    record = posed.record
    check(isinstance(record, Mapping), "the question", record, "be a JSON object")
    answers = take(record, "answers", [])
    if isinstance(answers, Mapping):
        answers = [{"text": text} for text in take(answers, "text")]
    check(isinstance(answers, list), "field 'answers'", answers, "be a list")
    for i, answer in enumerate(answers):
        check(isinstance(answer, Mapping), f"field 'answers[{i}]'", answer, "be a JSON object")
    if not answers or take(record, "is_impossible", False):
        raise Dropped(NO_ANSWER)
    texts = Counter(text_of(a.get("text"), f"field 'answers[{i}].text'") for i, a in enumerate(answers))
    return Question(
        id=text_of(take(record, "id"), "field 'id'"),
        source="squad",
        question=text_of(take(record, "question"), "field 'question'"),
        answers=accepted([text for text, _ in texts.most_common()], "field 'answers'"),
        documents=(posed.own,),
        pool=posed.pool,
    )


def surround(asked: Question) -> Question:
    """The question with every paragraph of its article that holds no answer, in the article's order."""
    assert asked.pool
    others = asked.pool.distractors(asked.documents, asked.answers, range(len(asked.pool)))
    return _among(asked, others)


def share(
    questions: Iterator[Question],
    prompt: RagPrompt,
    drop: Callable[[str], None],
    index: Index | None = None,
    limit: int | None = None,
) -> Iterator[Question]:
    """Questions of an article see sets of its paragraphs, each its own paragraph's, and come set by set.

    The sets hold `prompt.num_documents` each and are drawn by lot; with an index, paragraphs that are alike
    meet in a set. Each paragraph is in one set, unless a `limit` is set to the questions of a set:
    then these are about as many paragraphs as can be, all sets are full, and they are drawn again for
    the questions that are left. A question is dropped if another paragraph of its set holds its answer.
    """
    for pool, group in groupby(questions, key=attrgetter("pool")):
        waiting: list[Waiting] = [deque() for _ in pool.documents]
        for number, one in enumerate(group):
            waiting[pool.index_of(one.documents[0])].append((number, one))
        scores = likeness(pool.documents, index) if index else None
        lots = random.Random(f"{prompt.seed}:{pool.documents[0].title}")
        while any(waiting):
            for indices in _sets(pool, prompt.num_documents, lots, scores, fills=limit is not None):
                for one in _take([waiting[paragraph] for paragraph in indices], limit or sys.maxsize):
                    others = list(pool.distractors(one.documents, one.answers, indices))
                    if len(others) < len(indices) - 1:
                        drop("answer in another document of its set")
                    else:
                        yield _among(one, others)


def _take(waiting: Sequence[Waiting], limit: int) -> list[Question]:
    """Up to so many questions, in order: the first that waits for each paragraph, then the second, ..."""
    taken: list[tuple[int, Question]] = []
    while any(waiting) and len(taken) < limit:
        asked = [queue for queue in waiting if queue]
        taken += [queue.popleft() for queue in asked[: limit - len(taken)]]
    return [one for _, one in sorted(taken, key=itemgetter(0))]


def _sets(
    pool: Pool,
    num_documents: int | None,
    lots: random.Random,
    scores: Sequence[NDArray[np.float64]] | None,
    fills: bool,
) -> list[list[int]]:
    """The paragraphs of an article in sets: one drawn by lot, then others by lot, or the most like it.

    A paragraph is in one set, the last of which is short, or, if sets are to be filled, in one or more.
    """
    everything = list(range(len(pool)))
    lots.shuffle(everything)
    size = max(1, num_documents if num_documents is not None else len(everything))
    left, used, sets = everything, set[int](), []
    while left:
        first, *others = left
        if fills:
            others += [paragraph for paragraph in everything if paragraph in used]
        if scores:
            others.sort(key=scores[first].__getitem__, reverse=True)
        sets.append([first, *others[: size - 1]])
        used.update(sets[-1])
        left = [paragraph for paragraph in left if paragraph not in used]
    return sets


def _among(asked: Question, others: Iterable[int]) -> Question:
    """The question with its own paragraph, which supports it, among others, in the article's order."""
    pool = asked.pool
    assert pool
    own = pool.index_of(asked.documents[0])
    documents = (asked.documents[0] if i == own else pool.documents[i] for i in sorted([own, *others]))
    return replace(asked, documents=tuple(documents))


def _article_of(placed: Placed) -> object:
    """What rows of one article share, their title; anything else is an article of its own."""
    row = placed[1]
    return row["title"] if _is_flat(row) and isinstance(row.get("title"), str) else object()


def _is_flat(row: Any) -> bool:
    return isinstance(row, Mapping) and "context" in row


def _rows(placed: list[Placed]) -> Iterator[Placed]:
    """The questions of an article that comes in rows."""
    own: dict[str, Document] = {}
    faults: dict[str, RecordError] = {}
    for at, row in placed:
        try:
            title = text_of(take(row, "title"), "field 'title'", may_be_blank=True)
            context = text_of(row["context"], "field 'context'")
            own.setdefault(context, _document(title, context))
        except RecordError as error:
            faults[at] = error
    pool = Pool(own.values())
    for at, row in placed:
        yield at, faults[at] if at in faults else Posed(pool, own[row["context"]], row)


def _paragraphs(at: str, article: Any) -> Iterator[Placed]:
    """The questions of an article that holds paragraphs; a paragraph or article that is unfit is a record."""
    if isinstance(article, RecordError):
        yield at, article
        return
    own: dict[int, Document] = {}
    try:
        check(isinstance(article, Mapping), "the article", article, "be a JSON object")
        title = text_of(take(article, "title", ""), "field 'title'", may_be_blank=True)
        paragraphs = take(article, "paragraphs")
        check(isinstance(paragraphs, list), "field 'paragraphs'", paragraphs, "be a list")
    except RecordError as error:
        yield at, error
        return
    at = f"{at}, article {title!r}"
    for i, paragraph in enumerate(paragraphs):
        try:
            check(isinstance(paragraph, Mapping), "the paragraph", paragraph, "be a JSON object")
            check(isinstance(take(paragraph, "qas"), list), "field 'qas'", paragraph["qas"], "be a list")
            own[i] = _document(title, text_of(take(paragraph, "context"), "field 'context'"))
        except RecordError as error:
            yield f"{at}, paragraphs[{i}]", error
    pool = Pool(own.values())
    for i, document in own.items():
        for j, record in enumerate(paragraphs[i]["qas"]):
            yield f"{at}, paragraphs[{i}].qas[{j}]", Posed(pool, document, record)


def _document(title: str, context: str) -> Document:
    return Document(title=title, text=context, relevance=1, supports=True)
