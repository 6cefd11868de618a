"""Hosts that differ, or that cannot reach each other, are named with what to do, before anything starts."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockft.errors import UserError
from blockft.training import host_checks, host_probe
from blockft.training.host_checks import build_host_checks, check_hosts
from blockft.training.host_probe import ProbeRequest, probe
from blockft.training.hosts import Hosts
from blockft.training.preflight import Status, run_checks
from tests.commands import free_port


def make_hosts(port: int = 1) -> Hosts:
    slots = {"a.site": 1, "b.site": 1, "c.site": 1}
    return Hosts(
        file=Path("hosts"),
        slots=slots,
        master_addr="127.0.0.1",
        master_port=port,
        ssh_port=None,
        node_rank=None,
    )


def install_pdsh(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    fake = folder / "pdsh"
    fake.write_text(f"#!/bin/bash\n{body}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


RUN_ON_THREE = """
command="${@: -1}"
for i in 0 1 2; do
  name=$(echo abc | cut -c $((i + 1)))
  echo "$name: Loaded modules: {gcc/12.2, cuda/13}"
  own=$(echo "$command" | sed "s/%n/$i/g; s/%%/%/g; s,-m blockft.training.host_probe,PROBE,")
  bash -c "$own" 2> >(sed "s/^/$name: /" >&2) | sed "s/^/$name: /" &
done
wait
"""
"""A pdsh that runs a command three times on this machine, whose shells greet, and shortens names of hosts."""

PATIENT_PROBE = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
from blockft.training import host_probe

def sleep(seconds):
    if seconds != host_probe.SHARED_GRACE_S:
        time.sleep(seconds)
        return
    folder = Path(__file__).parent
    (folder / f"has-seen-{sys.argv[2]}").touch()
    deadline = time.monotonic() + 600
    while len(list(folder.glob("has-seen-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)

host_probe.CONNECT_S = host_probe.SHARED_S = 600
host_probe.time = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=sleep)
request = host_probe.ProbeRequest.decode(sys.argv[1])
print(json.dumps(host_probe.probe(request, int(sys.argv[2]))), flush=True)
"""
"""The probe of hosts that may start minutes apart, on a machine that is slow for a while."""


def test_a_host_with_three_names_passes_every_other_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_script = tmp_path / "probe.py"
    probe_script.write_text(PATIENT_PROBE)
    install_pdsh(tmp_path, monkeypatch, RUN_ON_THREE.replace("PROBE", str(probe_script)))
    monkeypatch.setattr(host_checks, "PROBE_S", 900)
    monkeypatch.setattr(host_checks, "MAX_CLOCK_SKEW_S", 900)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    (tmp_path / "model").mkdir()
    checks = build_host_checks(
        make_hosts(free_port()),
        data_dir=str(tmp_path / "data"),
        model=str(tmp_path / "model"),
        output_dir=str(tmp_path / "out" / "run"),
    )
    results = list(run_checks(checks))
    (failed,) = [result for result in results if result.status is not Status.ok]
    assert len(results) == 9 and failed.name == "different hosts"
    assert failed.message.startswith("a.site and b.site are the same host: give it one line in the hostfile")
    assert not list(tmp_path.glob(".blockft*"))


