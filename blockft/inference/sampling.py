"""The next token of every prompt of a batch: the most likely one, or one drawn as if it were alone.

Shapes: B prompts of a batch, V tokens of the vocabulary.
"""

import math
from numbers import Integral, Real
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from blockft.errors import UserError

MIN_TEMPERATURE = 1e-6
"""Logits divided by less may no longer be finite."""


class Sampler:
    """Chooses the next tokens of one batch of prompts, from the first to the last.

    Temperature 0 takes the most likely token. Else a token is drawn among the fewest that together have the
    probability `top_p`: row i draws with a generator of its own, seeded `seed + i`, so that its answer is the
    one that it gets alone with that seed, whatever stands in the other rows. A seed of None is another one
    each time.

    Raises:
        UserError: a temperature below 0 or next to it; `top_p` outside (0, 1], or below 1 at temperature 0,
            which does not draw; a seed that is no whole number.
    """

    def __init__(self, temperature: float = 0, top_p: float = 1, seed: int | None = 0) -> None:
        if not _is(Real, temperature) or temperature and not MIN_TEMPERATURE <= temperature < math.inf:
            raise UserError(
                f"temperature is {temperature!r}, it should be 0 (always the most likely token) "
                f"or a number of at least {MIN_TEMPERATURE}"
            )
        if not _is(Real, top_p) or not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p!r}, it should be above 0 and at most 1 (any token)")
        if top_p < 1 and not temperature:
            raise UserError(
                f"top_p is {top_p} at temperature 0, which takes the most likely token: give a temperature"
            )
        if seed is not None and not _is(Integral, seed):
            raise UserError(
                f"seed is {seed!r}, it should be a whole number, or None for another one each time"
            )
        self._seed = None if seed is None else int(seed)
        self._warpers = LogitsProcessorList()
        if temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if temperature > 0 and top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        self._generators: list[torch.Generator] = []

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The ids of the next tokens, (B,); the same prompts stand in the same rows each time."""
        if not self._warpers:
            return logits_BV.argmax(dim=-1)
        if not self._generators:
            self._generators = [self._generator(row, logits_BV.device) for row in range(len(logits_BV))]
        # warpers ask for the ids so far, which these do not read
        probabilities_BV = self._warpers(torch.LongTensor(), logits_BV.float()).softmax(dim=-1)
        drawn = [
            torch.multinomial(probabilities_V, 1, generator=generator)
            for probabilities_V, generator in zip(probabilities_BV, self._generators, strict=True)
        ]
        return torch.cat(drawn)

    def _generator(self, row: int, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self._seed is None:
            generator.seed()
        else:
            generator.manual_seed((self._seed + row) % 2**63)
        return generator


def _is(kind: type, found: Any) -> bool:
    """Also of numpy's numbers."""
    return isinstance(found, kind)
