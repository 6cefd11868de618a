"""Output folders that appear whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockft.errors import UserError
from blockft.rundir import partial_folder, whole_folder

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


def test_a_partial_folder_is_found_again_by_who_makes_the_same(tmp_path: Path) -> None:
    out, facts = tmp_path / "deep" / "out", {"model": "m", "limit": 3}
    with pytest.raises(ZeroDivisionError), partial_folder(out, facts) as partial:
        (partial / "kept").write_text("x")
        with pytest.raises(UserError, match="another process"), partial_folder(out, facts):
            pass
        raise ZeroDivisionError
    with (
        pytest.raises(UserError, match=r"begun otherwise \(limit: 3, not 4\)"),
        partial_folder(out, facts | {"limit": 4}),
    ):
        pass
    with partial_folder(out, facts) as partial:
        assert (partial / "kept").read_text() == "x"
    assert not list(out.parent.iterdir())
