"""Signals wait while a process is started, and are ignored while a process ends."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from blockft.held_signals import HELD, hold_signals, ignore_signals


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that were handled by a handler which interrupts."""
    numbers: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        numbers.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in HELD}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HELD)
def test_a_signal_is_handled_at_the_end(handled: list[int], number: signal.Signals) -> None:
    handlers = [*map(signal.getsignal, HELD)]
    has_ended = False
    with pytest.raises(KeyboardInterrupt), hold_signals():
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert not handled
        has_ended = True
    assert has_ended and handled == [number]
    assert [*map(signal.getsignal, HELD)] == handlers
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_without_a_signal_nothing_changes(handled: list[int]) -> None:
    handlers = [*map(signal.getsignal, HELD)]
    with hold_signals():
        pass
    with pytest.raises(ValueError), hold_signals():
        raise ValueError
    assert [*map(signal.getsignal, HELD)] == handlers and not handled


def test_an_error_and_a_signal_interrupt(handled: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), hold_signals():
        signal.raise_signal(signal.SIGINT)
        raise OSError("no such program")
    assert handled == [signal.SIGINT]


def test_a_handler_of_the_block_gets_the_signals(handled: list[int]) -> None:
    forwarded: list[int] = []
    with hold_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, frame: forwarded.append(number))
    assert forwarded == [signal.SIGTERM] and not handled
    signal.raise_signal(signal.SIGTERM)
    assert forwarded == [signal.SIGTERM] * 2


@pytest.mark.parametrize("position", range(len(HELD)))
def test_a_signal_while_handlers_change_interrupts(
    handled: list[int], position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it leaves some of the handlers unchanged: no later signal is lost."""
    install = signal.signal
    for calls_before in (position, position + len(HELD)):
        num_calls = 0

        def install_and_interrupt(number: int, handler: object, calls_before: int = calls_before) -> object:
            nonlocal num_calls
            num_calls += 1
            if num_calls == calls_before + 1:
                signal.raise_signal(signal.SIGINT)
            return install(number, handler)  # type: ignore[arg-type]

        monkeypatch.setattr(signal, "signal", install_and_interrupt)
        with pytest.raises(KeyboardInterrupt), hold_signals():
            pass
        monkeypatch.undo()
        for number in HELD:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert len(handled) == 2 * (1 + len(HELD))


def test_ignored_and_default_signals_are_left_alone(handled: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with hold_signals():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)


def test_signals_are_ignored_while_a_process_ends(handled: list[int]) -> None:
    handlers = [*map(signal.getsignal, HELD)]
    with ignore_signals():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert [*map(signal.getsignal, HELD)] == handlers and not handled


def test_another_thread_ignores_no_signal(handled: list[int]) -> None:
    def enter() -> list[object]:
        with ignore_signals():
            return [*map(signal.getsignal, HELD)]

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(enter).result() == [*map(signal.getsignal, HELD)]
