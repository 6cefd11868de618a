"""Parallel map: apply a function to a stream of tasks in several processes, in order and bounded memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

from blockft.errors import UserError

A = TypeVar("A")
B = TypeVar("B")

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}

_work: Callable[[Any], Any]


def map_in_order(work: Callable[[A], B], tasks: Iterable[A], num_workers: int) -> Iterator[B]:
    """Yield `map(work, tasks)`, computed in `num_workers` processes; 0 is one process per core.

    At most `2 * num_workers` tasks are computed before their results are taken. A single task, or a single
    worker, runs in this process. Results must be picklable; `work` need not be. The workers end with this
    process, however it ends.

    Raises:
        UserError: a worker was killed.
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
        pending: deque[Future[B]] = deque()
        try:
            with _blocked_signals():  # the first task starts the workers
                pending.extend(pool.submit(_run, task) for task in islice(tasks, 1))
            pending.extend(pool.submit(_run, task) for task in islice(tasks, 2 * num_workers - 1))
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(_run, task) for task in islice(tasks, 1))
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely because memory ran out: set data.num_workers lower "
                f"(prepare had {num_workers} processes)"
            ) from error
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Delay SIGINT and SIGTERM, which a worker must not handle before `_start` has run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # Ctrl-C reaches all processes of the group; only the parent handles it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent has died, however: a worker waits for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _run(task: Any) -> Any:
    return _work(task)
