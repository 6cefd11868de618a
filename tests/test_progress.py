"""Progress on stderr: a bar on a terminal, lines elsewhere; stdout carries results alone."""

import os
import pty
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import rich.progress

from blockft.progress import BYTE, progress, track

COUNT = "from blockft.progress import track\nfor i in track(range(3), 'counting', unit='item'): print(i)"
BESIDE = """
from blockft.progress import progress
with progress("counting", 1, unit="item", beside_results=True) as advance:
    print(0)
    advance(1)
"""


def count(stderr: int, code: str = COUNT, stdout: int = subprocess.PIPE) -> str:
    """What a process that shows a bar writes to stdout."""
    done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=stderr, text=True)
    assert done.returncode == 0
    return done.stdout


def count_on_terminal(code: str = COUNT, *, results_too: bool = False) -> tuple[str, str]:
    """What a process writes to stdout, and what it shows on a terminal."""
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(read_terminal, ours)
        stdout = count(theirs, code, theirs if results_too else subprocess.PIPE)
        os.close(theirs)
        return stdout, shown.result()


def read_terminal(descriptor: int) -> str:
    """Read all that is shown on a terminal until nobody has it open, and close it."""
    shown = b""
    with suppress(OSError), open(descriptor, "rb", buffering=0) as terminal:
        while part := terminal.read(100_000):
            shown += part
    return shown.decode()


def test_a_terminal_gets_the_bar_and_stdout_the_results() -> None:
    stdout, shown = count_on_terminal()
    assert stdout == "0\n1\n2\n"
    assert "counting" in shown and "100%" in shown


def test_without_a_terminal_there_is_no_bar() -> None:
    ours, theirs = os.pipe()
    assert count(theirs) == "0\n1\n2\n"
    os.close(theirs)
    assert os.read(ours, 100_000) == b""
    os.close(ours)


def test_results_on_the_same_terminal_have_no_bar_between_them() -> None:
    stdout, shown = count_on_terminal(BESIDE)
    assert stdout == "0\n" and "100%" in shown
    _, shown = count_on_terminal(BESIDE, results_too=True)
    assert shown.split() == ["0"]


class Clock:
    """The clock of a bar: each call of `advance` of a test moves it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    original = rich.progress.Progress.__init__

    def init(self: rich.progress.Progress, *columns: object, **options: object) -> None:
        original(self, *columns, **options, get_time=clock)  # type: ignore[arg-type]

    monkeypatch.setattr(rich.progress.Progress, "__init__", init)
    return clock


def test_a_long_operation_without_a_terminal_prints_a_line_a_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("encode", 1000, unit="sample") as advance:
        for _ in range(4):
            clock.seconds += 30
            advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "blockft: encode: 20%, 200/1,000 samples, 3.3 samples/s, 0:04:00 left",
        "blockft: encode: 40%, 400/1,000 samples, 3.3 samples/s, 0:03:00 left",
        "blockft: encode: 400/1,000 samples, 3.3 samples/s, 0:02:00 in all",
    ]


def test_a_long_operation_prints_at_most_100_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("encode", 10_000, unit="sample") as advance:
        for _ in range(10_000):
            clock.seconds += 60
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100 and lines[-1].endswith(" in all")


def test_a_short_operation_without_a_terminal_prints_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    items = track(range(3), "encode", unit="sample")
    assert [(setattr(clock, "seconds", 15 * item), item)[1] for item in items] == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_an_operation_that_fails_prints_no_last_line(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError), progress("encode", 2, unit="sample") as advance:
        clock.seconds += 100
        advance()
        raise ValueError
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("total", "unit", "amount", "is_estimate", "line"),
    [
        (None, "sample", 1, False, "1 sample, 100.0 s/sample, 0:01:40 so far"),
        (None, BYTE, 3e9, False, "3.0 GB, 30.0 MB/s, 0:01:40 so far"),
        (8e9, BYTE, 2e9, False, "25%, 2.0 GB/8.0 GB, 20.0 MB/s, 0:05:00 left"),
        (5000, "sample", 2500, True, "50%, 2,500/~5,000 samples, 25 samples/s, 0:01:40 left"),
        (1, "step", 1, False, "100%, 1/1 step, 100.0 s/step, 0:01:40 in all"),
    ],
)
def test_a_line_says_what_is_done_the_rate_and_the_time_left(
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    total: float | None,
    unit: str,
    amount: float,
    is_estimate: bool,
    line: str,
) -> None:
    with progress("do", total, unit=unit) as advance:
        if total is not None:
            advance.set_total(total, is_estimate=is_estimate)
        clock.seconds += 100
        advance(amount)
    assert capsys.readouterr().err.splitlines()[0] == f"blockft: do: {line}"


def test_a_total_may_become_known_and_a_note_follows(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("ask", unit="question") as advance:
        clock.seconds += 100
        advance.set_total(40)
        advance(10, note="1,200 tokens [/b]\x1b")
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("blockft: ask: 25%, 10/40 questions, ") and line.endswith(
        "left, 1,200 tokens [/b]\\u001b"
    )


def test_an_operation_inside_another_one_shows_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("outer", unit="sample"), progress("inner", unit="sample") as advance:
        clock.seconds += 100
        advance()
    assert "inner" not in capsys.readouterr().err
    with progress("next", unit="sample") as advance:
        clock.seconds += 100
        advance()
    assert "next" in capsys.readouterr().err


NARROW = """
import os, time
os.environ["COLUMNS"] = "60"
from blockft.progress import progress
with progress("a label that is long", 2000, unit="sample") as advance:
    for _ in range(3):
        time.sleep(0.11)
        advance(500)
"""


def test_a_bar_takes_one_line_of_a_narrow_terminal() -> None:
    _, shown = count_on_terminal(NARROW)
    drawings = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", shown)
    text = "".join(drawings)
    assert "samples/s" in text or "…" in text
    assert all(len(line) <= 60 for line in drawings)
