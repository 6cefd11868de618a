"""Ctrl-C and SIGTERM end a command at any moment with exit code 130, and leave no worker behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tests.commands import ROOT, TIMEOUT_S, wait_until

COMMAND = """
import sys, time
from blockft import cli
from blockft.cli import commands, interrupt
interrupt.PATIENCE_S = {patience_s}
class Swallows:
    def __del__(self):
        print("destructor", flush=True)
        time.sleep(0.3)
def swallow():
    for _ in range(3):
        Swallows()
    try:
        print("import", flush=True)
        time.sleep(0.3)
    except BaseException:
        pass  # as some libraries do while they are imported
def as_import_error():
    try:
        print("import", flush=True)
        time.sleep(0.3)
    except BaseException as error:
        raise ImportError("half of it is missing") from error
def app(*_, **__):
    try:
        {body}
        for _ in range(60_000):
            time.sleep(0.01)
        print("went on")
    finally:
        print("cleaning", flush=True)
        sys.stdin.readline()
        print("cleaned", flush=True)
commands.app = app
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", ["swallow()", "as_import_error()", "print('started', flush=True)"])
def test_an_interruption_is_not_swallowed_and_cleanup_is_not_interrupted(
    number: signal.Signals, body: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body, patience_s=TIMEOUT_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout and process.stdout.readline()
    for _ in range(2):  # a terminal and a parent may both send it
        process.send_signal(number)
        time.sleep(0.05)
    stdout, stderr = process.communicate("the cleanup may end\n", timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert stdout.endswith("cleaned\n") and "went on" not in stdout
    assert stderr == ""


def test_a_further_signal_ends_a_cleanup_that_hangs() -> None:
    source = COMMAND.format(body="print('started', flush=True)", patience_s=0.2)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", source], stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    while process.stdout.readline() != "cleaning\n":
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=TIMEOUT_S) == 130


WORKERS = """
import os, signal, sys, time
from blockft.data.parallel import map_in_order
def work(seconds):
    time.sleep(seconds)
    return os.getpid()
for pid in map_in_order(work, [0.1] * 8 + [3600] * 8, 2):
    print(pid, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    workers = {psutil.Process(int(process.stdout.readline())) for _ in range(2)}
    process.send_signal(number)
    process.wait()
    wait_until(lambda: all(map(has_ended, workers)))


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, also if nobody has asked for its exit code."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_worker_is_a_sentence() -> None:
    source = WORKERS + textwrap.dedent("""
        """)
    source = source.replace("for pid in", "from blockft.errors import UserError\ntry:\n  for pid in").replace(
        "    print(pid, flush=True)", "    print(pid, flush=True)\nexcept UserError as error:\n  print(error)"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    stdout, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0 and "memory ran out: set data.num_workers lower" in stdout
