"""RAG prompts: an instruction, one block per document, the question last."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from blockft.data.sample import Message, Sample
from blockft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Document:
    """A retrieved text before it becomes a block; `supports` if the answer is known to rest on it."""

    title: str
    text: str
    relevance: float = 0
    supports: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What documents are told apart by."""
        return self.title.strip(), self.text.strip()


@dataclass(frozen=True, kw_only=True)
class RagPrompt:
    """How the prompts of a set are worded and which documents stand where.

    `instruction`, `document` and `question` are templates: `{title}` and `{text}` are filled in for a
    document, `{question}` for the question; a brace of their own is written twice. What is filled in is
    stripped, and a title that is empty takes the white space after it along. No document carries its rank or
    index, so that the same document is the same block everywhere.

    `num_documents` keeps the most relevant documents and every one that supports; 0 keeps none at all. With
    `shared_context` the same documents stand in the same order in every prompt, whatever their relevance,
    unless the order is `given`.

    Raises:
        UserError: a template with a field that it does not know, or without the one that it needs.
    """

    instruction: str
    document: str
    question: str
    documents_in: str = "user"
    order: str = "ascending"
    num_documents: int | None = None
    shared_context: bool = False
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
        """The messages of a prompt, and the meta data that marks its documents.

        A document without title and text is left out; a final block that starts a message has no white space
        before it.
        """
        chosen = self._arrange([d for d in documents if any(d.key)], sample_id)
        instruction = [self.instruction.format()] if self.instruction else []
        context = (*instruction, *map(self._render, chosen))
        final = self.question.format(question=question.strip())
        if not context:
            messages: tuple[Message, ...] = (Message(role="user", content=(final.lstrip(),)),)
        elif self.documents_in == "user":
            messages = (Message(role="user", content=(*context, final)),)
        else:
            system = Message(role="system", content=context)
            messages = (system, Message(role="user", content=(final.lstrip(),)))
        numbers = range(len(instruction), len(context))
        meta: dict[str, Any] = {"documents": list(numbers), "relevance": [d.relevance for d in chosen]}
        if supporting := [number for number, d in zip(numbers, chosen, strict=True) if d.supports]:
            meta["supporting"] = supporting
        return messages, meta

    def _render(self, document: Document) -> str:
        title, text = document.key
        template = self.document if title else _without_title(self.document)
        # the template's own end stays: a wording may separate its documents there
        end = template[len(template.rstrip()) :]
        return template.format(title=title, text=text).rstrip() + end

    def _arrange(self, documents: Sequence[Document], sample_id: str) -> list[Document]:
        """The documents of the prompt in its order."""
        lots = random.Random(
            f"{self.seed}:{_hash_documents(documents) if self.shared_context else sample_id}"
        )
        chosen = self._limit(documents, lots)
        if self.order == "given":
            return chosen
        if self.shared_context:
            chosen.sort(key=lambda d: d.key)
            random.Random(f"{self.seed}:{_hash_documents(chosen)}").shuffle(chosen)
        elif self.order == "shuffled":
            lots.shuffle(chosen)
        else:
            chosen.sort(key=lambda d: d.relevance, reverse=self.order == "descending")
        return chosen

    def _limit(self, documents: Sequence[Document], lots: random.Random) -> list[Document]:
        """The documents that a limit keeps, as given; equals draw lots, or the same ones might always win."""
        if self.num_documents is None or self.num_documents >= len(documents):
            return list(documents)
        limit = self.num_documents and max(self.num_documents, sum(d.supports for d in documents))
        keys = [(not d.supports, -d.relevance, lots.random()) for d in documents]
        ranked = sorted(range(len(documents)), key=keys.__getitem__)
        return [documents[i] for i in sorted(ranked[:limit])]


def rag_prompt_of_export(export: Mapping[str, Any]) -> RagPrompt | None:
    """How training worded questions, from the `block_attention` of an export; documents stand as given."""
    if "prompt" not in export:
        return None
    return RagPrompt(**export["prompt"], documents_in=export["documents_in"], order="given")


def trim_sample(sample: Sample) -> Sample | None:
    """The sample without its least relevant document (the first of equals) that supports no answer.

    None if there is none, or, where no document is known to support, if it would be one of the most relevant:
    a question without its evidence teaches to invent. (Prompts to answer are shortened by `trim_prompt`.)
    """
    relevance, supporting = sample.meta.get("relevance", ()), sample.meta.get("supporting", ())
    spare = [i for i, d in enumerate(sample.documents) if d not in supporting] if relevance else []
    if not spare or not supporting and min(relevance) == max(relevance):
        return None
    return sample.without_document(min(spare, key=lambda i: relevance[i]))


def trim_prompt(sample: Sample) -> Sample | None:
    """The prompt without its least relevant document (the last of equals); None if that is its only one.

    Documents without a relevance are equal; those that are known to support the answer go last.
    """
    supporting = sample.meta.get("supporting", ())
    relevance = sample.meta.get("relevance") or [0] * len(sample.documents)
    if len(relevance) < 2:
        return None
    worst = min(range(len(relevance)), key=lambda i: (sample.documents[i] in supporting, relevance[i], -i))
    return sample.without_document(worst)


def _hash_documents(documents: Sequence[Document]) -> str:
    """A name that equal sets of documents share."""
    return hashlib.sha256(repr(sorted(d.key for d in documents)).encode()).hexdigest()


def _without_title(template: str) -> str:
    """The template of a document without a title: the field goes, and the white space after it."""
    kept, after_title = "", False
    for literal, name, spec, conversion in Formatter().parse(template):
        literal = literal.replace("{", "{{").replace("}", "}}")
        kept += literal.lstrip() if after_title else literal
        after_title = name == "title"
        if name is not None and not after_title:
            kept += f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
    return kept


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
