"""Progress bars on stderr, shown only if stderr is a terminal; stdout carries the results."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from blockft.console import PlainConsole
from blockft.printable import printable

Item = TypeVar("Item")


def is_enabled() -> bool:
    """Return whether progress bars are shown: stderr is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def progress(label: str, total: float, *, beside_results: bool = False) -> Iterator[Callable[[float], None]]:
    """Show a bar; yields a function that advances it by a part of `total`.

    beside_results: results are printed meanwhile. If stdout is a terminal they show the progress themselves,
        and the bar is off.
    """
    is_off = not is_enabled() or beside_results and sys.stdout.isatty()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    # rich would otherwise redirect stdout to the terminal, even if it is meant for a file
    with Progress(*columns, console=PlainConsole(stderr=True), disable=is_off, redirect_stdout=False) as bar:
        task = bar.add_task(printable(label), total=total)
        yield lambda amount: bar.advance(task, amount)


def track(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield the items while a bar counts them."""
    with progress(label, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def counter(noun: str) -> Iterator[Callable[[int], None]]:
    """Show a count and the elapsed time; yields a function that adds to the count.

    No thread refreshes it, because a caller may fork worker processes meanwhile.
    """
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.completed:,.0f} {task.description}", markup=False),
        TimeElapsedColumn(),
        console=PlainConsole(stderr=True),
        disable=not is_enabled(),
        auto_refresh=False,
        transient=True,
    ) as bar:
        task = bar.add_task(printable(noun), total=None)
        yield lambda amount: bar.update(task, advance=amount, refresh=True)
