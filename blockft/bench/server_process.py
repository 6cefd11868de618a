"""Start servers for a benchmark, wait until they answer, and end them."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockft.errors import UserError
from blockft.held_signals import hold_signals
from blockft.printable import print_text

STOP_TIMEOUT_S = 90
"""How long a server may take to end after SIGTERM."""

POLL_S = 0.5
NUM_LOG_LINES = 30
"""Lines of the log that are printed if a server fails."""


@dataclass(frozen=True, kw_only=True)
class ServerCommand:
    """How to start a server, and the address at which it answers."""

    words: Sequence[str]
    host: str
    port: int
    environment: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class ServerProcess:
    """A server that a benchmark starts.

    log: the file for its output. The end of the output is printed if the server fails.
    """

    def __init__(self, command: ServerCommand, log: Path) -> None:
        self.command, self._log = command, log
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0.0
        self.start_s: float | None = None
        """The seconds that the start took; None until the server answers."""

    def begin(self) -> None:
        """Start the process."""
        assert self._process is None
        self._begun = time.monotonic()
        with self._log.open("wb") as output, hold_signals():
            # a session of its own: Ctrl-C ends the benchmark, which ends the server
            self._process = subprocess.Popen(
                self.command.words,
                stdout=output,
                stderr=output,
                env=os.environ | dict(self.command.environment),
                start_new_session=True,
            )

    @property
    def is_begun(self) -> bool:
        return self._process is not None

    def poll_start(self) -> bool:
        """Return whether the server answers.

        Raises:
            UserError: the process has ended.
        """
        if self.start_s is None:
            self.check("before it answered")
            # the server is on this machine: a proxy of the environment must not be asked
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with contextlib.suppress(OSError), opener.open(f"{self.command.url}/health", timeout=5):
                self.start_s = time.monotonic() - self._begun
        return self.start_s is not None

    def check(self, when: str) -> None:
        """Check that the process runs; `when` says for the message when it ended.

        Raises:
            UserError: it has ended.
        """
        assert self._process is not None
        if self._process.poll() is not None:
            raise self.failure(f"the server ended with exit code {self._process.returncode} {when}")

    def failure(self, message: str) -> UserError:
        """Print the end of the log, and return an error that points to it."""
        with self._log.open(encoding="utf-8", errors="replace") as lines:
            for line in deque(lines, NUM_LOG_LINES):
                print_text(line.rstrip("\n"), file=sys.stderr)
        return UserError(f"{message}; the end of its output is above")

    def terminate(self) -> None:
        """Ask the server to end, and return at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self, end: float = math.inf) -> None:
        """End the server with its processes, at the latest at `end`."""
        if self._process is None:
            return
        self.terminate()
        timeout_s = min(STOP_TIMEOUT_S, max(end - time.monotonic(), 0.1))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        # processes of the server that did not end by themselves
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


def wait_for_servers(
    processes: Sequence[ServerProcess], timeout_s: float, end: float
) -> Iterator[tuple[ServerProcess, UserError | None]]:
    """Wait until every server answers or has failed, and yield each one then, with the reason of a failure.

    timeout_s: longest start of a server. `end` is the latest time on the monotonic clock.
    """
    end, waiting = min(time.monotonic() + timeout_s, end), list(processes)
    while waiting:
        for process in list(waiting):
            try:
                if process.poll_start():
                    waiting.remove(process)
                    yield process, None
                elif time.monotonic() >= end:
                    raise process.failure(
                        "the server did not answer in time: set a larger --start-timeout or --limit-s"
                    )
            except UserError as error:
                waiting.remove(process)
                yield process, error
        if waiting:
            time.sleep(POLL_S)
