"""Ctrl-C and SIGTERM: they end a command at any moment, and no library can swallow them."""

import os
import signal
import sys
import time
import weakref
from types import FrameType
from typing import Any

from blockft.errors import INTERRUPTED

PATIENCE_S = 2
"""A further signal ends the process at once if the command has been ending for longer than this."""

RETRY_S = 0.005
"""Time until an interruption that was swallowed is raised again."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""


class Interrupts:
    """Raises `Interrupted` in the main thread on a signal, and again if it was swallowed.

    Python ignores an exception in a destructor or in a callback of the garbage collector, and libraries
    ignore some while they are imported. The exception is then deleted before the command has ended, which
    a weak reference to it reports.
    """

    def __init__(self) -> None:
        self.received = False
        self._is_over = False
        self._raised: weakref.ref[Interrupted] | None = None
        self._since_s = 0.0

    def install(self, *signals: signal.Signals) -> None:
        """Handle these signals from now on."""
        for number in (*signals, signal.SIGALRM):
            signal.signal(number, self._handle)
        print_unraisable = sys.unraisablehook

        def hide_interrupted(unraisable: Any) -> None:
            if not isinstance(unraisable.exc_value, Interrupted):
                print_unraisable(unraisable)

        sys.unraisablehook = hide_interrupted

    def stop(self) -> None:
        """Raise nothing more: the command has ended. A further signal ends the process at once."""
        self._is_over = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raised and self._raised():  # one signal may come twice: from a terminal and from a parent
            if time.monotonic() - self._since_s > PATIENCE_S and number != signal.SIGALRM:
                os._exit(INTERRUPTED)
            return
        if self._is_over:
            if number != signal.SIGALRM:
                os._exit(INTERRUPTED)
            return
        if not self.received:
            self.received, self._since_s = True, time.monotonic()
        interrupted = Interrupted()
        self._raised = weakref.ref(interrupted, self._raise_again)
        try:
            raise interrupted
        finally:
            del interrupted  # otherwise its traceback, which holds this frame, would keep it alive

    def _raise_again(self, _: object) -> None:
        if not self._is_over:
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
