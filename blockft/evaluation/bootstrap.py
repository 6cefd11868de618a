"""Confidence intervals of mean scores: the percentile bootstrap over questions (Efron, Tibshirani 1993)."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
"""The share of resampled means that lie inside the interval."""

NUM_RESAMPLES = 2000
SEED = 0

_CHUNK = 100
"""Resamples drawn together, which bounds the memory used."""


def bootstrap_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Return the interval (low, high) of the mean score.

    The seed is fixed: the same scores give the same interval. To compare two modes, pass the differences of
    the scores of each question: their interval leaves out how difficult the questions are.
    """
    values, rng = np.asarray(scores, np.float64), np.random.default_rng(SEED)
    means = []
    for _ in range(0, NUM_RESAMPLES, _CHUNK):
        indices = rng.integers(0, len(values), size=(_CHUNK, len(values)))
        means.append(values[indices].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
