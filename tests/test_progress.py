"""Bars go to a terminal, and nowhere else."""

import os
import pty
import subprocess
import sys

COUNT = "from blockft.progress import track\nfor i in track(range(3), 'counting'): print(i)"
BESIDE = """
from blockft.progress import progress
with progress("counting", 1, beside_results=True) as advance:
    print(0)
    advance(1)
"""


def count(stderr: int, code: str = COUNT, stdout: int = subprocess.PIPE) -> str:
    """What a process that shows a bar writes to stdout."""
    done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=stderr, text=True)
    assert done.returncode == 0
    return done.stdout


def test_a_terminal_gets_the_bar_and_stdout_the_results() -> None:
    ours, theirs = pty.openpty()
    assert count(theirs) == "0\n1\n2\n"
    shown = os.read(ours, 100_000).decode()
    assert "counting" in shown and "100%" in shown
    os.close(theirs)
    os.close(ours)


def test_without_a_terminal_there_is_no_bar() -> None:
    ours, theirs = os.pipe()
    assert count(theirs) == "0\n1\n2\n"
    os.close(theirs)
    assert os.read(ours, 100_000) == b""
    os.close(ours)


def test_results_on_the_same_terminal_have_no_bar_between_them() -> None:
    ours, theirs = pty.openpty()
    assert count(theirs, BESIDE) == "0\n"
    assert "100%" in os.read(ours, 100_000).decode()
    count(theirs, BESIDE, stdout=theirs)
    assert os.read(ours, 100_000).split() == [b"0"]
    os.close(theirs)
    os.close(ours)
