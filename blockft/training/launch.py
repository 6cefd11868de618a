"""Start the processes of a run with the `deepspeed` launcher, and stop them together."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import IO, Any

import psutil
import torch

from blockft.errors import INTERNAL_ERROR, INTERRUPTED, USER_ERROR, UserError, notify
from blockft.held_signals import hold_signals
from blockft.training.distributed import find_free_port, use_cpu
from blockft.training.hosts import (
    PDSH_FAILURE,
    SSH_FAILED,
    Hosts,
    pdsh_environment,
    signal_hosts,
)
from blockft.training.library_internals import quote_for_remote_shell
from blockft.training.rank_relay import RankFailure
from blockft.training.rank_watch import RankWatch
from blockft.units import format_count

END_S = 20
"""Time in which the ranks of this host end by themselves when another host has failed."""

READ_S = 10
"""Longest wait for the last messages of pdsh after it has ended."""


def check_num_gpus(num_gpus: int) -> None:
    """Check that this machine has `num_gpus` GPUs, or none, in which case processes run on the CPU.

    Raises:
        UserError: the machine has GPUs, but fewer than `num_gpus`, or CUDA_VISIBLE_DEVICES does not name them
            by their numbers.
    """
    _visible_gpus()
    if not use_cpu() and num_gpus > (num_found := torch.cuda.device_count()):
        raise UserError(
            f"--num-gpus is {num_gpus}, but this process sees {format_count(num_found, 'GPU')}: ask for "
            f"{num_found} or fewer (see CUDA_VISIBLE_DEVICES), or name more machines with --hostfile"
        )


def _visible_gpus() -> list[str]:
    """Return the numbers of the GPUs that CUDA_VISIBLE_DEVICES names; none if it names none.

    DeepSpeed's launcher ignores the variable beside its own option for a number of GPUs.

    Raises:
        UserError: a GPU is named in another way than by its number.
    """
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if use_cpu() or not names:
        return []
    if other := [name for name in names if not name.isdecimal()]:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES names a GPU as {other[0]!r}: name GPUs by their numbers with --num-gpus "
            "(nvidia-smi -L lists both), or start the processes with torchrun"
        )
    return names


def count_gpus() -> int:
    """Return the number of processes of this machine: one per GPU, or one on the CPU."""
    return 1 if use_cpu() else torch.cuda.device_count()


def start_workers(
    arguments: Sequence[str], *, num_gpus: int, hosts: Hosts | None, watch: RankWatch | None = None
) -> int:
    """Run `blockft ARGUMENTS` in several processes, on this machine or on hosts, and return the exit code.

    The exit code is that of the rank that failed first, and 2 if a signal ended it or its host was lost.
    `watch` is the watch over the other hosts if each host starts its own processes: the processes of this
    host are ended if another host fails.

    SIGINT and SIGTERM are forwarded once to every rank started from here; all ranks save a checkpoint and
    stop, and the exit code is 130. A second signal ends them at once. A host that fails ends the others.

    Call `check_hosts` first.
    """
    over_ssh = hosts is not None and hosts.node_rank is None
    arguments, environment = _prepare_launch(arguments, hosts)
    signals: list[int] = []

    def forward_signal(number: int, _: Any) -> None:
        signals.append(number)
        is_first = len(signals) == 1
        if not (children := psutil.Process(launcher.pid).children()):
            launcher.terminate()
        elif hosts is not None and over_ssh:
            signal_hosts(hosts, gently=is_first)
        else:
            # a signal to DeepSpeed's launcher of this machine would kill ranks that save for over 30 seconds
            ranks = [rank for child in children for rank in child.children()] if is_first else []
            for process in ranks or children:
                process.terminate()

    with hold_signals():
        # a new session: otherwise Ctrl-C also reaches the workers directly, and a second signal ends them
        launcher = subprocess.Popen(
            [*_launcher_command(num_gpus, hosts), "--module", "blockft", *arguments],
            env=environment,
            stderr=subprocess.PIPE if over_ssh else None,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward_signal)
    if watch:
        watch.on_failure = partial(_end_launcher, launcher)
    failed: list[tuple[str, int]] = []
    if hosts is not None and over_ssh:
        assert launcher.stderr is not None
        reader = threading.Thread(
            target=_watch_hosts, args=(launcher.stderr, hosts, signals, failed), daemon=True
        )
        reader.start()
    exit_code = launcher.wait()
    if signals:
        return INTERRUPTED
    if over_ssh:
        reader.join(timeout=READ_S)
        # pdsh itself returns the largest code of all hosts
        exit_code = next((code for _, code in failed if code != SSH_FAILED), exit_code)
    if exit_code in (0, INTERNAL_ERROR, USER_ERROR, INTERRUPTED):
        return exit_code
    if over_ssh and exit_code == SSH_FAILED:  # not SIGHUP
        host = failed[0][0] if failed else "a host"
        notify(f"the connection to {host} has failed, or its processes were ended: resume with --resume")
    else:
        _report_kill(exit_code)
    return USER_ERROR


def run_briefly(
    arguments: Sequence[str], *, num_gpus: int, hosts: Hosts | None, timeout_s: float
) -> tuple[int, list[str]]:
    """Run `blockft ARGUMENTS` in several processes; return the exit code and the lines that they print.

    Raises:
        UserError: the processes have not ended in time.
    """
    arguments, environment = _prepare_launch(arguments, hosts)
    launcher: subprocess.Popen[str] | None = None
    try:
        with hold_signals():
            launcher = subprocess.Popen(
                [*_launcher_command(num_gpus, hosts), "--module", "blockft", *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        output, _ = launcher.communicate(timeout=timeout_s)
        return launcher.returncode, output.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = (error.output or b"").decode("utf-8", "replace").splitlines()
        remarks = [line.partition("blockft: ")[2] for line in lines if "blockft: " in line]
        raise UserError(
            f"the processes have not ended within {timeout_s:g} s: "
            + (
                remarks[-1]
                if remarks
                else "a host or a GPU does not answer; look for it by leaving out hosts"
            )
            + " (NCCL_DEBUG=INFO shows more of GPUs)"
        ) from error
    finally:
        if launcher is not None and launcher.poll() is None:
            if hosts is not None:
                signal_hosts(hosts, gently=False)
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()


def _prepare_launch(arguments: Sequence[str], hosts: Hosts | None) -> tuple[Sequence[str], dict[str, str]]:
    """Return arguments and environment of DeepSpeed's launcher."""
    environment = dict(os.environ)
    if hosts is None and _visible_gpus():
        del environment["CUDA_VISIBLE_DEVICES"]  # the command line names the GPUs
    if hosts is not None and hosts.node_rank is None:
        environment = pdsh_environment(hosts)
        arguments = [quote_for_remote_shell(argument) for argument in arguments]
    if use_cpu():
        environment["DS_ACCELERATOR"] = "cpu"
    return arguments, environment


