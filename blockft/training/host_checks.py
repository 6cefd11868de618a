"""Compare the hosts of a run: same versions, code, data and model, one network, one file system."""

import json
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from blockft.errors import UserError
from blockft.training.host_probe import ProbeRequest
from blockft.training.hosts import Hosts, read_environment_files, run_on_hosts
from blockft.training.package_facts import describe_difference
from blockft.training.preflight import MAX_CLOCK_SKEW_S, Check, Status, run_checks
from blockft.units import format_count

REACHABLE = "hosts"
"""Name of the check that every other check of hosts needs."""

PROBE_S = 50
"""Time limit of the check that asks all hosts."""

Answers = dict[str, dict[str, Any]]
"""What each host has told, by its name in the hostfile and in its order."""


def build_host_checks(
    hosts: Hosts, *, data_dir: str | None, model: str | None, output_dir: str | None
) -> list[Check]:
    """Return the checks of the hosts of a run; the first one asks all hosts at the same time.

    `data_dir`, `model` (a folder) and `output_dir` are compared between the hosts unless they are None.
    """
    answers: Answers = {}
    request = ProbeRequest(
        num_hosts=len(hosts.slots),
        master_addr=hosts.master_addr,
        master_port=hosts.master_port,
        data_dir=data_dir,
        model=model,
        output_dir=output_dir,
        token=f"blockft-{secrets.token_hex(6)}",
    )

    def ask() -> str:
        answers.update(ask_hosts(hosts, request))
        return f"{format_count(len(answers), 'host')} can be reached by ssh and pdsh"

    def add(name: str, check: Callable[[], str]) -> None:
        checks.append(Check(name=name, run=check, needs=[REACHABLE]))

    checks = [Check(name=REACHABLE, run=ask, seconds=PROBE_S + 5)]
    add("different hosts", partial(_check_different, answers))
    add("versions on all hosts", partial(_compare_versions, answers))
    if data_dir is not None:
        add("data on all hosts", partial(_compare, answers, "data", f"the prepared data {data_dir}"))
    if model is not None:
        add("model on all hosts", partial(_compare, answers, "model", f"the model {model}"))
    add("master port", partial(_check_port, answers, request))
    add("network", partial(_check_network, answers, request))
    add("clocks", partial(_compare_clocks, answers))
    if output_dir is not None:
        add("shared folder", partial(_check_shared, answers, output_dir))
    return checks


def check_hosts(hosts: Hosts, *, data_dir: str | None, model: str | None) -> None:
    """Check the hosts before a run is started on them.

    Raises:
        UserError: a check fails; the message is the first one's.
    """
    for result in run_checks(build_host_checks(hosts, data_dir=data_dir, model=model, output_dir=None)):
        if result.status is not Status.ok:
            raise UserError(result.message)


def ask_hosts(hosts: Hosts, request: ProbeRequest) -> Answers:
    """Return what every host tells about itself.

    Raises:
        UserError: a host cannot be reached, lacks this directory or this Python, or does not answer in time.
    """
    directory, python = os.getcwd(), sys.executable
    # DeepSpeed adds the working directory to PYTHONPATH on every host, too
    path = ":".join(filter(None, [directory, os.environ.get("PYTHONPATH", "")]))
    exports = {"PYTHONPATH": path} | read_environment_files()
    parts = [
        f"cd {shlex.quote(directory)}",
        f"test -x {shlex.quote(python)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f"exec {shlex.quote(python)} -m blockft.training.host_probe {request.encode()} ",
    ]
    command = " && ".join(parts).replace("%", "%%") + "%n"  # pdsh replaces %n by the place of the host
    output = run_on_hosts(hosts, command, timeout_s=PROBE_S)
    answers: Answers = {}
    names = list(hosts.slots)
    for line in output.stdout.splitlines():
        # pdsh may shorten the name of a host, and the start-up files of a shell may print other lines
        with suppress(ValueError, KeyError):
            answer = json.loads("{" + line.partition(": {")[2])
            answers[names[answer["index"]]] = answer
    if failed := output.failed_hosts or [host for host in hosts.slots if host not in answers]:
        how = "did not answer in time" if output.is_late else "cannot be used"
        reason = output.reason(failed[0])
        raise UserError(
            f"{_join(failed)} {how}: it must allow ssh without a password and have the directory {directory} "
            f"and the Python {python} with blockft" + (f"; its message: {reason}" if reason else "")
        )
    return {host: answers[host] for host in hosts.slots}


