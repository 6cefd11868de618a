"""Commands in processes of their own, several at once, for tests of launched runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from blockft.outputs import read_metrics

ROOT = Path(__file__).parents[2]

LIMIT_S = 240
"""Of each command: many times what it takes where nothing hangs, for machines may be busy."""


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def start(
    *words: str | Path, cwd: Path = ROOT, inside: str = "", **environment: str
) -> subprocess.Popen[str]:
    """`python -m WORDS`, asked to stop when it takes too long; `inside` is a network namespace."""
    timeout = shutil.which("timeout")
    assert timeout
    command = [timeout, "-k", "60", str(LIMIT_S), sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(
        (["ip", "netns", "exec", inside] if inside else []) + command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=cwd,
    )


def finish(*started: subprocess.Popen[str]) -> list[str]:
    """What they said; all must have succeeded."""
    said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
    return said


def alone(node_rank: int, hostfile: Path, port: int) -> list[str]:
    """The options that start one host of a file, all of which are this machine."""
    where = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return ["--hostfile", str(hostfile), "--no-ssh", "--node-rank", str(node_rank), *where]
