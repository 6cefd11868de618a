"""Training speed: real tokens per second, utilization of the cards, and the time left.

Padding and copies of the first block (see `Layout`) are no real tokens.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Speed:
    """The speed of some steps.

    tokens_per_s  real tokens of all ranks together
    utilization   model arithmetic over the peak of the cards, or None if the peak is not known
    """

    tokens_per_s: float
    utilization: float | None


class Throughput:
    """Measures the speed of the steps since the last measurement.

    batch_tokens: the number of real tokens of each step's batch; step 1 comes first.
    batch_flops: the model arithmetic of each step's batch, see `ModelFlops`.
    peak_flops: the peak of the cards of all ranks in operations a second, or None if it is not known.
    """

    def __init__(
        self,
        batch_tokens: Sequence[int],
        batch_flops: NDArray[np.float64] | Sequence[float],
        peak_flops: float | None,
    ) -> None:
        self._batch_tokens, self._batch_flops, self._peak_flops = batch_tokens, batch_flops, peak_flops
        self._measured: list[tuple[float, float, float]] = []  # tokens, operations and seconds of intervals
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin to train after `step` steps: the start of the time left."""
        self._first_step, self._first_time = step, time.monotonic()
        self.restart(step)

    def restart(self, step: int) -> None:
        """Start a new interval after `step` steps, so that evaluation and saving do not count."""
        self._start_step, self._start_time = step, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside from the interval."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._start_time += time.monotonic() - start

    def measure(self, step: int) -> Speed:
        """Return the speed from the start of the interval to `step`, and start a new interval."""
        steps = slice(self._start_step, step)
        interval = (
            float(sum(self._batch_tokens[steps])),
            float(sum(self._batch_flops[steps])),
            time.monotonic() - self._start_time,
        )
        self._measured.append(interval)
        self.restart(step)
        return self._speed(interval)

    def mean(self) -> Speed | None:
        """Return the mean speed of all measured intervals, or None before the first measurement.

        The first interval is left out if there are others, because layers and kernels are compiled in it.
        """
        if not self._measured:
            return None
        intervals = self._measured[1:] or self._measured
        tokens, flops, seconds = (sum(figures) for figures in zip(*intervals, strict=True))
        return self._speed((tokens, flops, seconds))

    def _speed(self, interval: tuple[float, float, float]) -> Speed:
        tokens, flops, seconds = interval
        return Speed(
            tokens_per_s=tokens / seconds,
            utilization=None if self._peak_flops is None else flops / seconds / self._peak_flops,
        )

    def seconds_left(self, step: int, num_steps: int) -> float:
        """Return the time that the steps after `step` take, at the mean speed with evaluation and saving."""
        return (time.monotonic() - self._first_time) / (step - self._first_step) * (num_steps - step)
