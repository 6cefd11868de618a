"""Progress of long operations on stderr: a bar on a terminal, a line a minute in the log of a batch job."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from blockft.console import PlainConsole
from blockft.errors import is_first_of_host, notify
from blockft.printable import printable
from blockft.units import format_bytes, format_count

Item = TypeVar("Item")

REFRESH_S = 0.1
"""Shortest time between two drawings of a bar."""

LINE_S = 60.0
"""Shortest time between two lines of an operation, if stderr is not a terminal."""

LINE_SHARE = 0.01
"""Smallest share of the total between two lines, so that a long operation prints at most 100 lines."""

BYTE = "byte"
"""The unit that is shown in kB, MB and GB."""

_is_active = False
"""Whether an operation of this process shows its progress; operations inside of it show none."""


def is_enabled() -> bool:
    """Return whether progress bars are shown: stderr is a terminal."""
    return sys.stderr.isatty()


class Advance:
    """Advances the progress of an operation; see `progress`."""

    def __init__(self, bar: Progress, task: TaskID, *, prints_lines: bool) -> None:
        self._bar, self._task, self._prints_lines = bar, task, prints_lines
        self._amount = 0.0
        self._refreshed = self._line_time = bar.get_time()
        self._line_done = 0.0
        self._has_lines = False
        # the start counts as a step: the first amount gives a rate
        bar.advance(task, 0)

    def __call__(self, amount: float = 1, *, note: str | None = None) -> None:
        """Add an amount to what is done; `note` is shown at the end of the line from now on."""
        self._amount += amount
        if note is not None:
            self._bar.update(self._task, note=printable(note))
        if self._bar.get_time() - self._refreshed >= REFRESH_S:
            self._refresh()

    def set_total(self, total: float, *, is_estimate: bool = False) -> None:
        """Set the total of an operation whose total was unknown or an estimate, which is shown with a `~`."""
        task = self._bar.tasks[self._task]
        task.total = total  # `Progress.update` would forget the rate
        task.fields["is_estimate"] = is_estimate

    def finish(self) -> None:
        """Show the final state."""
        self._refresh()
        task = self._bar.tasks[self._task]
        # the line of the last step may already say that all is done
        if self._has_lines and not (task.finished and self._line_done == task.completed):
            self._print_line(
                (_format_done(task), _format_rate(task), f"{_format_seconds(task.elapsed)} in all")
            )

    def _refresh(self) -> None:
        self._bar.advance(self._task, self._amount)
        self._amount = 0
        self._refreshed = self._bar.get_time()
        self._bar.refresh()
        task = self._bar.tasks[self._task]
        is_due = self._refreshed - self._line_time >= LINE_S
        if (
            self._prints_lines
            and is_due
            and task.completed - self._line_done >= LINE_SHARE * (task.total or 0)
        ):
            self._line_time, self._line_done = self._refreshed, task.completed
            self._print_line((_format_percent(task), *(show(task) for show in _TEXTS)))

    def _print_line(self, texts: Sequence[str]) -> None:
        self._has_lines = True
        description = self._bar.tasks[self._task].description
        notify(f"{description}: {', '.join(text for text in texts if text)}")


@contextmanager
def progress(
    label: str,
    total: float | None = None,
    *,
    unit: str,
    beside_results: bool = False,
    transient: bool = False,
) -> Iterator[Advance]:
    """Show what is done of `total`, the rate and the time left; yields a function that adds to what is done.

    On a terminal this is a bar. Elsewhere an operation of more than a minute prints a line now and then. No
    thread draws the bar, so the caller may fork processes meanwhile. Inside another operation nothing is
    shown.

    Args:
        total: in units; None if it is unknown.
        unit: the singular of what is counted, such as "sample". `BYTE` is shown in kB, MB and GB.
        beside_results: results are printed meanwhile. If stdout is a terminal they show the progress
            themselves, and nothing else is shown.
        transient: remove the bar at the end.
    """
    global _is_active
    is_shown = not _is_active and is_first_of_host() and not (beside_results and sys.stdout.isatty())
    was_active, _is_active = _is_active, True
    bar = Progress(
        _TextColumn(lambda task: task.description),
        BarColumn(bar_width=None),
        _TextColumn(_format_percent),
        *(_TextColumn(text) for text in _TEXTS),
        console=PlainConsole(stderr=True),
        disable=not (is_shown and is_enabled()),
        auto_refresh=False,
        # the rate is that of the last 1,000 refreshes: one step may take minutes
        speed_estimate_period=float("inf"),
        # rich would otherwise redirect stdout to the terminal, even if it is meant for a file
        redirect_stdout=False,
        transient=transient,
    )
    try:
        with bar:
            task = bar.add_task(printable(label), total=total, unit=unit, is_estimate=False, note="")
            advance = Advance(bar, task, prints_lines=is_shown and not is_enabled())
            yield advance
            advance.finish()
    finally:
        _is_active = was_active


def track(items: Sequence[Item], label: str, *, unit: str) -> Iterator[Item]:
    """Yield the items while their progress is shown."""
    with progress(label, len(items), unit=unit) as advance:
        for item in items:
            yield item
            advance()


class _TextColumn(ProgressColumn):
    """A column of a bar with one line of text."""

    max_refresh = None

    def __init__(self, show: Callable[[Task], str]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._show = show

    def render(self, task: Task) -> Text:
        return Text(self._show(task))


def _format_percent(task: Task) -> str:
    return f"{task.percentage:.0f}%" if task.total else ""


def _format_done(task: Task) -> str:
    unit = task.fields["unit"]
    if task.total is None:
        return _format_amount(task.completed, unit)
    mark = "~" if task.fields["is_estimate"] else ""
    if unit == BYTE:
        return f"{format_bytes(int(task.completed))}/{mark}{format_bytes(int(task.total))}"
    return f"{task.completed:,.0f}/{mark}{format_count(round(task.total), unit)}"


def _format_rate(task: Task) -> str:
    speed, unit = task.finished_speed or task.speed, task.fields["unit"]
    if not speed:
        return ""
    if unit == BYTE:
        return f"{format_bytes(int(speed))}/s"
    if speed < 1:
        return f"{1 / speed:,.1f} s/{unit}"
    return f"{speed:,.{0 if speed >= 10 else 1}f} {unit}s/s"


def _format_left(task: Task) -> str:
    if task.finished:
        return f"{_format_seconds(task.finished_time)} in all"
    if task.total is None:
        return f"{_format_seconds(task.elapsed)} so far"
    return "" if task.time_remaining is None else f"{_format_seconds(task.time_remaining)} left"


def _format_note(task: Task) -> str:
    return str(task.fields["note"])


def _format_amount(amount: float, unit: str) -> str:
    return format_bytes(int(amount)) if unit == BYTE else format_count(round(amount), unit)


def _format_seconds(seconds: float | None) -> str:
    return str(timedelta(seconds=int(seconds or 0)))


_TEXTS = (_format_done, _format_rate, _format_left, _format_note)
