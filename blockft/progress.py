"""How far long work is, on stderr if that is a terminal; never on stdout, where the results go."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")


def is_enabled() -> bool:
    """Whether anybody watches: bars are for terminals."""
    return sys.stderr.isatty()


@contextmanager
def progress(label: str, total: float, *, beside_results: bool = False) -> Iterator[Callable[[float], None]]:
    """A bar; call what this gives with how much more of `total` is done.

    beside_results: results are printed meanwhile; if they go to a terminal, they show how far the work is.
    """
    is_off = not is_enabled() or beside_results and sys.stdout.isatty()
    # rich would send what is printed on stdout to the terminal, past the file that it is meant for
    with Progress(console=Console(stderr=True), disable=is_off, redirect_stdout=False) as bar:
        task = bar.add_task(label, total=total)
        yield lambda more: bar.advance(task, more)


def track(items: Sequence[Item], label: str) -> Iterator[Item]:
    """The items, with a bar that counts them."""
    with progress(label, len(items)) as advance:
        for item in items:
            yield item
            advance(1)
