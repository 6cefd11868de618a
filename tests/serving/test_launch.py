"""The command of the server, the options that are refused, and its end."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from blockft.errors import UserError
from blockft.serving import launch
from blockft.serving.launch import RESERVED_OPTIONS, check_options, run_server, server_command
from blockft.serving.served_model import ServedModel
from tests.commands import wait_until
from tests.serving.stubs import make_served


@pytest.mark.parametrize("option", RESERVED_OPTIONS)
def test_reserved_options_are_refused_in_every_spelling(option: str) -> None:
    spellings = {option, f"{option}=1", option[:2] + option[2:].replace("-", "_"), f"{option}.key"}
    if option.startswith("--"):
        spellings.add(option[:-1])  # vLLM completes names
    for spelling in spellings:
        with pytest.raises(UserError, match="is not allowed"):
            check_options(["--port", "80", spelling, "1"])


def test_other_options_are_passed_on(tmp_path: Path) -> None:
    options = ["--port", "80", "--max-model-len=4096", "--served-model-name", "tensor-parallel-size"]
    check_options(options)
    command = server_command(make_served(tmp_path), tmp_path / "file", options)
    assert command[-len(options) :] == options
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_load_failure_policy"] == "fail"
    assert transfer["kv_connector_extra_config"] == {"served_model": str(tmp_path / "file")}
    assert command[command.index("--dtype") + 1] == "float32"


def test_the_secret_is_in_a_private_file_and_not_in_the_command(tmp_path: Path) -> None:
    served, file = make_served(tmp_path), tmp_path / "served.json"
    served.save(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert ServedModel.load(file) == served
    assert not any(served.secret in word for word in server_command(served, file, []))


def test_the_file_of_the_model_keeps_every_bit_of_its_frequencies(tmp_path: Path) -> None:
    served = make_served(tmp_path)
    served.save(tmp_path / "served.json")
    pairs = zip(ServedModel.load(tmp_path / "served.json").rotaries, served.rotaries, strict=True)
    assert all(bool((a.inv_freq == b.inv_freq).all()) for a, b in pairs)


SCRIPT = """
import os, signal, sys, time
def end(*_): sys.exit(7)
signal.signal(signal.SIGTERM, end)
assert os.path.exists(os.environ["BLOCKFT_SERVED_MODEL"])
open(sys.argv[1], "w").close()
time.sleep(float(sys.argv[2]))
sys.exit(3)
"""


def run_script(monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: float) -> int:
    command = [sys.executable, "-c", SCRIPT, str(folder / "started"), str(seconds)]
    monkeypatch.setattr(launch, "server_command", lambda *_: command)
    return run_server(make_served(folder), folder, [])


def test_the_exit_code_is_that_of_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_script(monkeypatch, tmp_path, 0) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_the_server_is_created_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    """Nobody would know its process otherwise, and it would go on with the memory of the GPU."""
    processes: list[subprocess.Popen[bytes]] = []

    class InterruptedPopen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            processes.append(self)
            wait_until((tmp_path / "started").exists)
            signal.raise_signal(number)

    before = signal.signal(number, signal.default_int_handler)
    try:
        monkeypatch.setattr(subprocess, "Popen", InterruptedPopen)
        with pytest.raises(KeyboardInterrupt):
            run_script(monkeypatch, tmp_path, 3600)
        assert processes[0].returncode == 7
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
        processes[0].kill()


def test_an_interruption_ends_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A signal to this process could be lost in a callback of its garbage collector."""
    wait = subprocess.Popen.wait
    processes: list[subprocess.Popen[bytes]] = []

    def interrupt_first(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if processes:
            return wait(process, timeout)
        processes.append(process)
        wait_until((tmp_path / "started").exists)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupt_first)
    with pytest.raises(KeyboardInterrupt):
        run_script(monkeypatch, tmp_path, 3600)
    assert processes[0].returncode == 7


HANGING = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
with open(sys.argv[1] + "-part", "w") as file:
    file.write(str(worker.pid))
os.rename(sys.argv[1] + "-part", sys.argv[1])
time.sleep(3600)
"""


@pytest.mark.parametrize("is_interrupted_again", [False, True])
def test_a_server_that_does_not_end_is_killed_with_its_processes(
    is_interrupted_again: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM ignores SIGTERM for a part of its start."""
    started = tmp_path / "started"

    class InterruptedPopen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            wait_until(started.exists)
            signal.raise_signal(signal.SIGINT)

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None and is_interrupted_again:
                raise KeyboardInterrupt
            return super().wait(timeout)

    command = [sys.executable, "-c", HANGING, str(started)]
    monkeypatch.setattr(launch, "server_command", lambda *_: command)
    monkeypatch.setattr(launch, "STOP_TIMEOUT_S", 0.1)
    monkeypatch.setattr(subprocess, "Popen", InterruptedPopen)
    with pytest.raises(KeyboardInterrupt):
        run_server(make_served(tmp_path), tmp_path, [])
    pid = int(started.read_text())
    wait_until(lambda: not _is_running(pid))


def _is_running(pid: int) -> bool:
    """Return whether a process runs. One that has ended and that nobody waits for is a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
