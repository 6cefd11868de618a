"""Scores of answers, the prior baseline, and paired bootstrap intervals."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blockft.evaluation.metrics import exact_match, normalize, substring_match

NUM_RESAMPLES = 2000
LEVEL = 0.95

_AUXILIARIES = {
    "is", "are", "was", "were", "do", "does", "did", "has", "have", "had", "can", "could", "will", "would",
}  # fmt: skip
_QUESTION_WORDS = (
    "who",
    "whose",
    "whom",
    "what",
    "when",
    "where",
    "which",
    "why",
    "how many",
    "how much",
    "how",
)


def word_match(answer: str, golds: Sequence[str]) -> float:
    """1 if the words of a gold answer occur one after the other in the answer, both normalised."""
    found = f" {normalize(answer)} "
    return float(any(f" {normalize(gold)} " in found for gold in golds if normalize(gold)))


METRICS = {"substring_match": substring_match, "word_match": word_match, "exact_match": exact_match}


def is_yes_no(golds: Sequence[str]) -> bool:
    return any(normalize(gold) in ("yes", "no") for gold in golds)


def question_type(question: str) -> str:
    """A question's type: `yes or no` if it begins with an auxiliary verb, else its first question word."""
    words = re.findall(r"[a-z']+", question.lower())
    if words and words[0] in _AUXILIARIES:
        return "yes or no"
    text = f" {' '.join(words)} "
    places = [(text.find(f" {word} "), -len(word), word) for word in _QUESTION_WORDS if f" {word} " in text]
    return min(places)[2] if places else "other"


def prior_answers(train: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], str]:
    """The most frequent answer of each (source, question type) in training; the first of equals by name."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in train:
        counts[question["source"], question_type(question["question"])][question["answer"]] += 1
    return {kind: min(c.items(), key=lambda item: (-item[1], item[0]))[0] for kind, c in counts.items()}


def resampled_mean(values: Mapping[str, NDArray[np.float64]], seed: int = 0) -> NDArray[np.float64]:
    """Bootstrap replicates of the mean over all questions: the questions of each set are drawn again.

    The values of a set are (questions,) or (runs, questions); runs, such as seeds, are drawn again as well, the
    same ones for all sets. Equal seeds and sizes draw the same questions.
    """
    draw = np.random.default_rng(seed)
    sums, num_all = np.zeros(NUM_RESAMPLES), 0
    num_runs = len(np.atleast_2d(next(iter(values.values()))))
    runs = np.random.default_rng(seed + 1).integers(0, num_runs, (NUM_RESAMPLES, num_runs))
    for name in sorted(values):
        scores = np.atleast_2d(np.asarray(values[name], np.float64))
        num_questions = scores.shape[1]
        questions = draw.integers(0, num_questions, (NUM_RESAMPLES, num_questions))
        sums += [scores[np.ix_(r, q)].mean(axis=0).sum() for r, q in zip(runs, questions, strict=True)]
        num_all += num_questions
    return sums / num_all


def interval(replicates: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
