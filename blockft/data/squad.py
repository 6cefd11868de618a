"""SQuAD: questions about the paragraphs of an article, whose other paragraphs are the distractors."""

import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockft.data.document_pool import DocumentPool
from blockft.data.fields import SQUAD_ARTICLE, SQUAD_PARAGRAPH
from blockft.data.qa_formats import NO_ANSWER, Question, accepted_answers, check_answerable
from blockft.data.rag_prompt import Document, RagPrompt
from blockft.data.records import PlacedRecord
from blockft.data.retrieval import Indexer, document_similarity
from blockft.data.sample import RecordDropped, RecordError, check_field, get_field, parse_id, parse_text

OTHER_DOCUMENT = "answer in another document of its set"
NO_SPAN = "answer not in its paragraph"
"""The reason for not training on a question whose paragraph contains none of its answers."""

WaitingQuestions = deque[tuple[int, Question]]
"""Questions about one paragraph, each with its number in the article."""


@dataclass(frozen=True, eq=False)
class ArticleQuestion:
    """The JSON object of a question, the paragraph that it is about, and all paragraphs of its article.

    `path` is the place of the question in its article for error messages, with the dot at its end.
    `unknown_fields` are those of the article and of the paragraph.
    """

    pool: DocumentPool
    paragraph: Document
    record: Any
    path: str = ""
    unknown_fields: frozenset[str] = frozenset()


def read_article_questions(articles: Iterable[PlacedRecord]) -> Iterator[PlacedRecord]:
    """Convert articles into one record (`ArticleQuestion`) per question, article by article.

    The authors' files hold nested articles, and the dataset on the Hub one row per question. Consecutive rows
    with the same title are one article::

        {"title": ..., "paragraphs": [{"context": ..., "qas": [question, question]}, ...]}
        {"title": ..., "context": ..., "id": ..., "question": ..., "answers": {"text": [...]}}

    One article is in memory at a time.
    """
    for _, group in groupby(articles, key=_article_key):
        placed = list(group)
        if _is_row_format(placed[0][1]):
            yield from _questions_from_rows(placed)
        else:
            yield from _questions_from_paragraphs(*placed[0])


def parse_question(article_question: Any) -> Question:
    """Parse one question with its paragraph as its only document.

    ::

        {"id": "q1", "question": "who?", "answers": [{"text": "the fox"}, {"text": "a fox"}]}
        -> answers ("the fox", "a fox"), documents (the paragraph,), pool (all paragraphs)

    The answer that most annotators gave becomes the response. The place of an answer (`answer_start`) is not
    used. If the paragraph contains none of the answers, it does not support the question.

    Raises:
        RecordDropped: the question has no answer (SQuAD 2).
        RecordError: a field is missing or has the wrong type.
    """
    assert isinstance(article_question, ArticleQuestion)
    record, path = article_question.record, article_question.path
    name = f"field {path.removesuffix('.')!r}" if path else "the record"
    check_field(isinstance(record, Mapping), name, record, "be a JSON object")
    check_answerable(record, path=path)
    answers = get_field(record, "answers", path=path)
    if answers is None:
        raise RecordDropped(NO_ANSWER)
    place = f"{path}answers"
    if isinstance(answers, Mapping):
        texts = get_field(answers, "text", path=f"{place}.")
        check_field(isinstance(texts, list), f"field '{place}.text'", texts, "be a list")
        placed = [(f"{place}.text[{i}]", text) for i, text in enumerate(texts)]
    else:
        check_field(isinstance(answers, list), f"field {place!r}", answers, "be a list")
        for i, answer in enumerate(answers):
            check_field(isinstance(answer, Mapping), f"field '{place}[{i}]'", answer, "be a JSON object")
        placed = [(f"{place}[{i}].text", answer.get("text")) for i, answer in enumerate(answers)]
    if not placed:
        raise RecordDropped(NO_ANSWER)
    counts = Counter(parse_text(text, f"field {place!r}") for place, text in placed)
    most_common = accepted_answers((place, text) for text, _ in counts.most_common())
    paragraph, pool = article_question.paragraph, article_question.pool
    return Question(
        id=parse_id(get_field(record, "id", path=path), f"field '{path}id'"),
        source="squad",
        question=parse_text(get_field(record, "question", path=path), f"field '{path}question'"),
        answers=most_common,
        documents=(paragraph,),
        pool=pool,
        missing_evidence="" if pool.contains_answer(paragraph, most_common) else NO_SPAN,
    )


