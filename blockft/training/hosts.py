"""The hosts of a run: the file that lists them, and reaching them through pdsh and ssh."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blockft.errors import UserError

PDSH_FAILURE = re.compile(r"pdsh@[^:]*: (\S+): ssh exited with exit code \d+")
"""What pdsh writes to stderr as soon as a host's command has failed."""

DEFAULT_PORT = 29500
"""Where the ranks meet on the first host unless told otherwise: DeepSpeed's choice."""

ENVIRONMENT = ".deepspeed_env"
"""NAME=VALUE lines that DeepSpeed exports on every host, from the home and the working directory."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Where a run over several hosts starts its processes, and where these meet.

    `node_rank` is this host's place in the file if every host starts its own processes; if it is None, all
    are started from here through pdsh.
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


def read_hostfile(path: Path) -> dict[str, int]:
    """The number of processes by host, in the file's order, as DeepSpeed reads it.

    Raises:
        UserError: there is no such file, a line is malformed, a host stands there twice or has no slots.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {path} cannot be read: {error}") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].strip()
        if not words:
            continue
        # no more than a name, or pdsh would read ranges and exclusions into it
        match = re.fullmatch(r"(\w[\w.@-]*)\s+slots=([1-9]\d*)", words)
        if not match:
            raise UserError(
                f"{path}, line {number} is {line.strip()!r}: write a host and how many processes it runs, "
                "for example node0 slots=8"
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
    """The hosts of a file, if one is given, with everything checked that can be known on this machine.

    Raises:
        UserError: see `read_hostfile`; options that do not fit together; this process is one of a run
            already; pdsh is missing; the first host's address is unknown here; the port is taken.
    """
    if file is None:
        given = (no_ssh or None, node_rank, master_addr, master_port, ssh_port)
        names = ("--no-ssh", "--node-rank", "--master-addr", "--master-port", "--ssh-port")
        if stray := [name for name, value in zip(names, given, strict=True) if value is not None]:
            raise UserError(f"{stray[0]} says how hosts are started: give them with --hostfile")
        return None
    if "RANK" in os.environ:
        raise UserError("RANK is set, so this is one process of a run that was started: leave --hostfile out")
    if num_gpus is not None:
        raise UserError(f"--num-gpus is for one machine: {file} says how many processes each host runs")
    slots = read_hostfile(file)
    first, last_rank = next(iter(slots)), len(slots) - 1
    if no_ssh and node_rank is None:
        raise UserError(f"--no-ssh needs --node-rank: this host's place in {file}, 0 to {last_rank}")
    if node_rank is not None and not no_ssh:
        raise UserError("--node-rank belongs to --no-ssh: without it, every host is started from here")
    if node_rank is not None and not 0 <= node_rank <= last_rank:
        raise UserError(f"--node-rank is {node_rank}, and {file} has the hosts 0 to {last_rank}")
    if no_ssh and ssh_port is not None:
        raise UserError("--ssh-port is of no use with --no-ssh: leave one of them out")
    if not no_ssh and not (shutil.which("pdsh") and shutil.which("ssh")):
        raise UserError(
            "pdsh and ssh, which start the other hosts, are not both on PATH: install them, or start every "
            "host by itself with --no-ssh --node-rank N"
        )
    address, port = master_addr or first, master_port or DEFAULT_PORT
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise UserError(
            f"the address of the first host, {address}, cannot be found ({error.strerror}): "
            "give one that every host knows with --master-addr"
        ) from error
    if node_rank == 0 and not _is_free(port):
        raise UserError(f"port {port} is taken on this host: choose another with --master-port")
    _check_environment_files()
    return Hosts(
        file=file,
        slots=slots,
        master_addr=address,
        master_port=port,
        ssh_port=ssh_port,
        node_rank=node_rank,
    )


def check_hosts_reachable(hosts: Hosts) -> None:
    """Make sure that every host can be reached, and has this working directory and this Python.

    Raises:
        UserError: one cannot, or has not.
    """
    here, python = os.getcwd(), sys.executable
    asked = f"cd {shlex.quote(here)} && test -x {shlex.quote(python)}"
    try:
        done = _pdsh(hosts, asked.replace("%", "%%"))
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the hosts of {hosts.file} did not answer over ssh in time") from error
    if failed := PDSH_FAILURE.findall(done.stderr):
        said = [line for line in done.stderr.splitlines() if not PDSH_FAILURE.match(line)]
        raise UserError(
            f"{', '.join(failed)} cannot be used: it must be reached by ssh without a password and have the "
            f"directory {here} and the Python {python}" + (f"; it said: {said[0]}" if said else "")
        )
    if done.returncode:
        raise UserError(f"pdsh failed: {done.stderr.strip() or f'exit code {done.returncode}'}")


def signal_hosts(hosts: Hosts, *, gently: bool) -> None:
    """Send SIGTERM to this run's processes on every host: gently to the ranks, which save before they end.

    Otherwise to their launchers, which wait 30 seconds for each rank and then kill it.
    """
    # DeepSpeed itself would end every launcher of this Python on these hosts, of whatever run
    launcher = (
        "^[^ ]+ -u -m deepspeed.launcher.launch --world_info=[^ ]+ --node_rank=%n "
        f"--master_addr={hosts.master_addr} --master_port={hosts.master_port} "
    )
    to_launcher = f"pkill -TERM -f '{launcher}'"
    to_ranks = f"pkill -TERM -P \"$(pgrep -d, -f '{launcher}')\""
    # launchers that have no ranks yet are ended at once
    with suppress(subprocess.TimeoutExpired):
        _pdsh(hosts, f"{to_ranks} || {to_launcher}" if gently else to_launcher)


def pdsh_environment(hosts: Hosts) -> dict[str, str]:
    """This environment, with pdsh told to use ssh, which shall fail where it would ask something."""
    options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} -o BatchMode=yes -o ConnectTimeout=10"
    if hosts.ssh_port is not None:
        options += f" -p {hosts.ssh_port}"
    return os.environ | {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": options}


def quote_for_remote_shell(word: str) -> str:
    """A word written so that it arrives unchanged after DeepSpeed, pdsh and the remote shell have read it."""
    word = word.replace("%", "%%")  # pdsh puts a host's name for %h
    if " " not in word:
        return shlex.quote(word)
    return re.sub(r"([\\$`])", r"\\\1", word)  # DeepSpeed puts it into double quotes, and escapes those


def _pdsh(hosts: Hosts, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["pdsh", "-S", "-f", "1024", "-w", ",".join(hosts.slots), command],
        env=pdsh_environment(hosts),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,  # Ctrl-C is for us alone
    )


def _check_environment_files() -> None:
    """DeepSpeed would end with a traceback, on comments and empty lines too."""
    for path in (Path.home() / ENVIRONMENT, Path(ENVIRONMENT)):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            if not re.match(r"[A-Za-z_]\w*=", line):
                raise UserError(f"{path}, line {number} is {line!r}: every line must be NAME=VALUE")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # else a run's end would block it a minute
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
