"""Start a server for a benchmark, wait until it answers, and end it."""

import contextlib
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
from blockft.printable import print_text

STOP_TIMEOUT_S = 90
"""How long a server may take to end after SIGTERM."""

POLL_S = 0.5
NUM_LOG_LINES = 30
"""Lines of the log that are printed if a server does not start."""


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


@contextlib.contextmanager
def running_server(command: ServerCommand, log: Path, timeout_s: float) -> Iterator[float]:
    """Run a server while the body runs, and yield the seconds that it took to start.

    log: the file for its output.

    Raises:
        UserError: the server ends, or does not answer in time. The end of its log is printed.
    """
    begun = time.monotonic()
    environment = os.environ | dict(command.environment)
    with log.open("wb") as output:
        # a session of its own: Ctrl-C ends the benchmark, which ends the server
        process = subprocess.Popen(
            command.words, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        _wait_until_healthy(process, command, log, begun + timeout_s)
        yield time.monotonic() - begun
        if process.poll() is not None:
            _fail(f"the server ended with exit code {process.returncode} while it was measured", log)
    finally:
        _stop(process)


def _wait_until_healthy(
    process: subprocess.Popen[bytes], command: ServerCommand, log: Path, deadline: float
) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            _fail(f"the server ended with exit code {process.returncode} before it answered", log)
        # the server is on this machine: a proxy of the environment must not be asked
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), opener.open(f"{command.url}/health", timeout=5):
            return
        time.sleep(POLL_S)
    _fail("the server did not answer in time: set a larger --start-timeout", log)


def _fail(message: str, log: Path) -> None:
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in deque(lines, NUM_LOG_LINES):
            print_text(line.rstrip("\n"), file=sys.stderr)
    raise UserError(f"{message}; the end of its output is above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server with its processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    # processes of the server that did not end by themselves
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
