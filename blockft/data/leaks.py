"""Leaks: find questions and sets of documents that occur in training and in evaluation.

Each sample has two hashes of 64 bits: one of its question and one of its set of documents. Comparisons are
numpy operations on hashes, so that memory is 16 bytes a sample, whatever the length of the texts.

Two different texts have the same hash by chance with the probability 2**-64. Ten million training samples
and 100,000 evaluation samples give 1e12 pairs, of which 5e-8 match by chance.
"""

import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter

import numpy as np
import xxhash

from blockft.data.rag_prompt import RagPrompt
from blockft.data.sample import Message, Sample

Hashes = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
"""Hashes of samples in order: one column for questions, one for documents. Or one of these columns."""

QUESTIONS, DOCUMENTS = 0, 1
"""The columns of `Hashes`."""

MAX_EXAMPLES = 2
"""Number of examples that a leak lists."""

NO_DOCUMENTS = 0
"""The documents hash of a sample without documents. It equals no other."""

ODD = np.uint64(0x9E3779B97F4A7C15)
"""An odd number with as many ones as zeros: 2**64 divided by the golden ratio."""

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


@dataclass(frozen=True, kw_only=True)
class Leak:
    """What a training source and an evaluation source have in common.

    num_questions, num_documents: the number of evaluation samples whose question, or whose set of documents,
        the training source has as well.
    examples: ids of such an evaluation sample and of the training sample.
    """

    training_source: int
    evaluation_source: int
    num_questions: int
    num_documents: int
    examples: tuple[tuple[str, str], ...]


class LeakFinder:
    """Finds the questions and sets of documents that occur in training and in evaluation.

    The evaluation samples are given first. The hashes of the training samples are then added in any portions,
    so that they can come from shards. All hashes stay in memory: 16 bytes a training sample.

    evaluation: for each evaluation source the ids of its samples and their hashes.
    """

    def __init__(self, evaluation: Sequence[tuple[Sequence[str], Hashes]], num_training_sources: int) -> None:
        self._ids = [ids for ids, _ in evaluation]
        self._columns = [
            [_EvaluationColumn(hashes[:, column], num_training_sources) for column in (QUESTIONS, DOCUMENTS)]
            for _, hashes in evaluation
        ]
        # by evaluation source, training source and column: pairs of ids
        self._examples: dict[tuple[int, int, int], list[tuple[str, str]]] = defaultdict(list)
        self._training: list[Hashes] = []

    def add(
        self, training_source: int, hashes: Hashes, get_id: Callable[[int], str], *, is_copy: bool = False
    ) -> None:
        """Add hashes of training samples.

        get_id: returns the id of the sample at an index of `hashes`; called for a few examples only.
        is_copy: the samples repeat others of their source (`num_copies`) and are no duplicates.
        """
        if not is_copy:
            self._training.append(hashes)
        for source, columns in enumerate(self._columns):
            for column, evaluation in enumerate(columns):
                examples = self._examples[source, training_source, column]
                for index, sample in evaluation.add(training_source, hashes[:, column]):
                    if len(examples) < MAX_EXAMPLES:
                        examples.append((self._ids[source][sample], get_id(index)))

    def leaks(self) -> list[Leak]:
        """Return the leaks so far, by evaluation source and then by training source."""
        found = []
        for source, training_source in sorted({key[:2] for key in self._examples}):
            examples = [
                pair
                for column in (QUESTIONS, DOCUMENTS)
                for pair in self._examples[source, training_source, column]
            ]
            num_questions, num_documents = (
                column.num_hit(training_source) for column in self._columns[source]
            )
            if examples:
                leak = Leak(
                    training_source=training_source,
                    evaluation_source=source,
                    num_questions=num_questions,
                    num_documents=num_documents,
                    examples=tuple(dict.fromkeys(examples))[:MAX_EXAMPLES],
                )
                found.append(leak)
        return found

    def count_duplicates(self) -> tuple[int, int]:
        """Return how many training samples repeat a question, and a question with its documents."""
        hashes = np.concatenate([to_hashes([]), *self._training])
        questions = hashes[:, QUESTIONS]
        # one number for both; a sum of products with an odd number differs where one of the two differs
        both = questions * ODD + hashes[:, DOCUMENTS]
        return _count_repeats(questions), _count_repeats(both)


def _count_repeats(hashes: Hashes) -> int:
    """Return how many hashes are left if the first of each is taken away."""
    ascending = np.sort(hashes)
    return int(np.count_nonzero(ascending[1:] == ascending[:-1]))


class _EvaluationColumn:
    """One column of the hashes of an evaluation source, and which of them each training source has."""

    def __init__(self, hashes: Hashes, num_training_sources: int) -> None:
        self._keys, self._first, self._num_samples = np.unique(hashes, return_index=True, return_counts=True)
        self._is_hit = np.zeros((num_training_sources, len(self._keys)), bool)

    def add(self, training_source: int, hashes: Hashes) -> Iterator[tuple[int, int]]:
        """Mark the hashes; yield (index into `hashes`, evaluation sample) for each hash not marked before."""
        if not len(self._keys):
            return
        is_hit = self._is_hit[training_source]
        found = np.minimum(np.searchsorted(self._keys, hashes), len(self._keys) - 1)
        is_new = (self._keys[found] == hashes) & (hashes != NO_DOCUMENTS) & ~is_hit[found]
        indices = np.flatnonzero(is_new)
        keys, first = np.unique(found[indices], return_index=True)
        is_hit[keys] = True
        # in the order of the training samples, so that their portions do not decide which are examples
        for index, key in sorted(zip(indices[first], keys, strict=True)):
            yield int(index), int(self._first[key])

    def num_hit(self, training_source: int) -> int:
        """Return the number of evaluation samples whose hash the training source has."""
        return int(self._num_samples[self._is_hit[training_source]].sum())


def to_hashes(pairs: Iterable[tuple[int, int]]) -> Hashes:
    """Return the hashes of samples as an array of two columns."""
    flat = array("Q", (value for pair in pairs for value in pair))
    return np.frombuffer(flat, np.uint64).reshape(-1, 2) if flat else np.empty((0, 2), np.uint64)


def hash_sample(sample: Sample, question_template: str = "{question}") -> tuple[int, int]:
    """Return the hashes of a sample's question and of its set of documents, as unsigned 64 bit numbers.

    Both ignore case, white space, punctuation and variants of characters (`normalize_words`).

    - Question: `meta.question` if there is one, otherwise the final block without the words of
      `question_template` around it, so that sources with different wordings can be compared. The default
      wording of `RagPrompt` is recognized as well. In a chat, the turns before the final block belong to the
      question. System messages do not.
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
    question = sample.meta.get("question")
    if isinstance(question, str) and question.strip():
        return question
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