def _check_different(answers: Answers) -> str:
    names: dict[str, str] = {}
    for host, answer in answers.items():
        first = names.setdefault(answer["identity"], host)
        if first != host and answer["identity"]:
            raise UserError(
                f"{first} and {host} are the same host: give it one line in the hostfile, with the number of "
                "all its processes as slots"
            )
    return f"{format_count(len(answers), 'line')} of the hostfile, as many hosts"


def _compare_versions(answers: Answers) -> str:
    (reference, first), *others = answers.items()
    for host, answer in others:
        if text := describe_difference(answer["facts"], first["facts"], owner=host, reference=reference):
            raise UserError(text)
    return "; ".join(f"{name} {value}" for name, value in first["facts"].items())


def _compare(answers: Answers, key: str, what: str) -> str:
    for host, answer in answers.items():
        if answer[key].startswith("missing: "):
            raise UserError(
                f"{host} lacks {what} ({answer[key].removeprefix('missing: ')}): copy it to every host, or "
                "put it on a file system that all hosts share"
            )
    reference, *others = answers
    if different := [host for host in others if answers[host][key] != answers[reference][key]]:
        raise UserError(
            f"{what} on {_join(different)} differs from that on {reference}: copy it to every host, or put "
            "it on a file system that all hosts share"
        )
    return f"{what} is the same"


def _check_port(answers: Answers, request: ProbeRequest) -> str:
    host, first = next(iter(answers.items()))
    if first["network_error"]:
        raise UserError(f"{first['network_error']} on {host}: choose another with --master-port")
    return f"port {request.master_port} of {host} is free"


def _check_network(answers: Answers, request: ProbeRequest) -> str:
    reference, *others = answers
    if answers[reference]["network_error"]:
        raise UserError("the master port of the first host is in use, so that no host could connect to it")
    address = f"{request.master_addr}:{request.master_port}"
    if cut := [host for host in others if answers[host]["network_error"]]:
        raise UserError(
            f"{_join(cut)} cannot reach {address} ({answers[cut[0]]['network_error']}): open this port in "
            "the firewall, or give the address of the first host that all others reach with --master-addr"
        )
    for host, answer in answers.items():
        for variable, value in answer["variables"].items():
            # NCCL and Gloo take lists; NCCL also takes prefixes and exclusions
            names = [name.lstrip("=") for name in value.split(",") if not name.startswith("^")]
            known = answer["interfaces"]
            if names and not any(have.startswith(name) for name in names for have in known):
                raise UserError(
                    f"{variable} is {value} on {host}, which has only {', '.join(known)}: correct it there "
                    "or in .deepspeed_env"
                )
    interfaces = ", ".join(f"{host} {answer['interface'] or '-'}" for host, answer in answers.items())
    variables: Mapping[str, str] = answers[reference]["variables"]
    given = ", ".join(f"{name}={value}" for name, value in variables.items())
    return f"every host reaches {address}; interfaces: {interfaces}" + (f" ({given})" if given else "")


def _compare_clocks(answers: Answers) -> str:
    reference, *others = answers
    clocks = {host: answer["clock_s"] for host, answer in answers.items()}
    # hosts are asked at the same time, but may start to answer some seconds apart
    if wrong := [host for host in others if abs(clocks[host] - clocks[reference]) > MAX_CLOCK_SKEW_S]:
        raise UserError(
            f"the clock of {wrong[0]} differs from that of {reference} by "
            f"{abs(clocks[wrong[0]] - clocks[reference]):.0f} s: synchronize the clocks (chrony, ntp)"
        )
    return f"the clocks differ by at most {max(clocks.values()) - min(clocks.values()):.0f} s"


def _check_shared(answers: Answers, output_dir: str) -> str:
    names = list(answers)
    for host, answer in answers.items():
        if answer["shared"]["error"]:
            raise UserError(f"on {host} {answer['shared']['error']}")
    for host, answer in answers.items():
        if missing := answer["shared"]["missing"]:
            raise UserError(
                f"{host} does not see the files that {names[missing[0]]} writes beside {output_dir}: put "
                "train.output_dir on a file system that all hosts share"
            )
    return f"all hosts see each other's files beside {output_dir}"


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
