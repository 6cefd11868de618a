"""Hold a command at a chosen place, so that what a test does meanwhile does not depend on speeds."""

import os
import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tests.commands import TIMEOUT_S, wait_until


@dataclass(frozen=True)
class Hold:
    """Lets every process of a command wait before one call of a function; `before` of `start_ranks`.

    folder: a folder for the files by which the processes and the test talk.
    function: `package.module:name` or `package.module:Class.name`.
    call: which call waits, counted from 1.
    """

    folder: Path
    function: str
    call: int = 1

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self) -> None:
        """Hold this process when it calls the function."""
        owner, _, name = self.function.replace(":", ".").rpartition(".")
        place = pkgutil.resolve_name(owner)
        work, calls = getattr(place, name), count(1)

        def wait_and_work(*arguments: Any, **options: Any) -> Any:
            if next(calls) == self.call:
                self._wait()
            return work(*arguments, **options)

        setattr(place, name, wait_and_work)

    def _wait(self) -> None:
        (self.folder / f"reached-{os.getpid()}").touch()
        deadline = time.monotonic() + TIMEOUT_S
        while not self._released.exists():
            assert time.monotonic() < deadline, "the test has not released this process"
            time.sleep(0.01)

    @property
    def _released(self) -> Path:
        return self.folder / "released"

    @property
    def num_reached(self) -> int:
        """The number of processes that have come to the place."""
        return len(list(self.folder.glob("reached-*")))

    def wait_until_reached(self, is_running: Callable[[], bool], num_processes: int = 1) -> None:
        """Wait until some processes of a running command are held."""
        wait_until(lambda: self.num_reached >= num_processes, is_running)

    def release(self) -> None:
        """Let all processes go on."""
        self._released.touch()
