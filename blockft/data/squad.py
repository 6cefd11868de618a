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

from blockft.data.document_pool import DocumentPool
from blockft.data.qa_formats import NO_ANSWER, Question, RecordDropped, accepted_answers
from blockft.data.rag_prompt import Document, RagPrompt
from blockft.data.records import PlacedRecord
from blockft.data.retrieval import Index, document_similarity
from blockft.data.sample import RecordError, check_field, get_field, parse_text

WaitingQuestions = deque[tuple[int, Question]]
"""Questions about one paragraph, each with its number in the article."""


@dataclass(frozen=True, eq=False)
class ArticleQuestion:
    """A question as an article poses it: the article's paragraphs, its own, and the JSON object."""

    pool: DocumentPool
    own: Document
    record: Any


def read_article_questions(articles: Iterable[PlacedRecord]) -> Iterator[PlacedRecord]:
    """A record per question, article by article.

    Articles come nested (`paragraphs` with `qas`), or flat, as the Hub has them: a row per question with
    `title` and `context`, consecutive rows with one title being an article. An article is in memory whole.
    """
    for _, group in groupby(articles, key=_article_key):
        placed = list(group)
        yield from (
            _questions_from_rows(placed)
            if _is_row_format(placed[0][1])
            else _questions_from_paragraphs(*placed[0])
        )


def parse_question(posed: Any) -> Question:
    """One question; the answer that most annotators gave is the response.

    Raises:
        Dropped: the question has no answer (SQuAD 2).
    """
    assert isinstance(posed, ArticleQuestion)
    record = posed.record
    check_field(isinstance(record, Mapping), "the question", record, "be a JSON object")
    answers = get_field(record, "answers", [])
    if isinstance(answers, Mapping):
        answers = [{"text": text} for text in get_field(answers, "text")]
    check_field(isinstance(answers, list), "field 'answers'", answers, "be a list")
    for i, answer in enumerate(answers):
        check_field(isinstance(answer, Mapping), f"field 'answers[{i}]'", answer, "be a JSON object")
    if not answers or get_field(record, "is_impossible", False):
        raise RecordDropped(NO_ANSWER)
    texts = Counter(parse_text(a.get("text"), f"field 'answers[{i}].text'") for i, a in enumerate(answers))
    return Question(
        id=parse_text(get_field(record, "id"), "field 'id'"),
        source="squad",
        question=parse_text(get_field(record, "question"), "field 'question'"),
        answers=accepted_answers([text for text, _ in texts.most_common()], "field 'answers'"),
        documents=(posed.own,),
        pool=posed.pool,
    )


def add_distractors(asked: Question) -> Question:
    """The question with every paragraph of its article that holds no answer, in the article's order."""
    assert asked.pool
    others = asked.pool.distractors(asked.documents, asked.answers, range(len(asked.pool)))
    return _with_paragraphs(asked, others)


def group_by_context(
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
        waiting: list[WaitingQuestions] = [deque() for _ in pool.documents]
        for number, one in enumerate(group):
            waiting[pool.index_of(one.documents[0])].append((number, one))
        scores = document_similarity(pool.documents, index) if index else None
        lots = random.Random(f"{prompt.seed}:{pool.documents[0].title}")
        while any(waiting):
            for indices in _paragraph_sets(pool, prompt.num_documents, lots, scores, fills=limit is not None):
                for one in _next_batch([waiting[paragraph] for paragraph in indices], limit or sys.maxsize):
                    others = list(pool.distractors(one.documents, one.answers, indices))
                    if len(others) < len(indices) - 1:
                        drop("answer in another document of its set")
                    else:
                        yield _with_paragraphs(one, others)


def _next_batch(waiting: Sequence[WaitingQuestions], limit: int) -> list[Question]:
    """Up to so many questions, in order: the first that waits for each paragraph, then the second, ..."""
    taken: list[tuple[int, Question]] = []
    while any(waiting) and len(taken) < limit:
        asked = [queue for queue in waiting if queue]
        taken += [queue.popleft() for queue in asked[: limit - len(taken)]]
    return [one for _, one in sorted(taken, key=itemgetter(0))]


def _paragraph_sets(
    pool: DocumentPool,
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


def _with_paragraphs(asked: Question, others: Iterable[int]) -> Question:
    """The question with its own paragraph, which supports it, among others, in the article's order."""
    pool = asked.pool
    assert pool
    own = pool.index_of(asked.documents[0])
    documents = (asked.documents[0] if i == own else pool.documents[i] for i in sorted([own, *others]))
    return replace(asked, documents=tuple(documents))


def _article_key(placed: PlacedRecord) -> object:
    """What rows of one article share, their title; anything else is an article of its own."""
    row = placed[1]
    return row["title"] if _is_row_format(row) and isinstance(row.get("title"), str) else object()


def _is_row_format(row: Any) -> bool:
    return isinstance(row, Mapping) and "context" in row


def _questions_from_rows(placed: list[PlacedRecord]) -> Iterator[PlacedRecord]:
    """The questions of an article that comes in rows."""
    own: dict[str, Document] = {}
    faults: dict[str, RecordError] = {}
    for at, row in placed:
        try:
            title = parse_text(get_field(row, "title"), "field 'title'", may_be_blank=True)
            context = parse_text(row["context"], "field 'context'")
            own.setdefault(context, _document(title, context))
        except RecordError as error:
            faults[at] = error
    pool = DocumentPool(own.values())
    for at, row in placed:
        yield at, faults[at] if at in faults else ArticleQuestion(pool, own[row["context"]], row)


def _questions_from_paragraphs(at: str, article: Any) -> Iterator[PlacedRecord]:
    """The questions of an article that holds paragraphs; a paragraph or article that is unfit is a record."""
    if isinstance(article, RecordError):
        yield at, article
        return
    own: dict[int, Document] = {}
    try:
        check_field(isinstance(article, Mapping), "the article", article, "be a JSON object")
        title = parse_text(get_field(article, "title", ""), "field 'title'", may_be_blank=True)
        paragraphs = get_field(article, "paragraphs")
        check_field(isinstance(paragraphs, list), "field 'paragraphs'", paragraphs, "be a list")
    except RecordError as error:
        yield at, error
        return
    at = f"{at}, article {title!r}"
    for i, paragraph in enumerate(paragraphs):
        try:
            check_field(isinstance(paragraph, Mapping), "the paragraph", paragraph, "be a JSON object")
            check_field(
                isinstance(get_field(paragraph, "qas"), list), "field 'qas'", paragraph["qas"], "be a list"
            )
            own[i] = _document(title, parse_text(get_field(paragraph, "context"), "field 'context'"))
        except RecordError as error:
            yield f"{at}, paragraphs[{i}]", error
    pool = DocumentPool(own.values())
    for i, document in own.items():
        for j, record in enumerate(paragraphs[i]["qas"]):
            yield f"{at}, paragraphs[{i}].qas[{j}]", ArticleQuestion(pool, document, record)


def _document(title: str, context: str) -> Document:
    return Document(title=title, text=context, relevance=1, supports=True)
