"""The requests of `blockft bench serve`: prompts over documents of a corpus, and the times of their arrival.

Everything follows from the seed, so that two servers get the same prompts at the same times.
"""

import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from blockft.data.encoder import Encoder
from blockft.data.request import parse_request

MIN_WORDS = 100
"""Fewest words of a text's vocabulary. A tokenizer with fewer words gets texts of letters."""

MAX_TRIES = 30
"""How often a text is changed to get its number of tokens."""


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """Sizes of the prompts.

    num_documents  documents of a prompt, each a block
    document_len   tokens of a document
    question_len   tokens of a question, which no other prompt has
    answer_len     tokens of an answer: every answer has exactly so many
    corpus_size    documents of the corpus
    zipf           exponent of Zipf's law: document k of the corpus is drawn with a weight of 1 / k ** zipf
    """

    num_documents: int
    document_len: int
    question_len: int
    answer_len: int
    corpus_size: int
    zipf: float
    seed: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.num_documents * self.document_len + self.question_len + self.answer_len


@dataclass(frozen=True, kw_only=True)
class ServePrompt:
    """A prompt: the text of each block, the question last, and the token ids of the whole prompt."""

    blocks: Sequence[str]
    ids: Sequence[int]


DocumentOrder = Literal["new", "same_order", "other_order"]
"""Documents of a prompt: new ones; those of a prompt before, in the same order or in another one."""


class Workload:
    """Draws prompts for a tokenizer.

    Raises:
        UserError: the tokenizer cannot encode blocks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: WorkloadOptions) -> None:
        self.options = options
        self._encoder = Encoder(tokenizer)
        self._words = self._find_words(tokenizer)
        rng = np.random.default_rng([options.seed, 0])
        self._documents = [self._write(options.document_len, rng) for _ in range(options.corpus_size)]
        weights = 1 / np.arange(1, options.corpus_size + 1) ** options.zipf
        self._shares = weights / weights.sum()

    def prompts(self, number: int, *, stream: int) -> list[ServePrompt]:
        """Return prompts whose documents follow Zipf's law, without repetition within a prompt.

        stream: prompts of different streams differ.
        """
        rng = np.random.default_rng([self.options.seed, 1, stream])
        size = self.options.num_documents
        drawn = [rng.choice(len(self._documents), size, replace=False, p=self._shares) for _ in range(number)]
        return [self._prompt(indices.tolist(), rng) for indices in drawn]

    def warmup_prompts(self, number: int) -> list[ServePrompt]:
        """Return prompts over the whole corpus in order, until every document had its turn; then by Zipf."""
        rng = np.random.default_rng([self.options.seed, 2])
        size, corpus_size = self.options.num_documents, len(self._documents)
        starts = range(0, corpus_size, size)[:number]
        whole = [self._prompt([k % corpus_size for k in range(start, start + size)], rng) for start in starts]
        return [*whole, *self.prompts(number - len(whole), stream=0)]

    def reuse_prompts(self, number: int) -> Iterator[dict[DocumentOrder, ServePrompt]]:
        """Yield groups of prompts over the same documents, which no other prompt of the workload has.

        The other order has another document first, so that no prefix of the prompt was asked before. A prompt
        of one document has no other order.
        """
        rng = np.random.default_rng([self.options.seed, 4])
        size = self.options.num_documents
        for _ in range(number):
            documents = [self._write(self.options.document_len, rng) for _ in range(size)]
            group: dict[DocumentOrder, ServePrompt] = {
                "new": self._join(documents, rng),
                "same_order": self._join(documents, rng),
            }
            if size > 1:
                first = int(rng.integers(1, size))
                rest = rng.permutation([index for index in range(size) if index != first]).tolist()
                group["other_order"] = self._join([documents[index] for index in (first, *rest)], rng)
            yield group

    def arrival_times(self, rate: float, seconds: float, *, min_number: int = 0) -> list[float]:
        """Return the arrival times of a Poisson process in seconds.

        The times of another rate are the same, divided by the rate. A rate that gives fewer than `min_number`
        requests in `seconds` gets more time.
        """
        rng = np.random.default_rng([self.options.seed, 3])
        times: list[float] = []
        time = rng.exponential() / rate
        while time < seconds or len(times) < min_number:
            times.append(float(time))
            time += rng.exponential() / rate
        return times

    def _prompt(self, documents: Sequence[int], rng: np.random.Generator) -> ServePrompt:
        return self._join([self._documents[index] for index in documents], rng)

    def _join(self, documents: Sequence[tuple[str, list[int]]], rng: np.random.Generator) -> ServePrompt:
        """Return a prompt of documents, which are texts with their token ids, and a new question."""
        question, question_ids = self._write(self.options.question_len, rng)
        ids = [id for _, document_ids in documents for id in document_ids]
        return ServePrompt(blocks=[*(text for text, _ in documents), question], ids=[*ids, *question_ids])

    def _write(self, length: int, rng: np.random.Generator) -> tuple[str, list[int]]:
        """Return a text of random words and its token ids: `length` of them, or slightly fewer."""
        words = [str(word) for word in rng.choice(self._words, length)]
        for number in itertools.count():
            text = " " + " ".join(words)
            ids = self._encode(text)
            if len(ids) == length or (len(ids) < length and number >= MAX_TRIES):
                return text, ids
            if len(ids) > length:
                del words[max(1, min(len(words) * length // len(ids), len(words) - 1)) :]
                if len(words) == 1 and number >= MAX_TRIES:
                    return text, ids
            else:
                words.append(str(rng.choice(self._words)))
        raise AssertionError

    def _encode(self, text: str) -> list[int]:
        """Return the token ids that the server computes for a block."""
        (ids,) = self._encoder.encode_prompt(parse_request({"blocks": [text]}, None, "prompt"))
        return ids

    def _find_words(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the words of small letters that are one token after a space, or else the letters."""
        texts = {str(tokenizer.decode([id])).strip() for id in range(len(tokenizer))}
        words = sorted(text for text in texts if text.isascii() and text.isalpha() and text.islower())
        counts = self._encoder.count_tokens([f" {word}" for word in words]) if words else []
        found = [word for word, count in zip(words, counts, strict=True) if count == 1]
        return found if len(found) >= MIN_WORDS else list(string.ascii_lowercase)
