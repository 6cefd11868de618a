"""Run blockft commands: in this process, in a process of its own, or on ranks forked from a warm process.

A test takes the cheapest way that shows its behaviour: a refusal needs no process, a training needs forked
ranks, and only tests of launchers and of a process's start and end need a new interpreter.
"""

import atexit
import fcntl
import importlib.util
import io
import multiprocessing
import multiprocessing.connection
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO, Any
from unittest.mock import patch

import torch

from blockft import cli
from blockft.run_folder import MEASURED, read_metrics

ROOT = Path(__file__).parents[1]

PYTHON_PATH = ":".join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""For processes of tests: this checkout, then where else this process finds packages."""

TIMEOUT_S = 900
"""Limit of each command and of each wait. It only ends what hangs: a machine may be slow for a while."""


OTHERS_S = 300
"""How long the other ranks of a command may take to end when one has failed."""

PORTS = range(15_000, 32_000)
"""Ports of the tests: below those that systems give to connections and to listeners without a port."""

_reserved_ports: list[IO[bytes]] = []
"""The files that this process has locked, one per port."""


def wait_until(condition: Callable[[], object], is_running: Callable[[], bool] = lambda: True) -> None:
    """Wait until a condition holds, while something runs that will bring it about."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        may_come = is_running()
        if condition():
            return
        assert may_come, "what was waited for has ended too early"
        assert time.monotonic() < deadline, f"nothing has happened within {TIMEOUT_S} s"
        time.sleep(0.01)


def free_port() -> int:
    """Return a port of this machine that nobody uses, and that no other test gets while this process lives.

    A rank takes its port only after its imports, which last many seconds. A port that the system chooses
    could be given to another process in this time.
    """
    folder = Path(tempfile.gettempdir(), f"blockft-test-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    while True:
        port = secrets.choice(PORTS)
        lock = (folder / str(port)).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as listener:
                listener.bind(("", port))
        except OSError:
            lock.close()
            continue
        _reserved_ports.append(lock)
        return port


def blockft(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> CompletedProcess[str]:
    """Run `blockft ARGUMENTS` in this process, for commands that start no training.

    Environment variables, signal handlers and exit handlers of this process stay as they are.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = None
    with (
        chdir(cwd),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", ["blockft", *map(str, arguments)]),
        patch.object(cli, "atexit"),
        patch.object(cli.Interrupts, "install"),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return CompletedProcess(sys.argv, code, stdout.getvalue(), stderr.getvalue())


def start(
    *arguments: str | Path, cwd: Path = ROOT, namespace: str = "", **environment: str
) -> subprocess.Popen[str]:
    """Start `python -m ARGUMENTS` under a time limit, in a network namespace if one is named."""
    timeout = shutil.which("timeout")
    assert timeout
    command = [timeout, "-k", "60", str(TIMEOUT_S), sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(
        (["ip", "netns", "exec", namespace] if namespace else []) + command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": PYTHON_PATH} | environment,
        cwd=cwd,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Wait for processes that must succeed and return what each has printed."""
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return outputs


@dataclass(frozen=True)
class Ranks:
    """Forked processes that run one command together."""

    processes: list[multiprocessing.process.BaseProcess]
    port: int
    """The port where they meet, which is also part of the names of their shared memory."""

    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def output(self, name: str) -> str:
        """Return what all ranks have printed to `stdout` or to `stderr`."""
        path = Path(self.folder.name, name)
        return path.read_text() if path.exists() else ""

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def send_signal(self, number: int) -> None:
        """Send a signal to every rank that is alive."""
        for process in self.processes:
            assert process.pid
            if process.is_alive():
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)

    def wait_or_kill(self, patience_s: float) -> None:
        """Kill the ranks that are alive after some time, and wait for all of them."""
        deadline = time.monotonic() + patience_s
        for process in self.processes:
            process.join(timeout=max(0, deadline - time.monotonic()))
        self.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def wait(self) -> CompletedProcess[str]:
        """Wait for all ranks, and kill those that have not ended in time.

        The exit code is that of the first rank that failed, or 0.
        """
        deadline, code = time.monotonic() + TIMEOUT_S, 0
        waiting = {process.sentinel: process for process in self.processes}
        while waiting:
            left_s = max(0, deadline - time.monotonic())
            ended = multiprocessing.connection.wait(list(waiting), timeout=left_s)
            for sentinel in ended:
                process = waiting.pop(sentinel)
                process.join()
                if not code and process.exitcode:
                    code = process.exitcode
                    # the others may be saving a checkpoint, or may wait for the failed rank forever
                    deadline = time.monotonic() + OTHERS_S
            if not ended:
                self.send_signal(signal.SIGKILL)
                code = code or -signal.SIGKILL
                deadline = time.monotonic() + TIMEOUT_S
        return CompletedProcess([], code, self.output("stdout"), self.output("stderr"))


def _run_rank(function: Callable[[], None], environment: Mapping[str, str], outputs: Path) -> None:
    """Call a function in this forked process, and end the process as an interpreter does."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(outputs / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    code = 1
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    # multiprocessing would end the process without its exit handlers
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _modules_of_the_warm_process() -> list[str]:
    """Return what the process imports from which ranks are forked.

    bitsandbytes starts CUDA when it is imported, and a process that has started CUDA cannot be forked.
    """
    if torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes"):
        return []
    return ["tests.fork_server", __name__]


def _variables_of_the_warm_process() -> dict[str, str]:
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    return {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", **accelerator}


def warm_context() -> ForkServerContext:
    """Return a context whose processes are forked from the warm process, which is started if there is none.

    A process has a single fork server, so that all tests use this one, in whatever order they run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_modules_of_the_warm_process())
    with chdir(ROOT), patch.dict(os.environ, _variables_of_the_warm_process()):
        # it takes the directory and the variables of this moment
        forkserver.ensure_running()
    return context


