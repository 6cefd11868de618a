"""Output folders and files appear complete or not at all, and only one process writes them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from blockft.errors import UserError
from blockft.outputs import (
    SIGNATURE,
    atomic_folder,
    check_writable,
    resumable_folder,
    save_figure,
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


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_files_of_an_atomic_folder_follow_the_umask(tmp_path: Path, umask: int, expected: int) -> None:
    """Also those of safetensors, which only their owner could read."""
    out = tmp_path / "out"
    old = os.umask(umask)
    try:
        with atomic_folder(out) as draft:
            (draft / "inner").mkdir()
            (draft / "text").write_text("x")
            save_file({"x": np.zeros(1)}, draft / "inner" / "x.safetensors")
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == {expected}
    assert {path.stat().st_mode & 0o777 for path in (out, out / "inner")} == {0o777 & ~umask}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as draft:
        (draft / "half").touch()
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_resumable_folder_is_found_again_by_a_call_with_the_same_signature(tmp_path: Path) -> None:
    out, signature = tmp_path / "deep" / "out", {"model": "m", "limit": 3}
    with pytest.raises(ZeroDivisionError), resumable_folder(out, signature) as partial:
        (partial / "kept").write_text("x")
        with pytest.raises(UserError, match="another process"), resumable_folder(out, signature):
            pass
        raise ZeroDivisionError
    with (
        pytest.raises(UserError, match=r"started with other settings \(limit: 3, not 4\)"),
        resumable_folder(out, signature | {"limit": 4}),
    ):
        pass
    with resumable_folder(out, signature) as partial:
        assert (partial / "kept").read_text() == "x"
    assert not list(out.parent.iterdir())


def test_a_resumable_folder_with_a_damaged_signature_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    for damaged in (b"{", b"7", b"\xff"):
        (partial / SIGNATURE).write_bytes(damaged)
        with (
            pytest.raises(
                UserError,
                match=rf"{partial} is damaged \(signature.json .*: remove the folder to start again",
            ),
            resumable_folder(tmp_path / "out", {}),
        ):
            pass
    assert partial.exists()


def test_a_file_that_cannot_be_written_is_refused_before_and_after_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "fifo")
    places = {
        tmp_path: "it is a folder",
        Path("."): "it is a folder",
        tmp_path / "fifo": "it is not a regular file",
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


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_resumable_folder_with_files_of_unknown_settings_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "answers-block.jsonl").write_text("{}\n")
    with (
        pytest.raises(UserError, match="settings are unknown: remove the folder"),
        resumable_folder(tmp_path / "out", {"model": "m"}),
    ):
        pass
    assert (partial / "answers-block.jsonl").read_text() == "{}\n"


def test_a_resumable_folder_outlives_a_kill_while_its_signature_is_written(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / f".{SIGNATURE}.123").write_text("{")
    with resumable_folder(tmp_path / "out", {"model": "m"}) as folder:
        assert (folder / SIGNATURE).is_file()
