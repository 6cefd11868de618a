"""How sure a mean score is: percentile bootstrap intervals over questions (Efron and Tibshirani 1993)."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
"""The share of resamples whose mean an interval holds."""

NUM_RESAMPLES = 2000
SEED = 0

_CHUNK = 100


def bootstrap_interval(scores: Sequence[float]) -> tuple[float, float]:
    """The interval of the mean, drawn with a fixed seed: the same scores give the same interval.

    Scores of the same questions in two modes are compared by the interval of their differences, which leaves
    out what is only the questions' own difficulty.
    """
    values, draw = np.asarray(scores, np.float64), np.random.default_rng(SEED)
    means = []
    for _ in range(0, NUM_RESAMPLES, _CHUNK):
        drawn = draw.integers(0, len(values), size=(_CHUNK, len(values)))
        means.append(values[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
