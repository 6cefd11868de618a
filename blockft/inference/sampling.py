"""Sampling: choose the next token of every prompt of a batch, independently of the other prompts.

Shapes: B prompts of a batch, V tokens of the vocabulary.
"""

import math
from numbers import Integral, Real
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from blockft.errors import UserError

MIN_TEMPERATURE = 1e-6
"""The lowest temperature above 0. Logits divided by less may become infinite."""


class Sampler:
    """Chooses the next tokens of one batch of prompts, from its first step to its last.

    temperature  0 takes the most likely token; otherwise logits are divided by it
    top_p        sample from the fewest tokens that have this probability together
    seed         row i has its own generator with the seed `seed + i`, so that its tokens do not depend on the
                 other rows; None samples differently each time

    Raises:
        UserError: `temperature` is below `MIN_TEMPERATURE` and not 0, `top_p` is outside (0, 1] or is below 1
            at temperature 0, or `seed` is not a whole number.
    """

    def __init__(self, temperature: float = 0, top_p: float = 1, seed: int | None = 0) -> None:
        if not _is_number(Real, temperature) or temperature and not MIN_TEMPERATURE <= temperature < math.inf:
            raise UserError(
                f"temperature is {temperature!r}, it should be 0 (always the most likely token) "
                f"or a number of at least {MIN_TEMPERATURE}"
            )
        if not _is_number(Real, top_p) or not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p!r}, it should be above 0 and at most 1 (any token)")
        if top_p < 1 and not temperature:
            raise UserError(
                f"top_p is {top_p} at temperature 0, which takes the most likely token: give a temperature"
            )
        if seed is not None and not _is_number(Integral, seed):
            raise UserError(
                f"seed is {seed!r}, it should be a whole number, or None to sample differently each time"
            )
        self._seed = None if seed is None else int(seed)
        self._warpers = LogitsProcessorList()
        if temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if temperature > 0 and top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        self._generators: list[torch.Generator] = []

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the ids of the next tokens: (B,). Rows are the same prompts in every step."""
        if not self._warpers:
            return logits_BV.argmax(dim=-1)
        if not self._generators:
            self._generators = [self._generator(row, logits_BV.device) for row in range(len(logits_BV))]
        # the first argument, the ids so far, is not used by these warpers
        probabilities_BV = self._warpers(torch.LongTensor(), logits_BV.float()).softmax(dim=-1)
        next_ids = [
            torch.multinomial(probabilities_V, 1, generator=generator)
            for probabilities_V, generator in zip(probabilities_BV, self._generators, strict=True)
        ]
        return torch.cat(next_ids)

    def _generator(self, row: int, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self._seed is None:
            generator.seed()
        else:
            generator.manual_seed((self._seed + row) % 2**63)
        return generator


def _is_number(kind: type, value: Any) -> bool:
    """Return whether a value is a number of this kind of `numbers`, which numpy's numbers also are."""
    return isinstance(value, kind)