def fork_ranks(function: Callable[[], None], *, num_ranks: int = 1, **environment: str) -> Ranks:
    """Call a function, of a module or a partial of one, on ranks forked from a warm process.

    A single rank has no launcher's variables in its environment, like a process started from a shell.
    """
    context, ranks = warm_context(), Ranks([], free_port())
    with chdir(ROOT), patch.dict(os.environ, _variables_of_the_warm_process()):
        for rank in range(num_ranks):
            variables: dict[str, str] = dict(os.environ) | environment
            if num_ranks > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.port)}
            process = context.Process(target=_run_rank, args=(function, variables, Path(ranks.folder.name)))
            process.start()
            ranks.processes.append(process)
    return ranks


def _run_command(arguments: Sequence[str], before: Callable[[], None] | None) -> None:
    if before:
        before()
    sys.argv = ["blockft", *arguments]
    cli.main()


def start_ranks(
    *arguments: str | Path,
    num_ranks: int = 1,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> Ranks:
    """Start `blockft ARGUMENTS` on forked ranks, which call `before` first."""
    command = partial(_run_command, [str(argument) for argument in arguments], before)
    return fork_ranks(command, num_ranks=num_ranks, **environment)


def run_ranks(*arguments: str | Path, **options: Any) -> CompletedProcess[str]:
    """Run a command as `start_ranks` does, and wait for it."""
    return start_ranks(*arguments, **options).wait()


def train(recipe: Path, run: Path, *arguments: str | Path, num_ranks: int = 1, **options: Any) -> None:
    """Train on forked ranks; the training must succeed."""
    done = run_ranks("train", recipe, f"train.output_dir={run}", *arguments, num_ranks=num_ranks, **options)
    assert done.returncode == 0, done.stderr


def logged(run: Path, name: str = "loss") -> list[Any]:
    """Return the values that a run logged under a name, in order."""
    return [line[name] for line in read_metrics(run) if name in line]


def all_logged(run: Path) -> list[dict[str, Any]]:
    """Return every logged line without what the machine decides, such as the speed."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(run)]
