"""The time limit of a whole command."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from blockft.errors import UserError

END_S = 10.0
"""Seconds before the limit at which measurements end, to write the figures and to end servers."""


class OutOfTime(Exception):
    """A measurement is left out or ended, because it would exceed the time limit. The text is the reason."""


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """The end of a command on the monotonic clock.

    limit_s: seconds that the command may take; None is without a limit.
    """

    limit_s: float | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def end(self) -> float:
        """When the command must have ended."""
        return self.begun + (math.inf if self.limit_s is None else self.limit_s)

    def share_end(self, num_shares: int) -> float:
        """Return the end of the next one of equal shares of the time that is left to measure."""
        now = time.monotonic()
        return now + (self.end - END_S - now) / num_shares

    @contextmanager
    def interrupting(self, doing: str) -> Iterator[None]:
        """Interrupt the body when the time to measure is over.

        Raises:
            UserError: the time is over. `doing` says in which work, and how to have less of it.
        """
        if self.limit_s is None:
            yield
            return

        def interrupt(*_: Any) -> None:
            raise UserError(f"--limit-s {self.limit_s:g} is over {doing}, so that nothing is measured")

        old = signal.signal(signal.SIGALRM, interrupt)
        try:
            # 0 would be no alarm
            signal.setitimer(signal.ITIMER_REAL, max(self.end - END_S - time.monotonic(), 1e-3))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
