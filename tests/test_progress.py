"""Bars go to a terminal, and nowhere else."""

import os
import pty
import subprocess
import sys

COUNT = "from blockft.progress import track\nfor i in track(range(3), 'counting'): print(i)"


def count(stderr: int) -> str:
    """What a process that shows a bar writes to stdout."""
    done = subprocess.run([sys.executable, "-c", COUNT], stdout=subprocess.PIPE, stderr=stderr, text=True)
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