def _report_kill(exit_code: int) -> None:
    """Print that a signal ended a rank, which only its launcher knows: by its exit code, or 256 less."""
    causes = {
        signal.SIGKILL: ", most likely because memory ran out",
        signal.SIGBUS: ", most likely because shared memory or a disk is full",
        signal.SIGSEGV: "",
        signal.SIGABRT: "",
    }
    for number, cause in causes.items():
        if exit_code in (256 - number, -number):
            notify(f"a process of the run was ended by {number.name}{cause}: resume the run with --resume")


def _launcher_command(num_gpus: int, hosts: Hosts | None) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    if hosts is None:
        # without an option DeepSpeed reads /job/hostfile, and starts the run on the hosts that it names
        command += ["--hostfile", os.devnull, "--master_port", str(find_free_port())]
        if visible := _visible_gpus():
            return [*command, "--include", f"localhost:{','.join(visible[:num_gpus])}"]
        return [*command, "--num_gpus", str(num_gpus)]
    command += ["--hostfile", str(hosts.file)]
    command += ["--master_addr", hosts.master_addr, "--master_port", str(hosts.master_port)]
    # without --force_multi DeepSpeed runs a hostfile with one host on this machine, whichever host it names
    command += ["--no_ssh_check", "--force_multi"]
    if hosts.node_rank is not None:
        command += ["--no_ssh", "--node_rank", str(hosts.node_rank)]
    return command


def _watch_hosts(lines: IO[str], hosts: Hosts, signals: list[int], failed: list[tuple[str, int]]) -> None:
    """Print pdsh's messages; when a host fails, end the run on all hosts, which would wait for minutes.

    `failed` receives the hosts that fail, with their exit codes; the first one comes first.
    """
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        if match := PDSH_FAILURE.match(line):
            failed.append((match[1], int(match[2])))
            if len(failed) == 1 and not signals:
                signal_hosts(hosts, gently=False)


def _end_launcher(launcher: subprocess.Popen[str], failure: RankFailure) -> None:
    """End the processes of this host when another host has failed, unless they end by themselves.

    A host that ended without a message may have lost only the process that started its ranks.
    """
    if failure.has_ended:
        return
    try:
        launcher.wait(END_S)
    except subprocess.TimeoutExpired:
        notify(str(failure))
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGTERM)
