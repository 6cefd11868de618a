"""Leaks: find questions and sets of documents that occur in training and in evaluation.

Each sample has two hashes of 64 bits: one of its question and one of its set of documents. Comparisons are
numpy operations on hashes, so that memory is 16 bytes a sample, whatever the length of the texts.

Two different texts have the same hash by chance with the probability 2**-64. Ten million training samples
and 100,000 evaluation samples give 1e12 pairs, of which 5e-8 match by chance.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from string import Formatter

import numpy as np
import xxhash

from blockft.data.rag_prompt import RagPrompt
from blockft.data.sample import Message, Sample

NO_DOCUMENTS = 0
"""The documents hash of a sample without documents. It equals no other."""

_SEPARATOR_CATEGORIES = "PZC"
"""Unicode categories of characters that only separate words: punctuation, white space and control."""

_ASCII_WORDS = bytes(
    ord(char.lower()) if unicodedata.category(char)[0] not in _SEPARATOR_CATEGORIES else ord(" ")
    for char in map(chr, range(128))
) + bytes(128)


class _SeparatorTable(dict[int, str | None]):
    """A table for `str.translate`: separators become spaces, invisible format characters vanish."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        is_separator = category[0] in _SEPARATOR_CATEGORIES
        self[code] = None if category == "Cf" else " " if is_separator else chr(code)
        return self[code]


_SEPARATORS = _SeparatorTable()


def hash_sample(sample: Sample, question_template: str = "{question}") -> tuple[int, int]:
    """Return the hashes of a sample's question and of its set of documents, as unsigned 64 bit numbers.

    Both ignore case, white space, punctuation and variants of characters (`normalize_words`).

    - Question: the final block without the words of `question_template` around it, so that sources with
      different wordings can be compared. The default wording of `RagPrompt` is recognized as well. In a chat,
      the turns before the final block belong to the question. System messages do not.
    - Documents: the set of document blocks, in any order. A sample that does not say which of its blocks are
      documents has the set of its local blocks. A message of one block, such as that of a chat, has none; the
      hash is then `NO_DOCUMENTS`. Only equal sets have equal hashes: samples that share some documents of a
      common corpus do not.
    """
    question = _without_wording(_question_text(sample), (question_template, RagPrompt.question))
    documents = {_hash_text(text) for text in _document_texts(sample)}
    if not documents:
        return _hash_text(question), NO_DOCUMENTS
    joined = np.array(sorted(documents), dtype="<u8").tobytes()
    return _hash_text(question), _nonzero(xxhash.xxh3_64_intdigest(joined))


def normalize_words(text: str) -> bytes:
    """Return the words of a text in UTF-8 with single spaces between them.

    Unicode is normalized to NFKC and case is folded. Punctuation and white space separate words. Symbols such
    as `+` and `=` belong to words. A text without words keeps its characters.
    """
    if text.isascii():
        words = text.encode().translate(_ASCII_WORDS).split()
        return b" ".join(words) or text.strip().encode()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return (" ".join(folded.translate(_SEPARATORS).split()) or folded.strip()).encode()


def _question_text(sample: Sample) -> str:
    if sample.templated:
        return sample.templated[-1]
    turns = [message for message in sample.messages if message.role != "system"] or sample.messages
    return "\n".join(_turn_text(turn) for turn in turns)


def _turn_text(turn: Message) -> str:
    """Return an answer, or the last block of a question, which follows instruction and documents."""
    return turn.text if turn.role == "assistant" else turn.content[-1]


def _document_texts(sample: Sample) -> Iterator[str]:
    blocks = sample.blocks
    if "documents" in sample.meta:
        yield from (blocks[index] for index in sample.documents)
    elif sample.templated:
        yield from blocks[:-1]
    else:
        for message in sample.messages:
            if len(message.content) > 1:
                yield from message.content[:-1]


def _without_wording(question: str, templates: Sequence[str]) -> str:
    """Return what fills `{question}` in one of the templates; the whole text if none of them words it.

    Of several templates that fit, the longest one counts.
    """
    text = question.strip()
    wordings = [_words_around_question(template) for template in templates]
    for before, after in sorted(wordings, key=lambda words: -len("".join(words))):
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            return text[len(before) : len(text) - len(after)]
    return question


@lru_cache
def _words_around_question(template: str) -> tuple[str, str]:
    """Return the text of a template before and after its first `{question}`, stripped at the ends."""
    parts = [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
    first = next(i for i, (_, name) in enumerate(parts) if name == "question")
    before = "".join(literal for literal, _ in parts[: first + 1])
    after = "".join(literal + (f"{{{name}}}" if name else "") for literal, name in parts[first + 1 :])
    return before.lstrip(), after.rstrip()


def _hash_text(text: str) -> int:
    return _nonzero(xxhash.xxh3_64_intdigest(normalize_words(text)))


def _nonzero(digest: int) -> int:
    return digest or 1
