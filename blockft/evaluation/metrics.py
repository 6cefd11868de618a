"""Score answers: SQuAD's exact match and F1, the paper's substring match, and whole-word match."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Apply SQuAD's normalization: lower case, no punctuation, no articles, single spaces.

    Source: Rajpurkar et al. 2016.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if the normalized answer equals a normalized gold answer, else 0."""
    return float(any(normalize(answer) == normalize(gold) for gold in golds))


def substring_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if the normalized answer contains a normalized gold answer, else 0.

    This is the accuracy of Ma et al. 2025, section 3.3. It compares letters, not words: "north" contains the
    gold answer "no". A gold answer that is empty after normalization matches nothing.
    """
    normalized = normalize(answer)
    return float(any(normalize(gold) in normalized for gold in golds if normalize(gold)))


def word_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if the words of a normalized gold answer occur in the answer one after the other, else 0.

    Unlike `substring_match` it does not find the gold answer "no" in "north". A gold answer that is empty
    after normalization matches nothing.
    """
    # normalized texts have single spaces between words and none around them
    words = f" {normalize(answer)} "
    return float(any(f" {normalize(gold)} " in words for gold in golds if normalize(gold)))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """Return the best F1 of the answer's words against the words of any gold answer, after normalization.

    Words count as often as they occur. Two texts without words score 1. Source: Rajpurkar et al. 2016.
    """
    return max(_f1(normalize(answer).split(), normalize(gold).split()) for gold in golds)


def is_yes_no(golds: Sequence[str]) -> bool:
    """Return whether every gold answer is "yes" or "no" after normalization."""
    return bool(golds) and all(normalize(gold) in ("yes", "no") for gold in golds)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    num_common = (Counter(answer) & Counter(gold)).total()
    return 2 * num_common / (len(answer) + len(gold))


METRICS = {
    "substring_match": substring_match,
    "word_match": word_match,
    "exact_match": exact_match,
    "token_f1": token_f1,
}
"""Every metric by name. Each takes an answer and its gold answers, and returns a score from 0 to 1."""
