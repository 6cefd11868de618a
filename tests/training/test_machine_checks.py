"""What is wrong with this machine is said with the remedy."""

import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blockft.errors import UserError
from blockft.printable import print_text
from blockft.training import machine_checks
from blockft.training.machine_checks import build_machine_checks, check_compiler, check_folder, check_packages
from blockft.training.preflight import Status, run_checks


def test_this_machine_passes(tmp_path: Path) -> None:
    slow = {"DeepSpeed operator", "GPUs", "GPU memory", "communication"}
    checks = [check for check in build_machine_checks([tmp_path / "out"]) if check.name not in slow]
    results = list(run_checks([replace(check, seconds=600) for check in checks]))
    failed = [result for result in results if result.status is not Status.ok]
    # a machine of developers may be full
    assert not [result for result in failed if "free space" not in result.message]
    assert not any(tmp_path.iterdir())


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "requires", lambda name: ["torch>=99", "dev-only; extra == 'dev'"])
    with pytest.raises(UserError, match=r"^torch is .*, blockft needs >=99: pip install 'torch>=99'$"):
        check_packages()
    monkeypatch.setattr(machine_checks, "requires", lambda name: ["no-such-package>1"])
    with pytest.raises(UserError, match="no-such-package is missing: pip install 'no-such-package>1'"):
        check_packages()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler, which DeepSpeed needs"):
        check_compiler()


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    assert "are free" in check_folder(tmp_path / "a" / "b", 1)
    with pytest.raises(UserError, match="of free space, less than"):
        check_folder(tmp_path / "a", 2**62)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no folder"):
        check_folder(tmp_path / "file" / "a", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "link").symlink_to("/nowhere/scratch")
    for path in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(UserError, match="link is a link to /nowhere/scratch, which does not exist"):
            check_folder(path, 1)


def test_small_shared_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26))
    with pytest.raises(UserError, match=r"has only 64.0 MiB: start the container with --shm-size=8g"):
        machine_checks.check_shared_memory(tmp_path)


def test_memory_is_shown_in_the_units_of_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "use_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    memory = next(check for check in build_machine_checks([]) if check.name == "GPU memory")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (79 * 2**30, 80 * 2**30))
    assert memory.run() == "79.0 GiB are free on every GPU"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2 * 2**30, 80 * 2**30))
    with pytest.raises(UserError, match=r"GPU 0 has 2.0 GiB of 80.0 GiB free"):
        memory.run()


def test_a_gpu_that_torch_does_not_see_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "use_cpu", lambda: True)
    monkeypatch.setattr(machine_checks.shutil, "which", lambda name, path=None: "/bin/nvidia-smi")
    for cuda, message in ((None, "is built without CUDA"), ("13.0", "sees no GPU, although a driver")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        gpus = next(check for check in build_machine_checks([]) if check.name == "GPUs")
        with pytest.raises(UserError, match=message):
            gpus.run()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_user_without_a_home_folder_is_told_which_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    checks = [check for check in build_machine_checks([]) if check.name.startswith("cache ")]
    results = {result.name: result for result in run_checks(checks)}
    assert results["cache TRITON_CACHE_DIR"].message == (
        "this user has no home folder: set HOME, or TRITON_CACHE_DIR to a folder"
    )
    assert "no home" not in results["cache HF_HOME"].message


def test_remarks_of_a_compilation_are_printed_before_it_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys, time; print('noise\\nblockft: waiting for it', file=sys.stderr, flush=True); "
    assert machine_checks.run_compiler([sys.executable, "-c", code]) == "compiled"
    assert capsys.readouterr().err == "blockft: waiting for it\n"
    with pytest.raises(UserError, match="cannot be compiled \\(SystemExit: no g|cannot be compiled \\(no g"):
        machine_checks.run_compiler([sys.executable, "-c", code + "sys.exit('no g++')"])
    has_printed = threading.Event()

    class TimerThatEndsAfterTheRemark(threading.Timer):
        def run(self) -> None:
            has_printed.wait(600)
            super().run()

    def print_and_tell(*arguments: Any, **options: Any) -> None:
        print_text(*arguments, **options)
        has_printed.set()

    monkeypatch.setattr(machine_checks, "print_text", print_and_tell)
    monkeypatch.setattr(machine_checks.threading, "Timer", TimerThatEndsAfterTheRemark)
    monkeypatch.setattr(machine_checks, "COMPILE_S", 1)
    with pytest.raises(UserError, match="was not compiled within 1 s; waiting for it"):
        machine_checks.run_compiler([sys.executable, "-c", code + "time.sleep(3600)"])