@pytest.mark.parametrize(
    ("body", "seconds", "message"),
    [
        (
            "echo 'b.site: Permission denied (publickey).' >&2\n"
            "echo 'pdsh@me: b.site: ssh exited with exit code 255' >&2; exit 255",
            600,
            r"^b\.site cannot be used: it must allow ssh .* its message: b\.site: Permission denied",
        ),
        ("exec sleep 3600", 2, r"^a\.site, b\.site, c\.site did not answer in time"),
        ("echo 'pdsh: not today' >&2; exit 1", 600, "its message: pdsh: not today"),
    ],
)
def test_a_host_that_cannot_be_reached_is_named(
    body: str, seconds: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_pdsh(tmp_path, monkeypatch, body)
    monkeypatch.setattr(host_checks, "PROBE_S", seconds)
    with pytest.raises(UserError, match=message):
        check_hosts(make_hosts(), data_dir=None, model=None)


def answers(change: Callable[[dict[str, Any]], object]) -> dict[str, dict[str, Any]]:
    """The answers of three equal hosts, after a change of those of the second host."""
    equal = {
        "facts": {"Python": "3.12", "torch": "2.11.0", "the code of blockft": "1a"},
        "data": "2b",
        "model": "3c",
        "network_error": "",
        "interface": "eth0",
        "interfaces": ["eth0", "lo"],
        "variables": {},
        "clock_s": 1e9,
        "shared": {"error": "", "missing": []},
    }
    found: dict[str, dict[str, Any]] = {name: json.loads(json.dumps(equal)) for name in ("a", "b", "c")}
    for name, answer in found.items():
        answer["identity"] = f"of {name}"
    change(found["b"])
    return found


def set_value(*path: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(answer: dict[str, Any]) -> None:
        for key in path[:-1]:
            answer = answer[key]
        answer[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (
            set_value("facts", "torch", value="2.12.0"),
            "versions on all hosts",
            "b has torch 2.12.0, but a has 2.11",
        ),
        (
            set_value("facts", "Python", value="3.11"),
            "versions on all hosts",
            "b has Python 3.11, but a has 3.12",
        ),
        (
            set_value("facts", "the code of blockft", value="9"),
            "versions on all hosts",
            "different files of the",
        ),
        (
            set_value("data", value="9"),
            "data on all hosts",
            "the prepared data D on b differs from that on a",
        ),
        (set_value("identity", value="of a"), "different hosts", "a and b are the same host: give it one"),
        (set_value("data", value="missing: D"), "data on all hosts", "b lacks the prepared data D"),
        (set_value("model", value="9"), "model on all hosts", "the model M on b differs from that on a"),
        (set_value("network_error", value="No route"), "network", r"b cannot reach 127.0.0.1:1 \(No route\)"),
        (
            set_value("variables", "GLOO_SOCKET_IFNAME", value="ib0"),
            "network",
            "GLOO_SOCKET_IFNAME is ib0 on b, which has only eth0, lo",
        ),
        (set_value("clock_s", value=1e9 + 100), "clocks", "the clock of b differs from that of a by 100 s"),
        (set_value("shared", "error", value="out is read-only"), "shared folder", "on b out is read-only"),
        (
            set_value("shared", "missing", value=[0]),
            "shared folder",
            "b does not see the files that a writes",
        ),
    ],
)
def test_a_host_that_differs_is_named_by_one_check(
    change: Callable[[dict[str, Any]], object], check: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_checks, "ask_hosts", lambda hosts, request: answers(change))
    results = list(run_checks(build_host_checks(make_hosts(), data_dir="D", model="M", output_dir="out")))
    (failed,) = [result for result in results if result.status is not Status.ok]
    assert failed.name == check
    with pytest.raises(UserError, match=message):
        raise UserError(failed.message)


def test_a_master_port_in_use_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answers(lambda answer: None)
    found["a"]["network_error"] = "port 1 is in use (Address already in use)"
    monkeypatch.setattr(host_checks, "ask_hosts", lambda hosts, request: found)
    results = list(run_checks(build_host_checks(make_hosts(), data_dir=None, model=None, output_dir=None)))
    failed = {result.name: result.message for result in results if result.status is Status.failed}
    assert (
        "port 1 is in use (Address already in use) on a: choose another with --master-port" in failed.values()
    )


def test_a_probe_reports_a_port_in_use_and_an_address_without_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_probe, "CONNECT_S", 0.5)
    request = ProbeRequest(
        num_hosts=2,
        master_addr="127.0.0.1",
        master_port=free_port(),
        data_dir="nowhere",
        model=None,
        output_dir=None,
        token="t",
    )
    assert ProbeRequest.decode(request.encode()) == request
    found = probe(request, 1)
    assert found["network_error"] == "Connection refused" and found["data"].startswith("missing: ")
    import socket

    with socket.create_server(("", request.master_port)):
        assert "is in use" in probe(request, 0)["network_error"]


def test_the_probe_imports_no_heavy_package() -> None:
    import subprocess

    code = "import sys, blockft.training.host_probe; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
