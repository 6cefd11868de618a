"""Let signals wait while a process is started, or ignore them while a process ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
"""Signals that interrupt a command. The alarm repeats an interruption that a library has swallowed."""


@contextmanager
def hold_signals() -> Iterator[None]:
    """Handle signals at the end of the `with` block, where the name of a started process is known.

    A handler that the block installs stays and gets the signals. Call it in the main thread. Signals whose
    default action ends this process, and ignored signals, are not held.
    """
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {
        number: handler for number in HELD if callable(handler := signal.getsignal(number))
    }
    is_held, received = False, list[int]()

    # a signal mask would not do: the process would inherit it, and other threads of this one take signals
    def hold(number: int, frame: FrameType | None) -> None:
        if is_held:
            received.append(number)
        else:  # an interruption has left this handler installed
            handlers[number](number, frame)

    try:
        for number in handlers:
            signal.signal(number, hold)
        is_held = True
        yield
    finally:
        is_held = False
        for number, handler in handlers.items():
            if signal.getsignal(number) is hold:
                signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Let no interruption end this process in the `with` block, which must be short.

    Only the main thread can do it. In another thread signals keep their action.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # a handler of another language cannot be set again
                signal.signal(number, handler)
