"""Closed, full and broken outputs, and terminals that are not UTF-8, end without a traceback."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import PYTHON_PATH, ROOT, TIMEOUT_S

SHELL = ["bash", "-o", "pipefail", "-c"]
BLOCKFT = shlex.join([sys.executable, "-m", "blockft"])


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command line; text is bytes, because it may be no UTF-8.

    $BLOCKFT is the program, and $PIPE the number of a pipe whose reader has gone.
    """
    reader, pipe = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [*SHELL, command.replace("$BLOCKFT", BLOCKFT).replace("$PIPE", str(pipe))],
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": PYTHON_PATH} | environment,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            pass_fds=[pipe],
        )
    finally:
        os.close(pipe)


@pytest.mark.parametrize(
    ("command", "code", "num_lines"),
    [
        ("$BLOCKFT config --schema >/dev/full", 2, 1),
        ("$BLOCKFT --help >/dev/full", 2, 1),
        ("$BLOCKFT config --schema >&$PIPE", 141, 0),
        ("$BLOCKFT --help >&$PIPE", 141, 0),
        ("$BLOCKFT config --schema >&-", 0, 0),
        ("$BLOCKFT config --schema 2>&-", 0, 0),
        ("$BLOCKFT config nonsense >&-", 2, 1),
        ("$BLOCKFT config nonsense 2>&-", 2, 0),
        ("$BLOCKFT config nonsense 2>/dev/full", 2, 0),
        ("$BLOCKFT config nonsense >&$PIPE 2>&1", 2, 0),
        ("$BLOCKFT config nonsense <&- >&- 2>&-", 2, 0),
        ("$BLOCKFT generate data/demo/model --input - <&-", 2, 1),
        ("$BLOCKFT generate data/demo/model --input - </dev/null", 2, 1),
    ],
)
def test_an_output_that_cannot_be_written_ends_without_a_traceback(
    command: str, code: int, num_lines: int
) -> None:
    done = shell(command)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == num_lines, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    if num_lines:
        assert done.stderr.startswith(b"blockft: ")


def test_a_closed_output_is_not_the_next_file_that_is_opened(tmp_path: Path) -> None:
    """A process without stdout gives its number to the first file that it opens."""
    code = (
        "import os, sys; from blockft.cli.streams import prepare_streams; prepare_streams();"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'printed'); print('printed')"
    )
    done = shell(f"{shlex.join([sys.executable, '-c', code])} >&-")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_a_terminal_without_utf_8_gets_escapes_that_json_can_read(
    environment: dict[str, str], tmp_path: Path
) -> None:
    text = "Z\u00fcr \u4e2d \U0001f600"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: m}}\ntrain: {{output_dir: r}}\ndata:\n  output_dir: o\n"
        f"  sources: [{{format: samples, path: p}}]\n  prompt: {{instruction: '{text}'}}\n",
        encoding="utf-8",
    )
    read_text = "json.load(sys.stdin)['data']['prompt']['instruction']"
    code = f"import json, sys; assert {read_text} == {ascii(text)}"
    read = shlex.join([sys.executable, "-X", "utf8", "-c", code])
    done = shell(f"$BLOCKFT config {recipe} --json | {read}", **environment)
    assert done.returncode == 0, done.stderr
    done = shell(f"$BLOCKFT config '{text}'", **environment)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "0"},
        {"COLUMNS": "-1"},
        {"COLUMNS": "wide"},
        {"LINES": "x", "TERM": "dumb"},
        {"TERM": "", "NO_COLOR": "1"},
        {"OMP_NUM_THREADS": "x"},
        {"TMPDIR": "/no/such"},
        {"HOME": "/no/such"},
        {"CUDA_VISIBLE_DEVICES": "x"},
        {"RANK": "x", "LOCAL_RANK": "x"},
        {"PYTHONWARNINGS": "error"},
    ],
    ids=str,
)
def test_nonsense_in_the_environment_is_no_traceback(environment: dict[str, str]) -> None:
    done = shell("$BLOCKFT config && $BLOCKFT recipes", **environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