def add_distractors(question: Question) -> Question:
    """Return the question with every paragraph of its article that contains no answer, in article order."""
    assert question.pool
    candidates = range(len(question.pool))
    distractors = question.pool.distractors(question.documents, question.answers, candidates)
    return _with_paragraphs(question, distractors)


def group_by_context(
    questions: Iterator[Question],
    prompt: RagPrompt,
    drop: Callable[[str, Callable[[], str]], None],
    indexer: Indexer | None = None,
    max_questions: int | None = None,
) -> Iterator[Question]:
    """Yield the questions of each article grouped by the set of paragraphs that they share.

    The paragraphs of an article are divided into random sets of `prompt.num_documents`. A question sees the
    set that contains its own paragraph. With an `indexer`, similar paragraphs are in the same set. `drop` is
    called with a reason and a description of each question whose answer is in another paragraph of its set.

    Without `max_questions`, each paragraph is in one set, and the last set of an article may be smaller. With
    `max_questions`, at most that many questions share a set, about as many different paragraphs as possible.
    All sets are full then, and new sets are drawn for the questions that are left.
    """
    for pool, group in groupby(questions, key=attrgetter("pool")):
        waiting: list[WaitingQuestions] = [deque() for _ in pool.documents]
        for number, question in enumerate(group):
            waiting[pool.index_of(question.documents[0])].append((number, question))
        similarity = document_similarity(pool.documents, indexer) if indexer else None
        rng = random.Random(f"{prompt.seed}:{pool.documents[0].title}")
        fill_sets = max_questions is not None
        while any(waiting):
            for paragraphs in _paragraph_sets(len(pool), prompt.num_documents, rng, similarity, fill_sets):
                queues = [waiting[paragraph] for paragraph in paragraphs]
                for question in _next_batch(queues, max_questions or sys.maxsize):
                    distractors = list(pool.distractors(question.documents, question.answers, paragraphs))
                    if len(distractors) < len(paragraphs) - 1:
                        drop(OTHER_DOCUMENT, partial(_describe, question))
                    else:
                        yield _with_paragraphs(question, distractors)


def _describe(question: Question) -> str:
    return f"{question.id}: {question.question}"


def _next_batch(queues: Sequence[WaitingQuestions], max_questions: int) -> list[Question]:
    """Take up to `max_questions` questions: one of each queue, then a second one of each queue, and so on.

    The questions are returned in the order of the article.
    """
    taken: list[tuple[int, Question]] = []
    while any(queues) and len(taken) < max_questions:
        nonempty = [queue for queue in queues if queue]
        taken += [queue.popleft() for queue in nonempty[: max_questions - len(taken)]]
    return [question for _, question in sorted(taken, key=itemgetter(0))]


def _paragraph_sets(
    num_paragraphs: int,
    set_size: int | None,
    rng: random.Random,
    similarity: Sequence[NDArray[np.float64]] | None,
    fill_sets: bool,
) -> list[list[int]]:
    """Divide the paragraphs of an article into sets of `set_size`; None puts all of them into one set.

    Each set starts with a random paragraph. The others are random, too, or the most similar ones. The last
    set is smaller if paragraphs run out; with `fill_sets`, it is filled with paragraphs of earlier sets.
    """
    shuffled = list(range(num_paragraphs))
    rng.shuffle(shuffled)
    size = max(1, set_size if set_size is not None else num_paragraphs)
    unused, used, sets = shuffled, set[int](), []
    while unused:
        first, *others = unused
        if fill_sets:
            others += [paragraph for paragraph in shuffled if paragraph in used]
        if similarity:
            others.sort(key=similarity[first].__getitem__, reverse=True)
        sets.append([first, *others[: size - 1]])
        used.update(sets[-1])
        unused = [paragraph for paragraph in unused if paragraph not in used]
    return sets


