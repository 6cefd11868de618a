"""Bootstrap intervals: reproducible, about as wide as theory says, and narrower for paired scores."""

import random

import numpy as np
import pytest

from blockft.evaluation.bootstrap import bootstrap_interval


def test_the_same_scores_give_the_same_interval() -> None:
    scores = [float(i % 3 == 0) for i in range(100)]
    assert bootstrap_interval(scores) == bootstrap_interval(scores)


def test_equal_scores_give_an_interval_of_one_point() -> None:
    assert bootstrap_interval([1.0] * 20) == (1.0, 1.0)


@pytest.mark.parametrize(("num", "share"), [(400, 0.3), (1000, 0.5), (450, 0.9)])
def test_intervals_of_shares_match_the_normal_approximation(num: int, share: float) -> None:
    scores = [float(i < share * num) for i in range(num)]
    half = 1.96 * np.sqrt(share * (1 - share) / num)
    assert bootstrap_interval(scores) == pytest.approx((share - half, share + half), abs=0.15 * half)


def test_95_percent_of_intervals_hold_the_true_mean() -> None:
    rng, num_covered = random.Random(0), 0
    for _ in range(200):
        low, high = bootstrap_interval([float(rng.random() < 0.4) for _ in range(150)])
        num_covered += low <= 0.4 <= high
    assert 180 <= num_covered <= 200


def test_paired_differences_give_a_narrower_interval() -> None:
    rng = random.Random(1)
    block = [float(rng.random() < 0.5) for _ in range(300)]
    full = [1.0 if rng.random() < 0.05 else score for score in block]
    low, high = bootstrap_interval([a - b for a, b in zip(block, full, strict=True)])
    unpaired = bootstrap_interval(block)
    assert high - low < (unpaired[1] - unpaired[0]) / 2 and high <= 0
