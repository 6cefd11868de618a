"""Let another process act between any two steps of an operation, in one process and without chance."""

import fcntl
import io
import os
from collections.abc import Callable
from typing import Any, Self

import pytest

_CALLS = (
    *("chmod", "link", "listdir", "lstat", "mkdir", "open", "preadv", "rename", "replace", "rmdir"),
    *("scandir", "stat", "truncate", "unlink", "utime"),
)
"""The functions of `os` before which another process may act."""


class _MustWait(BaseException):
    """The other process waits for a lock that this process holds."""


class Interruption:
    """Lets another process act just before call `number`, counted from 0, of the system.

    `acts` are what the other process does: the first one before that call, each further one before the next
    call. If it has to wait for a lock, that act and those after it happen at the end of the `with` block. Try
    all numbers until `has_happened` is false: then there was no such call.
    """

    def __init__(self, number: int, *acts: Callable[[], object]) -> None:
        self._num_left, self._acts = number, [*acts]
        self._is_acting = self._must_wait = False
        self._patches = pytest.MonkeyPatch()

    @property
    def has_happened(self) -> bool:
        return self._num_left < 0

    def __enter__(self) -> Self:
        for name in _CALLS:
            self._patches.setattr(os, name, self.watch(getattr(os, name)))
        self._patches.setattr(io, "open", self.watch(io.open))
        self._patches.setattr(fcntl, "flock", self.watch(self._lock))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.undo()
        if self.has_happened:
            for act in self._acts:
                act()

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function like `call` before whose calls the other process may act, too."""

        def count_and_call(*arguments: Any, **options: Any) -> Any:
            if not self._is_acting:
                self._num_left -= 1
                if self.has_happened and self._acts and not self._must_wait:
                    self._happen()
            return call(*arguments, **options)

        return count_and_call

    def _happen(self) -> None:
        act = self._acts.pop(0)
        self._is_acting = True
        try:
            act()
        except _MustWait:
            self._must_wait = True
            self._acts.insert(0, act)
        finally:
            self._is_acting = False

    def _lock(self, file: Any, kind: int, flock: Callable[[Any, int], None] = fcntl.flock) -> None:
        if not self._is_acting or kind & fcntl.LOCK_NB:
            flock(file, kind)
            return
        try:
            flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _MustWait from None
