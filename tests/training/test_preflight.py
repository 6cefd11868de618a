"""Checks run in order; a failed one says so in one sentence, and those that need it are not run."""

import threading

from blockft.errors import UserError
from blockft.training.preflight import Check, Status, run_checks


def refuse() -> str:
    raise UserError("no\nspace: free some")


def fail() -> str:
    raise ValueError("odd")


def test_each_check_has_one_result_and_failures_stop_only_what_needs_them() -> None:
    checks = [
        Check(name="a", run=lambda: "fine"),
        Check(name="b", run=refuse),
        Check(name="c", run=lambda: "never", needs=["a", "b"]),
        Check(name="d", run=lambda: "never", needs=["c"]),
        Check(name="e", run=fail),
        Check(name="f", run=lambda: "fine", needs=["a"]),
    ]
    results = {result.name: (result.status, result.message) for result in run_checks(checks)}
    assert results == {
        "a": (Status.ok, "fine"),
        "b": (Status.failed, "no space: free some"),
        "c": (Status.not_run, "it needs the check 'b'"),
        "d": (Status.not_run, "it needs the check 'c'"),
        "e": (Status.failed, "it failed by itself, ValueError: odd"),
        "f": (Status.ok, "fine"),
    }


def test_a_check_that_hangs_is_left_after_its_time_limit() -> None:
    may_end = threading.Event()
    (result,) = run_checks([Check(name="a", run=lambda: str(may_end.wait(600)), seconds=0.2)])
    may_end.set()
    assert result.status is Status.failed and result.message.startswith("no answer within 0.2 s")
