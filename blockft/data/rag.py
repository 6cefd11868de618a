"""RAG prompts: an instruction, one block per document, the question last."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from blockft.data.sample import Message, Sample
from blockft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Document:
    """A retrieved text before it becomes a block."""

    title: str
    text: str
    relevance: float = 0


@dataclass(frozen=True, kw_only=True)
class RagPrompt:
    """How the prompts of a set are worded and which documents stand where.

    `instruction`, `document` and `question` are templates: `{title}` and `{text}` are filled in for a
    document, `{question}` for the question; a brace of their own is written twice. No document carries its
    rank or index, so that the same document is the same block everywhere.

    Raises:
        UserError: a template with a field that it does not know, or without the one that it needs.
    """

    instruction: str
    document: str
    question: str
    documents_in: str = "user"
    order: str = "ascending"
    num_documents: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_template("instruction", self.instruction, needed=(), optional=())
        _check_template("document", self.document, needed=("text",), optional=("title",))
        _check_template("question", self.question, needed=("question",), optional=())
        if not self.question.strip():
            raise UserError("data.prompt.question is blank, it should hold {question}")
        if self.num_documents is not None and self.num_documents < 0:
            raise UserError(
                f"data.num_documents is {self.num_documents}, it should be 0 or more, or null for all"
            )
        assert self.order in ("ascending", "descending", "shuffled", "given"), self.order
        assert self.documents_in in ("system", "user"), self.documents_in

    def build(
        self, question: str, documents: Sequence[Document], sample_id: str
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """The messages of a prompt, and the meta data that marks its documents."""
        chosen = self._arrange(documents, sample_id)
        texts = [self.document.format(title=d.title, text=d.text) for d in chosen]
        instruction = [self.instruction.format()] if self.instruction else []
        final = self.question.format(question=question)
        context = tuple(instruction + texts)
        if self.documents_in == "user" or not context:
            messages: tuple[Message, ...] = (Message(role="user", content=(*context, final)),)
        else:
            messages = (Message(role="system", content=context), Message(role="user", content=(final,)))
        first = len(instruction)
        relevance = [d.relevance for d in chosen]
        return messages, {"documents": list(range(first, first + len(texts))), "relevance": relevance}

    def _arrange(self, documents: Sequence[Document], sample_id: str) -> list[Document]:
        """The documents of the prompt in its order; a limit keeps the most relevant ones."""
        by_relevance = sorted(range(len(documents)), key=lambda i: -documents[i].relevance)
        chosen = [documents[i] for i in sorted(by_relevance[: self.num_documents])]
        if self.order == "ascending":
            chosen.sort(key=lambda d: d.relevance)
        elif self.order == "descending":
            chosen.sort(key=lambda d: -d.relevance)
        elif self.order == "shuffled":
            random.Random(f"{self.seed}:{sample_id}").shuffle(chosen)
        return chosen


def trim(sample: Sample) -> Sample | None:
    """The sample without its least relevant document (the first of equals).

    None if that would take one of the most relevant: a question without its evidence teaches to invent.
    """
    relevance = sample.meta.get("relevance", ())
    if not relevance or min(relevance) == max(relevance):
        return None
    return sample.without_document(relevance.index(min(relevance)))


def _check_template(name: str, template: str, *, needed: Sequence[str], optional: Sequence[str]) -> None:
    allowed = " and ".join(f"{{{f}}}" for f in (*optional, *needed)) or "none"
    try:
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise UserError(
            f"data.prompt.{name} cannot be read ({error}); write {{{{ or }}}} for a brace"
        ) from error
    if unknown := sorted(fields - {*needed, *optional}):
        raise UserError(
            f"data.prompt.{name} has the field {{{unknown[0]}}} (allowed: {allowed}); "
            "write {{ or }} for a brace of its own"
        )
    if missing := [field for field in needed if field not in fields]:
        raise UserError(f"data.prompt.{name} lacks the field {{{missing[0]}}}")
