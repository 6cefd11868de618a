"""Pools: documents from which the distractors of questions are taken."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from blockft.data.rag_prompt import Document

CHARACTER_VARIANTS = {"'": "‘’‚‛′‵ʼ´`", '"': "“”„‟″«»", "-": "‐‑‒–—―−"}
"""Apostrophes, quotes and dashes, which texts about the same thing spell differently."""


class DocumentPool:
    """Distinct documents, by title and text, in the order of their first appearance."""

    def __init__(self, documents: Iterable[Document]) -> None:
        distinct: dict[tuple[str, str], Document] = {}
        for document in documents:
            distinct.setdefault(document.key, replace(document, relevance=0, supports=False))
        self.documents = tuple(distinct.values())
        self._index_of = {key: index for index, key in enumerate(distinct)}
        self._folded = [(normalize_text(d.title), normalize_text(d.text)) for d in self.documents]

    def __len__(self) -> int:
        return len(self.documents)

    def index_of(self, document: Document) -> int:
        """Where a document of the pool stands in it."""
        return self._index_of[document.key]

    def distractors(
        self, own: Collection[Document], answers: Collection[str], indices: Iterable[int]
    ) -> Iterator[int]:
        """Those of `indices` that are none of a question's own documents and hold none of its answers.

        Titles count, unless one of the own documents bears the same: that of an article tells nothing.
        """
        own_indices, own_titles = set(map(self.index_of, own)), {normalize_text(d.title) for d in own}
        folded = [normalize_text(answer) for answer in answers]
        for index in indices:
            title, text = self._folded[index]
            searched = (text,) if title in own_titles else (text, title)
            if index not in own_indices and not any(a in s for a in folded for s in searched):
                yield index


def normalize_text(text: str) -> str:
    """The text as answers are looked for in it: no case, single spaces, one spelling of each character."""
    text = _SPELT.sub(lambda found: _PLAIN[found[0]], text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


_PLAIN = {spelt: plain for plain, several in CHARACTER_VARIANTS.items() for spelt in several}
_SPELT = re.compile(f"[{''.join(_PLAIN)}]")
