"""How answers are scored: SQuAD's exact match and F1 (Rajpurkar et al. 2016), the paper's substring match."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 if the answer equals a gold answer after normalisation."""
    return float(any(normalize(answer) == normalize(gold) for gold in golds))


def substring_match(answer: str, golds: Sequence[str]) -> float:
    """1 if a gold answer occurs in the answer, both normalised: the accuracy of Ma et al. 2025, section 3.3.

    A gold answer of which normalisation leaves nothing matches nothing.
    """
    found = normalize(answer)
    return float(any(normalize(gold) in found for gold in golds if normalize(gold)))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """The best F1 over the gold answers between the bags of normalised words; two empty bags agree."""
    return max(_f1(normalize(answer).split(), normalize(gold).split()) for gold in golds)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


METRICS = {"substring_match": substring_match, "exact_match": exact_match, "token_f1": token_f1}
"""Every metric by name; each takes an answer and the accepted ones, and gives a score from 0 to 1."""
