"""Sampling follows temperature, top_p and seed, and does not depend on the other rows of a batch."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from blockft.errors import UserError
from blockft.inference.sampling import MIN_TEMPERATURE, Sampler


def random_logits(num_rows: int, num_tokens: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(seed)) * 3


def sample_steps(sampler: Sampler, logits_BV: torch.Tensor, num_steps: int = 8) -> list[list[int]]:
    """Return the tokens that each row samples from the same logits in several steps."""
    return torch.stack([sampler(logits_BV) for _ in range(num_steps)]).T.tolist()


def test_temperature_0_takes_the_most_likely_token() -> None:
    logits = random_logits(3)
    assert Sampler()(logits).tolist() == logits.argmax(dim=-1).tolist()
    assert Sampler(seed=None)(logits.bfloat16()).shape == (3,)


@pytest.mark.parametrize("top_p", [1, 0.9])
def test_a_row_samples_as_it_does_alone(top_p: float) -> None:
    logits = random_logits(4)
    together = sample_steps(Sampler(1.5, top_p, seed=7), logits)
    alone = [sample_steps(Sampler(1.5, top_p, seed=7 + i), logits[i : i + 1])[0] for i in range(4)]
    assert together == alone
    assert len({tuple(row) for row in sample_steps(Sampler(1.5, top_p), logits[:1].expand(4, -1))}) == 4


def test_negative_and_large_seeds_are_allowed() -> None:
    logits = random_logits(3)
    for seed in (-1, 2**63 - 1, 2**64):
        assert sample_steps(Sampler(5.0, seed=seed), logits) == sample_steps(Sampler(5.0, seed=seed), logits)


def test_a_seed_repeats_samples_and_no_seed_does_not() -> None:
    logits = random_logits(2, num_tokens=1000)
    assert sample_steps(Sampler(5.0), logits) == sample_steps(Sampler(5.0), logits)
    assert sample_steps(Sampler(5.0, seed=None), logits) != sample_steps(Sampler(5.0, seed=None), logits)


def test_tokens_are_sampled_with_their_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf]])
    counts = torch.bincount(torch.tensor(sample_steps(Sampler(2.0), logits, 4000)[0]), minlength=4)
    assert_close(counts / 4000, (logits[0] / 2).softmax(dim=-1), rtol=0, atol=0.03)
    assert counts[3] == 0


def test_top_p_keeps_the_fewest_tokens_with_the_probability() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in [(0.4, {0}), (0.7, {0, 1}), (0.9, {0, 1, 2}), (1, {0, 1, 2, 3})]:
        assert set(sample_steps(Sampler(1.0, top_p), logits, 300)[0]) == kept


def test_numpy_numbers_are_allowed() -> None:
    sampler = Sampler(np.float32(1.5), np.float64(0.5), np.int64(7))  # type: ignore[arg-type]
    assert sample_steps(sampler, random_logits(2)) == sample_steps(Sampler(1.5, 0.5, 7), random_logits(2))


def test_the_lowest_temperature_is_greedy() -> None:
    logits = random_logits(3).bfloat16() * 1000
    assert Sampler(MIN_TEMPERATURE, 0.9)(logits).tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_p": 0.9}, "top_p is 0.9 at temperature 0, which takes the most likely token"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": 1, "top_p": "0.9"}, "top_p is '0.9'"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=name):
        Sampler(**options)  # type: ignore[arg-type]
