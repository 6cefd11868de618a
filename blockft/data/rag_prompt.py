"""RAG prompts: build the messages of a prompt from a question and its documents, one block per document."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from types import NoneType
from typing import Any

from blockft.data.sample import Message
from blockft.errors import UserError, check_type

ORDERS = ("ascending", "descending", "shuffled", "given")
"""The orders of the documents of a prompt by relevance."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A retrieved text, before it becomes a block of a prompt.

    `relevance` orders documents; higher is more relevant. `supports` means that the answer is known to rest
    on this document.
    """

    title: str
    text: str
    relevance: float = 0
    supports: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """The stripped title and text. Documents with equal keys are the same document."""
        return self.title.strip(), self.text.strip()


@dataclass(frozen=True, kw_only=True)
class RagPrompt:
    r"""The wording of RAG prompts, and the choice and order of their documents.

    A prompt has one block for the instruction, one block per document, and the question as its final block::

        instruction | title and text of document 1 | title and text of document 2 | question

    Args:
        instruction: the text of the first block; an empty text gives no block.
        document: the template of a document, with `{text}` and optionally `{title}`.
        question: the template of the final block, with `{question}`.
        documents_in: the message that holds instruction and documents, `system` or `user`.
        order: `ascending` puts the most relevant document last, next to the question; `descending` puts it
            first; `shuffled` is random; `given` keeps the order.
        num_documents: keep this many of the most relevant documents, and always those that support the
            answer. None keeps all documents, 0 keeps none.
        shared_context: equal sets of documents get the same order in every prompt, independent of relevance
            and question. `order="given"` takes precedence.
        seed: the seed of every random choice.

    A literal brace in a template is written twice. Values are stripped before they are filled in. If a title
    is empty, the white space after `{title}` is left out as well. A document's block holds no rank or index,
    so that the same document always gives the same block.

    Raises:
        UserError: a template has an unknown field or lacks a required one, `num_documents` is negative, or
            `order` or `documents_in` is unknown.
        TypeError: an argument has another type.

    Example:
        >>> from blockft import RagPrompt
        >>> from blockft.data.rag_prompt import Document
        >>> documents = [Document(title="Dogs", text="Dogs bark.")]
        >>> (message,), _ = RagPrompt().build("Who barks?", documents, "example")
        >>> for block in message.content:
        ...     print(repr(block))
        'Answer the question using the following documents.'
        '\n\nDogs\nDogs bark.'
        '\n\nQuestion: Who barks?\nAnswer in a few words.'
    """

    instruction: str = "Answer the question using the following documents."
    document: str = "\n\n{title}\n{text}"
    question: str = "\n\nQuestion: {question}\nAnswer in a few words."
    documents_in: str = "user"
    order: str = "ascending"
    num_documents: int | None = None
    shared_context: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("instruction", "document", "question", "documents_in", "order"):
            check_type(getattr(self, name), str, name)
        check_type(self.num_documents, (int, NoneType), "num_documents")
        check_type(self.seed, int, "seed")
        _check_template("instruction", self.instruction, needed=(), optional=())
        _check_template("document", self.document, needed=("text",), optional=("title",))
        _check_template("question", self.question, needed=("question",), optional=())
        if not self.question.strip():
            raise UserError("data.prompt.question is blank; it must contain {question}")
        if self.num_documents is not None and self.num_documents < 0:
            raise UserError(
                f"data.num_documents is {self.num_documents}; allowed are 0 or more, or null for all"
            )
        for name, allowed in (("order", ORDERS), ("documents_in", ("system", "user"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r} (allowed: {', '.join(allowed)})")

    def build(
        self, question: str, documents: Sequence[Document], sample_id: str
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """Return the messages of a prompt, and the metadata of its document blocks (see `Sample.meta`).

        Documents without title and text are left out. White space before the final block is removed if the
        block starts a message.
        """
        chosen = self._select_and_order([d for d in documents if any(d.key)], sample_id)
        instruction = [self.instruction.format()] if self.instruction else []
        context = (*instruction, *map(self._render_document, chosen))
        final = self.question.format(question=question.strip())
        if not context:
            messages: tuple[Message, ...] = (Message(role="user", content=(final.lstrip(),)),)
        elif self.documents_in == "user":
            messages = (Message(role="user", content=(*context, final)),)
        else:
            system = Message(role="system", content=context)
            messages = (system, Message(role="user", content=(final.lstrip(),)))
        block_indices = range(len(instruction), len(context))
        meta: dict[str, Any] = {"documents": list(block_indices), "relevance": [d.relevance for d in chosen]}
        if supporting := [index for index, d in zip(block_indices, chosen, strict=True) if d.supports]:
            meta["supporting"] = supporting
        return messages, meta

    def _render_document(self, document: Document) -> str:
        title, text = document.key
        template = self.document if title else _without_title(self.document)
        # keep the white space at the template's end: it may be what separates documents
        end = template[len(template.rstrip()) :]
        return template.format(title=title, text=text).rstrip() + end

    def _select_and_order(self, documents: Sequence[Document], sample_id: str) -> list[Document]:
        seed = _hash_documents(documents) if self.shared_context else sample_id
        rng = random.Random(f"{self.seed}:{seed}")
        chosen = self._limit_documents(documents, rng)
        if self.order == "given":
            return chosen
        if self.shared_context:
            chosen.sort(key=lambda d: d.key)
            random.Random(f"{self.seed}:{_hash_documents(chosen)}").shuffle(chosen)
        elif self.order == "shuffled":
            rng.shuffle(chosen)
        else:
            chosen.sort(key=lambda d: d.relevance, reverse=self.order == "descending")
        return chosen

    def _limit_documents(self, documents: Sequence[Document], rng: random.Random) -> list[Document]:
        """Return the `num_documents` best documents in their given order.

        Ties are broken at random. A fixed rule would prefer the same documents in every prompt.
        """
        if self.num_documents is None or self.num_documents >= len(documents):
            return list(documents)
        limit = self.num_documents and max(self.num_documents, sum(d.supports for d in documents))
        sort_keys = [(not d.supports, -d.relevance, rng.random()) for d in documents]
        ranked = sorted(range(len(documents)), key=sort_keys.__getitem__)
        return [documents[i] for i in sorted(ranked[:limit])]


def rag_prompt_of_export(export: Mapping[str, Any]) -> RagPrompt | None:
    """Return the wording that a model was trained with, with documents in the given order.

    `export` is the `block_attention` entry of the model's config. Returns None if it holds no wording.
    """
    if "prompt" not in export:
        return None
    return RagPrompt(**export["prompt"], documents_in=export["documents_in"], order="given")


def _hash_documents(documents: Sequence[Document]) -> str:
    """Return a hash that does not depend on the order of the documents."""
    return hashlib.sha256(repr(sorted(d.key for d in documents)).encode()).hexdigest()


def _without_title(template: str) -> str:
    """Return the template without `{title}` and without the white space after it."""
    result, follows_title = "", False
    for literal, name, spec, conversion in Formatter().parse(template):
        literal = literal.replace("{", "{{").replace("}", "}}")
        result += literal.lstrip() if follows_title else literal
        follows_title = name == "title"
        if name is not None and not follows_title:
            result += f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
    return result


def _check_template(name: str, template: str, *, needed: Sequence[str], optional: Sequence[str]) -> None:
    allowed = " and ".join(f"{{{f}}}" for f in (*optional, *needed)) or "none"
    try:
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise UserError(
            f"data.prompt.{name} cannot be read ({error}); write {{{{ or }}}} for a literal brace"
        ) from error
    if unknown := sorted(fields - {*needed, *optional}):
        raise UserError(
            f"data.prompt.{name} has the field {{{unknown[0]}}} (allowed: {allowed}); "
            "write {{ or }} for a literal brace"
        )
    if missing := [field for field in needed if field not in fields]:
        raise UserError(f"data.prompt.{name} lacks the field {{{missing[0]}}}")
