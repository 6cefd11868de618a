"""Mixture: how many examples of each source an epoch has, and which ones."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How often the examples of each source occur in an epoch of training.

    A source of n examples has the size min(n, `max_examples`). The temperature T changes the sizes and keeps
    their sum: size' = sum(sizes) * size ** (1 / T) / sum(sizes ** (1 / T)). An epoch holds weight * size'
    examples of the source, rounded, and at least one example. With all defaults it holds each example once.

    Limit and temperature are those of T5 (Raffel et al. 2020, section 3.5.2) and mT5 (Xue et al. 2021,
    section 3.2, where alpha is 1 / T). These papers draw with replacement; here the examples take turns.

    weights       the weight of each source
    temperature   1 keeps the sizes; a larger number brings them closer together
    max_examples  the largest size of a source; None sets no limit
    """

    weights: tuple[float, ...]
    temperature: float = 1.0
    max_examples: int | None = None

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> "Mixture":
        """Return the mixture of the options in the manifest of prepared data."""
        return cls(weights=tuple(source["weight"] for source in options["sources"]), **options["mixture"])

    @property
    def is_default(self) -> bool:
        """Whether each epoch holds each example once."""
        return set(self.weights) <= {1.0} and self.temperature == 1 and self.max_examples is None

    def count_examples(self, num_examples: Sequence[int]) -> list[int]:
        """Return the number of examples of each source in an epoch, from the number that each source has."""
        sizes: list[float] = [min(number, self.max_examples or number) for number in num_examples]
        if self.temperature != 1:
            scaled = [size ** (1 / self.temperature) for size in sizes]
            sizes = [sum(sizes) * size / (sum(scaled) or 1) for size in scaled]
        return [
            max(1, round(weight * size)) if number else 0
            for weight, size, number in zip(self.weights, sizes, num_examples, strict=True)
        ]

    def draw(
        self, examples: NDArray[np.int64], sources: NDArray[np.int64], seed: int, epoch: int
    ) -> NDArray[np.int64]:
        """Return the examples of an epoch in order; an example that occurs twice stands there twice.

        The examples of a source are shuffled once and take turns: an epoch starts where the one before it
        ended. After any number of epochs no example has occurred more than once more often than another one
        of its source.

        Args:
            examples: the indices of all examples, in order.
            sources: the source of each of them.
        """
        num_examples = np.bincount(sources, minlength=len(self.weights)).tolist()
        num_times = np.zeros(len(examples), np.int64)
        for source, (number, num_drawn) in enumerate(
            zip(num_examples, self.count_examples(num_examples), strict=True)
        ):
            if not number:
                continue
            times = np.full(number, num_drawn // number)
            if num_rest := num_drawn % number:
                order = list(range(number))
                random.Random(f"{seed}:mixture:{source}").shuffle(order)
                start = epoch * num_drawn % number
                times[np.array(order)[np.arange(start, start + num_rest) % number]] += 1
            num_times[sources == source] = times
        return np.repeat(examples, num_times)
