"""The hosts of a run: read a hostfile, check its options, and reach the hosts through pdsh."""

import os
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blockft.errors import UserError
from blockft.inputs import find_home, read_text, shorten
from blockft.training.library_internals import launcher_pattern
from blockft.training.rank_watch import RankPlace

PDSH_FAILURE = re.compile(r"pdsh@[^:]*: (\S+): ssh exited with exit code (\d+)")
"""Line that pdsh writes to stderr as soon as the command of a host fails: host and exit code."""

SSH_FAILED = 255
"""Exit code of ssh if the connection to a host fails, or a signal ends the command."""

DEFAULT_PORT = 29500
"""Port of the first host at which the ranks connect, as in DeepSpeed."""

ENVIRONMENT = ".deepspeed_env"
"""File of NAME=VALUE lines that DeepSpeed exports on every host, in the home or working directory."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts of a run, the number of processes on each, and the address at which the ranks connect.

    `slots` maps a host to its number of processes, in the order of the file. `node_rank` is this host's index
    in the file if every host starts its own processes; if it is None, this host starts all through pdsh.
    """

    file: Path
    slots: dict[str, int]
    master_addr: str
    master_port: int
    ssh_port: int | None
    node_rank: int | None

    @property
    def num_processes(self) -> int:
        return sum(self.slots.values())

    @property
    def place(self) -> RankPlace:
        """The place of this host among the hosts, each of which starts its ranks itself."""
        assert self.node_rank is not None
        return RankPlace(
            rank=self.node_rank,
            node=self.node_rank,
            num_ranks=len(self.slots),
            address=self.master_addr,
            port=self.master_port,
            noun="node",
        )


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of processes by host, in the order of the file, as DeepSpeed reads it.

    Raises:
        UserError: the file cannot be read, a line is malformed, or a host is listed twice or has no slots.
    """
    lines = read_text(path, "the hostfile").splitlines()
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.split("#", 1)[0].strip()
        if not entry:
            continue
        # a plain name only: pdsh reads ranges and exclusions into other characters
        match = re.fullmatch(r"(\w[\w.@-]*)\s+slots=([1-9]\d{0,5})", entry)
        if not match:
            raise UserError(
                f"{path}, line {number} is {shorten(line.strip())!r}: write a host and its number of "
                "processes, for example node0 slots=8"
            )
        if match[1] in slots:
            raise UserError(f"{path}, line {number} names {match[1]} again: give each host one line")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"the hostfile {path} names no host: write lines such as node0 slots=8")
    return slots


def resolve_hosts(
    file: Path | None,
    *,
    num_gpus: int | None,
    no_ssh: bool,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    ssh_port: int | None,
) -> Hosts | None:
    """Return the hosts of a hostfile, or None without one, after all checks that this machine can do.

    The arguments are the options of `blockft train`.

    Raises:
        UserError: see `read_hostfile`; options do not fit together; this process is already a worker; pdsh is
            missing; the address of the first host is unknown here; the port is in use.
    """
    if file is None:
        options = {
            "--no-ssh": no_ssh or None,
            "--node-rank": node_rank,
            "--master-addr": master_addr,
            "--master-port": master_port,
            "--ssh-port": ssh_port,
        }
        if given := [name for name, value in options.items() if value is not None]:
            raise UserError(f"{given[0]} says how hosts are started: name the hosts with --hostfile")
        return None
    if "RANK" in os.environ:
        raise UserError("RANK is set, so this process is already a worker of a run: leave out --hostfile")
    if num_gpus is not None:
        raise UserError(f"--num-gpus is for one machine: {file} gives the number of processes of each host")
    slots = read_hostfile(file)
    first, last_rank = next(iter(slots)), len(slots) - 1
    if no_ssh and node_rank is None:
        raise UserError(f"--no-ssh needs --node-rank: the index of this host in {file}, 0 to {last_rank}")
    if node_rank is not None and not no_ssh:
        raise UserError("--node-rank needs --no-ssh: without --no-ssh, this host starts all hosts")
    if node_rank is not None and not 0 <= node_rank <= last_rank:
        raise UserError(f"--node-rank is {node_rank}, but {file} has the hosts 0 to {last_rank}")
    if no_ssh and ssh_port is not None:
        raise UserError("--ssh-port has no effect with --no-ssh: leave out one of them")
    if not no_ssh and not (shutil.which("pdsh") and shutil.which("ssh")):
        raise UserError(
            "pdsh and ssh, which start the other hosts, are not both on PATH: install them, or start each "
            "host separately with --no-ssh --node-rank N"
        )
    address, port = master_addr or first, master_port or DEFAULT_PORT
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise UserError(
            f"the address of the first host, {address}, cannot be found ({error.strerror}): "
            "give an address that every host knows with --master-addr"
        ) from error
    if node_rank == 0 and not _is_free(port):
        raise UserError(f"port {port} of this host is in use: choose another with --master-port")
    read_environment_files()  # checks them
    return Hosts(
        file=file,
        slots=slots,
        master_addr=address,
        master_port=port,
        ssh_port=ssh_port,
        node_rank=node_rank,
    )


@dataclass(frozen=True, kw_only=True)
class HostsOutput:
    """What a command printed on the hosts. `is_late` says that it was ended because it took too long."""

    stdout: str
    stderr: str
    failed_hosts: list[str]
    is_late: bool

    def reason(self, host: str) -> str:
        """Return the message of a host on stderr, or that of pdsh; empty if there is none."""
        lines = [line for line in self.stderr.splitlines() if not PDSH_FAILURE.match(line)]
        own = [line for line in lines if line.startswith(f"{host}: ")]
        # the last line of a traceback says what happened
        return own[-1] if own else next(iter(lines), "")


def run_on_hosts(hosts: Hosts, command: str, *, timeout_s: float) -> HostsOutput:
    """Run a command on all hosts at the same time; in it, pdsh replaces %n by the place of the host."""
    try:
        done = _pdsh(hosts, command, timeout_s=timeout_s)
        stdout, stderr, is_late = done.stdout, done.stderr, False
    except subprocess.TimeoutExpired as error:
        stdout, stderr = (
            part.decode("utf-8", "replace") if isinstance(part, bytes) else part or ""
            for part in (error.stdout, error.stderr)
        )
        is_late = True
    return HostsOutput(
        stdout=stdout,
        stderr=stderr,
        failed_hosts=[host for host, _ in PDSH_FAILURE.findall(stderr)],
        is_late=is_late,
    )


def signal_hosts(hosts: Hosts, *, gently: bool) -> None:
    """Send SIGTERM to the processes of this run on every host.

    `gently` sends it to the ranks, which save a checkpoint before they end. Otherwise the launchers get it,
    which wait 30 seconds for each rank and then kill it.
    """
    pattern = launcher_pattern(hosts.master_addr, hosts.master_port)
    to_launcher = f"pkill -TERM -f '{pattern}'"
    to_ranks = f"pkill -TERM -P \"$(pgrep -d, -f '{pattern}')\""
    # a launcher that has no ranks yet is ended at once
    with suppress(subprocess.TimeoutExpired):
        _pdsh(hosts, f"{to_ranks} || {to_launcher}" if gently else to_launcher)


def pdsh_environment(hosts: Hosts) -> dict[str, str]:
    """Return this environment with pdsh set to use ssh, which fails instead of asking for a password."""
    options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} -o BatchMode=yes -o ConnectTimeout=10"
    # otherwise ssh waits for hours for a host that has vanished
    options += " -o ServerAliveInterval=5 -o ServerAliveCountMax=5"
    if hosts.ssh_port is not None:
        options += f" -p {hosts.ssh_port}"
    return os.environ | {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": options}


def _pdsh(hosts: Hosts, command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["pdsh", "-S", "-f", "1024", "-w", ",".join(hosts.slots), command],
        env=pdsh_environment(hosts),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        start_new_session=True,  # Ctrl-C must not reach pdsh
    )


def read_environment_files() -> dict[str, str]:
    """Return the variables that DeepSpeed exports on every host.

    Raises:
        UserError: a line is not NAME=VALUE; DeepSpeed fails on any other line, also comments.
    """
    variables = {}
    home = find_home()
    for path in ([home / ENVIRONMENT] if home else []) + [Path(ENVIRONMENT)]:
        lines = read_text(path, "the file").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            if not re.match(r"[A-Za-z_]\w*=", line):
                raise UserError(f"{path}, line {number} is {shorten(line)!r}: every line must be NAME=VALUE")
            name, _, value = line.partition("=")
            variables[name] = value.strip()
    return variables


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        # otherwise the port counts as in use for a minute after a run ended
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True
