"""Training speed in real tokens (without padding) per second."""

import time
from collections.abc import Sequence


class Throughput:
    """Measures the tokens per second of the steps since the last measurement.

    `batch_tokens` holds the number of tokens of each step's batch, padding excluded; step 1 comes first.
    """

    def __init__(self, batch_tokens: Sequence[int]) -> None:
        self._batch_tokens = batch_tokens
        self.restart(0)

    def restart(self, step: int) -> None:
        """Start a new interval after `step` steps, so that evaluation and saving do not count."""
        self._start_step, self._start_time = step, time.monotonic()

    def measure(self, step: int) -> float:
        """Return the tokens per second from the start of the interval to `step`, and start a new interval."""
        num_tokens = sum(self._batch_tokens[self._start_step : step])
        tokens_per_s = num_tokens / (time.monotonic() - self._start_time)
        self.restart(step)
        return tokens_per_s
