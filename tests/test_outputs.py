"""Output folders that appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from blockft.errors import UserError
from blockft.outputs import (
    METRICS,
    SIGNATURE,
    atomic_folder,
    check_writable,
    read_metrics,
    resumable_folder,
    save_figure,
    truncate_metrics,
    write_atomic,
)

WRITER = """
import sys, time
from pathlib import Path
from blockft.outputs import atomic_folder
with atomic_folder(Path(sys.argv[1])) as draft:
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
    with atomic_folder(out) as draft:
        (draft / "done").touch()
    assert [path.name for path in out.iterdir()] == ["done"]
    (others,) = (path for path in tmp_path.iterdir() if path != out)
    assert others.name.startswith(".out.") and (others / "half").exists()
    alive.terminate()
    alive.wait()


def test_on_an_error_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as draft:
        (draft / "half").touch()
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_partial_folder_is_found_again_by_who_makes_the_same(tmp_path: Path) -> None:
    out, facts = tmp_path / "deep" / "out", {"model": "m", "limit": 3}
    with pytest.raises(ZeroDivisionError), resumable_folder(out, facts) as partial:
        (partial / "kept").write_text("x")
        with pytest.raises(UserError, match="another process"), resumable_folder(out, facts):
            pass
        raise ZeroDivisionError
    with (
        pytest.raises(UserError, match=r"begun otherwise \(limit: 3, not 4\)"),
        resumable_folder(out, facts | {"limit": 4}),
    ):
        pass
    with resumable_folder(out, facts) as partial:
        assert (partial / "kept").read_text() == "x"
    assert not list(out.parent.iterdir())


def test_a_partial_folder_whose_facts_are_damaged_is_named(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    for damaged in (b"{", b"7", b"\xff"):
        (partial / SIGNATURE).write_bytes(damaged)
        with (
            pytest.raises(UserError, match=f"facts.json is damaged: remove {partial}"),
            resumable_folder(tmp_path / "out", {}),
        ):
            pass
    assert partial.exists()


def test_a_file_that_cannot_be_written_is_named_before_and_after_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "fifo")
    places = {
        tmp_path: "it is a folder",
        Path("."): "it is a folder",
        tmp_path / "fifo": "it is no file",
        tmp_path / "none" / "file": f"there is no folder {tmp_path / 'none'}",
        tmp_path / "file" / "file": "there is no folder",
        tmp_path / ("x" * 300): "File name too long",
        Path("/proc/file"): "",
    }
    for path, reason in places.items():
        with pytest.raises(UserError, match=f"{path} cannot be written: {reason}"):
            check_writable(path)
        with pytest.raises(UserError, match=f"{path} cannot be written: {reason}"):
            save_figure(Figure(), path)
    for path in (tmp_path / "none" / "file", Path("/proc/file")):
        with pytest.raises(UserError, match=f"{path} cannot be written: "):
            write_atomic(path, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file"]


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    for text in ("old", "new"):
        check_writable(file)
        write_atomic(file, text)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="No space left"):
        patched.setattr(Path, "replace", full_disk)
        write_atomic(file, "newer")
    assert file.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["file"]


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_metrics_are_cut_to_what_is_not_logged_again(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 0.1}', '{"step": 1, "eval_loss_block": 0.2}', '{"step": 2, "loss": 0.3}']
    for eval_due, kept in ((False, 2), (True, 1)):
        (tmp_path / METRICS).write_text("\n".join([*lines, '{"step": 3, "lo']))
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 1, 2], "cut short by a kill"
        truncate_metrics(tmp_path, last_step=1, eval_due=eval_due)
        assert (tmp_path / METRICS).read_text().splitlines() == lines[:kept]
