"""Document pools: the documents from which the distractors of questions are taken."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from blockft.data.rag_prompt import Document

CHARACTER_VARIANTS = {"'": "‘’‚‛′‵ʼ´`", '"': "“”„‟″«»", "-": "‐‑‒–—―−"}
"""Apostrophes, quotes and dashes that texts use for the same ASCII character."""

_ASCII_OF = {variant: ascii for ascii, variants in CHARACTER_VARIANTS.items() for variant in variants}
_VARIANT = re.compile(f"[{''.join(_ASCII_OF)}]")


class DocumentPool:
    """Distinct documents by title and text, in the order of their first appearance."""

    def __init__(self, documents: Iterable[Document]) -> None:
        distinct: dict[tuple[str, str], Document] = {}
        for document in documents:
            distinct.setdefault(document.key, replace(document, relevance=0, supports=False))
        self.documents = tuple(distinct.values())
        self._index_of = {key: index for index, key in enumerate(distinct)}
        self._normalized = [(normalize_text(d.title), normalize_text(d.text)) for d in self.documents]

    def __len__(self) -> int:
        return len(self.documents)

    def index_of(self, document: Document) -> int:
        """Return the index of a document of the pool."""
        return self._index_of[document.key]

    def contains_answer(self, document: Document, answers: Collection[str]) -> bool:
        """Return whether the text of a document of the pool contains one of the answers."""
        _, text = self._normalized[self.index_of(document)]
        return contains_answer(text, answers)

    def distractors(
        self, question_documents: Collection[Document], answers: Collection[str], candidates: Iterable[int]
    ) -> Iterator[int]:
        """Yield the candidate indices that are not a question's own documents and contain no answer.

        An answer in a title counts, too, unless a document of the question has the same title. Paragraphs of
        one article share their title, which then says nothing about a single paragraph.
        """
        excluded = set(map(self.index_of, question_documents))
        known_titles = {normalize_text(d.title) for d in question_documents}
        normalized_answers = [normalize_text(answer) for answer in answers]
        for index in candidates:
            title, text = self._normalized[index]
            searched = (text,) if title in known_titles else (text, title)
            has_answer = any(answer in field for answer in normalized_answers for field in searched)
            if index not in excluded and not has_answer:
                yield index


def contains_answer(normalized: str, answers: Iterable[str]) -> bool:
    """Return whether a text, which is normalized already, contains one of the answers."""
    return any(normalize_text(answer) in normalized for answer in answers)


def normalize_text(text: str) -> str:
    """Return the text in the form in which answers are searched.

    Case is folded, white space becomes single spaces, and variants of a character become one character.
    """
    text = _VARIANT.sub(lambda match: _ASCII_OF[match[0]], text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())