def _with_paragraphs(question: Question, distractors: Iterable[int]) -> Question:
    """Return the question with its own paragraph, which supports it, and distractors, in article order."""
    pool = question.pool
    assert pool
    paragraph = question.documents[0]
    index = pool.index_of(paragraph)
    documents = (paragraph if i == index else pool.documents[i] for i in sorted([index, *distractors]))
    return replace(question, documents=tuple(documents))


def _article_key(placed: PlacedRecord) -> object:
    """Return the title of a row. Rows with equal titles are one article; any other record is an article."""
    row = placed[1]
    return row["title"] if _is_row_format(row) and isinstance(row.get("title"), str) else object()


def _is_row_format(record: Any) -> bool:
    return isinstance(record, Mapping) and "context" in record


def _questions_from_rows(placed: list[PlacedRecord]) -> Iterator[PlacedRecord]:
    """Yield the questions of an article that comes as rows. A bad row becomes a RecordError."""
    paragraph_of: dict[str, Document] = {}
    errors: dict[str, RecordError] = {}
    for place, row in placed:
        try:
            title = parse_text(get_field(row, "title"), "field 'title'", may_be_blank=True)
            context = parse_text(row["context"], "field 'context'")
            paragraph_of.setdefault(context, _paragraph(title, context))
        except RecordError as error:
            error.record = row
            errors[place] = error
    pool = DocumentPool(paragraph_of.values())
    for place, row in placed:
        if place in errors:
            yield place, errors[place]
        else:
            yield place, ArticleQuestion(pool, paragraph_of[row["context"]], row)


def _questions_from_paragraphs(place: str, article: Any) -> Iterator[PlacedRecord]:
    """Yield the questions of a nested article. A bad article or paragraph becomes one RecordError."""
    if isinstance(article, RecordError):
        yield place, article
        return
    try:
        check_field(isinstance(article, Mapping), "the article", article, "be a JSON object")
        title = parse_text(get_field(article, "title", ""), "field 'title'", may_be_blank=True)
        paragraphs = get_field(article, "paragraphs")
        check_field(isinstance(paragraphs, list), "field 'paragraphs'", paragraphs, "be a list")
        unknown_in_article = SQUAD_ARTICLE.unknown_fields(article)
    except RecordError as error:
        error.record = article
        yield place, error
        return
    place = f"{place}, article {title!r}" if title else place
    documents: dict[int, Document] = {}
    unknown: dict[int, frozenset[str]] = {}
    for i, paragraph in enumerate(paragraphs):
        path = f"paragraphs[{i}]"
        try:
            check_field(isinstance(paragraph, Mapping), f"field {path!r}", paragraph, "be a JSON object")
            questions = get_field(paragraph, "qas", path=f"{path}.")
            check_field(isinstance(questions, list), f"field '{path}.qas'", questions, "be a list")
            context = parse_text(get_field(paragraph, "context", path=f"{path}."), f"field '{path}.context'")
            documents[i] = _paragraph(title, context)
            in_paragraph = SQUAD_PARAGRAPH.unknown_fields(paragraph, path=f"{path}.")
            unknown[i] = frozenset(unknown_in_article | in_paragraph)
        except RecordError as error:
            documents.pop(i, None)
            error.record = article
            yield place, error
    pool = DocumentPool(documents.values())
    for i, document in documents.items():
        for j, record in enumerate(paragraphs[i]["qas"]):
            path = f"paragraphs[{i}].qas[{j}]."
            yield place, ArticleQuestion(pool, document, record, path, unknown[i])


def _paragraph(title: str, context: str) -> Document:
    return Document(title=title, text=context, relevance=1, supports=True)
