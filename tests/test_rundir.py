"""Output folders that appear whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockft.rundir import whole_folder

WRITER = """
import sys, time
from pathlib import Path
from blockft.rundir import whole_folder
with whole_folder(Path(sys.argv[1])) as draft:
    (draft / "half").touch()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_finished_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writers = []
    for _ in range(2):
        writers.append(subprocess.Popen([sys.executable, "-c", WRITER, out], stdout=subprocess.PIPE))
        assert writers[-1].stdout and writers[-1].stdout.readline() == b"writing\n"
    killed, alive = writers
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 2
    with whole_folder(out) as draft:
        (draft / "done").touch()
    assert [path.name for path in out.iterdir()] == ["done"]
    (others,) = (path for path in tmp_path.iterdir() if path != out)
    assert others.name.startswith(".out.") and (others / "half").exists()
    alive.terminate()
    alive.wait()


def test_on_an_error_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as draft:
        (draft / "half").touch()
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
