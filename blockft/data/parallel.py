"""Parallel map: apply a function to a stream of tasks in several processes, in order and bounded memory."""

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
    """Yield `map(work, tasks)`, computed in `num_workers` processes; 0 is one process per core.

    At most `2 * num_workers` tasks are computed before their results are taken. A single task, or a single
    worker, runs in this process. Results must be picklable; `work` need not be.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if num_workers == 1 or len(first) < 2:
        yield from map(work, tasks)
        return
    # forked workers inherit `work` with its tokenizer, instead of loading it again
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
    # Ctrl-C reaches all processes of the group; only the parent handles it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(task: Any) -> Any:
    return _work(task)
