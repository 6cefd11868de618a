"""Ctrl-C and SIGTERM end a command at any moment with exit code 130, and leave no worker behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tests.commands import ROOT

COMMAND = """
import time
from blockft import cli
from blockft.cli import commands
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
        for _ in range(1000):
            time.sleep(0.01)
        print("went on")
    finally:
        time.sleep(0.2)
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
        [sys.executable, "-c", COMMAND.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout and process.stdout.readline()
    for _ in range(2):  # a terminal and a parent may both send it
        process.send_signal(number)
        time.sleep(0.05)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout.endswith("cleaned\n") and "went on" not in stdout
    assert stderr == ""


def test_a_further_signal_ends_a_cleanup_that_hangs() -> None:
    source = COMMAND.format(body="print('started', flush=True)").replace("time.sleep(0.2)", "time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(2.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


WORKERS = """
import os, signal, sys, time
from blockft.data.parallel import map_in_order
def work(seconds):
    time.sleep(seconds)
    return os.getpid()
for pid in map_in_order(work, [0.1] * 8 + [60] * 8, 2):
    print(pid, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    workers = {psutil.Process(int(process.stdout.readline())) for _ in range(2)}
    process.send_signal(number)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_a_killed_worker_is_a_sentence() -> None:
    source = WORKERS + textwrap.dedent("""
        """)
    source = source.replace("for pid in", "from blockft.errors import UserError\ntry:\n  for pid in").replace(
        "    print(pid, flush=True)", "    print(pid, flush=True)\nexcept UserError as error:\n  print(error)"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "memory ran out: set data.num_workers lower" in stdout
