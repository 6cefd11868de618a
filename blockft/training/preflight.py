"""Checks before a run: each has a name, a time limit and the checks that it depends on."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from blockft.errors import UserError

MAX_CLOCK_SKEW_S = 60
"""Clocks of hosts and file servers that differ by more make the times of logs and files useless."""


class Status(StrEnum):
    """The result of a check."""

    ok = "OK"
    failed = "FAILED"
    not_run = "NOT RUN"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check: `run` returns what it found, or raises UserError with the remedy.

    The check is not run if one of the checks that `needs` names has not passed. `seconds` is its time limit.
    """

    name: str
    run: Callable[[], str]
    needs: Sequence[str] = ()
    seconds: float = 10


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a check found, in one sentence; of a failed check also what to do."""

    name: str
    status: Status
    message: str


def run_checks(checks: Sequence[Check]) -> Iterator[CheckResult]:
    """Yield the results of checks in their order.

    A check that exceeds its time limit has failed, and its thread is left alone: a file system that does not
    answer cannot be interrupted.
    """
    passed: set[str] = set()
    for check in checks:
        missing = [name for name in check.needs if name not in passed]
        if missing:
            yield CheckResult(
                name=check.name, status=Status.not_run, message=f"it needs the check {missing[0]!r}"
            )
            continue
        result = _run_check(check)
        if result.status is Status.ok:
            passed.add(check.name)
        yield result


def _run_check(check: Check) -> CheckResult:
    results: list[CheckResult] = []

    def run() -> None:
        try:
            status, message = Status.ok, check.run()
        except (UserError, OSError) as error:
            status, message = Status.failed, str(error)
        # a check calls libraries, which may fail in any way; the other checks must go on
        except Exception as error:
            status, message = Status.failed, f"it failed by itself, {type(error).__name__}: {error}"
        results.append(CheckResult(name=check.name, status=status, message=" ".join(message.split())))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(check.seconds)
    if results:
        return results[0]
    message = f"no answer within {check.seconds:g} s: look for a file system, driver or network that hangs"
    return CheckResult(name=check.name, status=Status.failed, message=message)
