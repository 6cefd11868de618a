"""Work on a stream in several processes: results in order, memory bounded, the same whatever their number."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

_work: Callable[[Any], Any]


def map_in_order(work: Callable[[A], B], tasks: Iterable[A], num_workers: int) -> Iterator[B]:
    """`map(work, tasks)` in `num_workers` processes (0 is one per core), a few tasks ahead of what is taken.

    A single task or worker runs in this process. Results have to survive pickling; `work` need not.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if num_workers == 1 or len(first) < 2:
        yield from map(work, tasks)
        return
    # forked workers inherit `work`, tokenizer and all, instead of loading it again
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, fork, _start, (work,)) as pool:
        pending: deque[Future[B]] = deque(pool.submit(_run, task) for task in islice(tasks, 2 * num_workers))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(_run, task) for task in islice(tasks, 1))
        finally:
            for future in pending:
                future.cancel()


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # an interrupt reaches the whole group; the parent alone answers it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(task: Any) -> Any:
    return _work(task)
