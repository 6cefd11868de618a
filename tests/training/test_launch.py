"""Runs on several hosts: the losses of one host, a clean stop, and no host that waits for a failed one."""

import datetime
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from deepspeed.launcher import runner
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion
from typer import Exit

from blockft.cli import commands as cli_commands
from blockft.config.recipe import RECIPES_FOLDER
from blockft.errors import INTERRUPTED, UserError
from blockft.model.checkpoint import MARKER, complete_checkpoints
from blockft.stages.prepare import prepare
from blockft.training import distributed, launch
from blockft.training.rank_relay import RankFailure
from tests import commands
from tests.commands import PYTHON_PATH, ROOT, TIMEOUT_S, finish, fork_ranks, free_port, logged, start
from tests.run import toy_recipe
from tests.training.hosts import node_options

TOOL = Path(os.environ.get("BLOCKFT_TOOLS", ROOT.parent / "shared" / "tools")) / "two_hosts.sh"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared toy recipe."""
    folder = tmp_path_factory.mktemp("toy")
    prepare(toy_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def two_ranks(toy: Path) -> list[float]:
    """The losses of the toy recipe on two ranks of this machine."""
    commands.train(toy / "recipe.yaml", toy / "two", num_ranks=2)
    return logged(toy / "two")


@pytest.mark.slow  # two hosts start eight interpreters
def test_manually_started_hosts_match_single_host_losses(
    toy: Path, two_ranks: list[float], hostfile: Path
) -> None:
    arguments, port = ("blockft", "train", toy / "recipe.yaml", f"train.output_dir={toy}/nodes"), free_port()
    hosts = [
        start(*arguments, *node_options(rank, hostfile, port), GLOO_SOCKET_IFNAME="lo") for rank in (0, 1)
    ]
    finish(*hosts)
    assert logged(toy / "nodes") == two_ranks


@pytest.mark.slow  # two hosts start ten interpreters
def test_two_hosts_of_two_ranks_match_the_losses_of_one_rank(toy: Path, tmp_path: Path) -> None:
    """Under ZeRO-3, where each rank holds a quarter of the weights."""
    hostfile, port = tmp_path / "hosts", free_port()
    hostfile.write_text("here slots=2\nthere slots=2\n")
    arguments = ("blockft", "train", toy / "recipe.yaml", "train.deepspeed=zero3")
    finish(
        *(
            start(
                *arguments,
                f"train.output_dir={toy}/four",
                *node_options(rank, hostfile, port),
                GLOO_SOCKET_IFNAME="lo",
            )
            for rank in (0, 1)
        )
    )
    commands.train(toy / "recipe.yaml", toy / "one", "train.deepspeed=zero0")
    assert logged(toy / "four") == pytest.approx(logged(toy / "one"), rel=1e-5)


def check_agreement(runs: Sequence[Path], data: Sequence[str]) -> None:
    """Check one rank's run folder and data against those of the other."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    try:
        distributed.check_ranks(runs[rank], {"data": data[rank]})
    except UserError as error:
        sys.exit(str(error))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("folders", "data", "message"),
    [
        (("a", "a"), ("x", "x"), None),
        (("a", "a"), ("x", "y"), "rank 1 and rank 0 differ in data"),
        (("a", "b"), ("x", "x"), "rank 1 does not see the files that rank 0 writes"),
    ],
)
def test_ranks_that_disagree_on_the_run_or_its_folder_all_stop(
    folders: tuple[str, str], data: tuple[str, str], message: str | None, tmp_path: Path
) -> None:
    check = partial(check_agreement, [tmp_path / folder / "run" for folder in folders], data)
    ranks = fork_ranks(check, num_ranks=2, GLOO_SOCKET_IFNAME="lo")
    ranks.wait()
    errors = ranks.output("stderr")
    assert [process.exitcode for process in ranks.processes] == [0 if message is None else 1] * 2, errors
    assert message is None or errors.count(message) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def fake_slurm(folder: Path, blockft: str) -> dict[str, str]:
    """An environment in which `srun` starts two tasks here, and `scontrol` writes its arguments to a log."""
    scripts = {
        "scontrol": f'echo "$@" >> {folder}/scontrol.log; if [ "$1" = show ]; then echo 127.0.0.1; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; export SLURM_NTASKS=2\n'
        'SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & first=$!\nSLURM_PROCID=0 SLURM_LOCALID=0 "$@" || exit $?\n'
        "wait $first",
        "blockft": blockft,
    }
    for name, code in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "SLURM_JOB_ID": "9512", "SLURM_JOB_NODELIST": "node[0-1]"}


def run_slurm_script(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", RECIPES_FOLDER / "launch" / "slurm.sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
    )


def test_the_slurm_script_starts_one_rank_per_task_and_requeues_a_stopped_run(tmp_path: Path) -> None:
    run, calls = tmp_path / "run", tmp_path / "calls"
    log_call = f'echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT "$@" >> {calls}; '
    stopped = fake_slurm(tmp_path, log_call + f"mkdir -p {run}; exit 130")
    assert run_slurm_script(stopped, "demo", run, "a=b c").returncode == 130
    assert "requeue 9512" in (tmp_path / "scontrol.log").read_text().splitlines()
    (tmp_path / "scontrol.log").unlink()
    assert run_slurm_script(fake_slurm(tmp_path, log_call), "demo", run).returncode == 0
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()
    expected = [f"{i} {i} 2 127.0.0.1 29512 train demo train.output_dir={run}" for i in (0, 1)]
    lines = calls.read_text().splitlines()
    assert sorted(lines[:2]) == [f"{call} a=b c" for call in expected]
    assert sorted(lines[2:]) == [f"{call} --resume" for call in expected]


@pytest.mark.parametrize(
    ("by_host", "exit_code", "expected", "message"),
    [
        ([], 255, 2, "the connection to a host has failed"),
        ([("b", 255)], 255, 2, "the connection to b has failed"),
        ([("b", 2), ("a", 255)], 255, 2, ""),
        ([("b", 255), ("a", 2)], 255, 2, ""),
        ([("b", 1), ("a", 2)], 2, 1, ""),
        ([("b", 1), ("a", 247)], 247, 1, ""),
        ([("b", 247), ("a", 2)], 247, 2, "ended by SIGKILL"),
        ([], 0, 0, ""),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(
    by_host: list[tuple[str, int]],
    exit_code: int,
    expected: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hosts = launch.Hosts(
        file=Path("hosts"), slots={"a": 1}, master_addr="a", master_port=1, ssh_port=None, node_rank=None
    )
    lines = [f"pdsh@a: {host}: ssh exited with exit code {code}" for host, code in by_host]
    code = f"import sys; print(*{lines}, sep='\\n', file=sys.stderr); raise SystemExit({exit_code})"
    ended: list[bool] = []
    monkeypatch.setattr(launch, "_launcher_command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(launch, "signal_hosts", lambda hosts, gently: ended.append(gently))
    monkeypatch.setattr(launch, "READ_S", TIMEOUT_S)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launch.start_workers(["train"], num_gpus=1, hosts=hosts) == expected
    remarks = [line for line in capsys.readouterr().err.splitlines() if line.startswith("blockft: ")]
    assert len(remarks) == bool(message) and all(message in remark for remark in remarks)
    assert ended == [False] * bool(by_host)


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (2, 2), (130, 130), (247, 2), (-9, 2)])
def test_only_documented_exit_codes_leave_a_run_on_one_machine(
    code: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"import os; os.kill(os.getpid(), {-code}) if {code} < 0 else os._exit({code})"
    monkeypatch.setattr(launch, "_launcher_command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launch.start_workers(["train"], num_gpus=2, hosts=None) == expected


def test_the_processes_of_a_host_end_when_another_host_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import time; print('up', flush=True); time.sleep(3600)"
    monkeypatch.setattr(launch, "END_S", 0.5)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout and process.stdout.readline()
        vanished = RankFailure(rank=1, host="b", node=1, reason="ended", has_ended=True, noun="node")
        launch._end_launcher(process, vanished)
        assert process.poll() is None  # its ranks may live
        launch._end_launcher(process, RankFailure(rank=1, host="b", node=1, reason="has failed", noun="node"))
        assert process.wait() == -signal.SIGTERM
    assert capsys.readouterr().err == "blockft: node 1 on b has failed\n"


WAIT = "import time; time.sleep(3600)"


class PopenThatHasPrinted(subprocess.Popen[str]):
    """A process whose time begins when it prints something, however long it takes to start."""

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        assert self.stdout and select.select([self.stdout], [], [], TIMEOUT_S)[0]
        return super().communicate(input, timeout)


def test_processes_that_do_not_end_are_ended_with_their_last_message(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; print('n0: blockft: waiting for the compiler', flush=True); time.sleep(3600)"
    monkeypatch.setattr(launch, "_launcher_command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(launch.subprocess, "Popen", PopenThatHasPrinted)
    with pytest.raises(UserError, match="not ended within 5 s: waiting for the compiler"):
        launch.run_briefly(["doctor"], num_gpus=2, hosts=None, timeout_s=5)


@pytest.mark.parametrize("is_brief", [False, True])
def test_an_interruption_while_the_launcher_is_created_ends_it(
    monkeypatch: pytest.MonkeyPatch, is_brief: bool
) -> None:
    """Ctrl-C does not reach it, because it has a session of its own."""
    processes: list[subprocess.Popen[str]] = []

    class InterruptedPopen(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            processes.append(self)
            signal.raise_signal(signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(launch, "_launcher_command", lambda *_: [sys.executable, "-c", WAIT])
    monkeypatch.setattr(launch.subprocess, "Popen", InterruptedPopen)
    try:
        if is_brief:
            with pytest.raises(KeyboardInterrupt):
                launch.run_briefly(["doctor"], num_gpus=2, hosts=None, timeout_s=TIMEOUT_S)
        else:
            assert launch.start_workers(["train"], num_gpus=2, hosts=None) == INTERRUPTED
        assert processes[0].returncode in (-signal.SIGTERM, -signal.SIGKILL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        processes[0].kill()


def test_more_processes_than_gpus_are_refused_before_any_starts(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_workers(arguments: list[str], *, num_gpus: int, hosts: None, watch: None) -> int:
        assert num_gpus == 2
        return 7

    monkeypatch.setattr(launch, "start_workers", start_workers)
    recipe, overrides = str(toy / "recipe.yaml"), [f"train.output_dir={toy}/gpus"]
    with pytest.raises(Exit):  # on a machine without GPUs the ranks use CPUs
        cli_commands.train(recipe, overrides, num_gpus=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Exit):
        cli_commands.train(recipe, overrides, num_gpus=2)
    with pytest.raises(UserError, match="--num-gpus is 4, but this process sees 2 GPUs: ask for 2 or fewer"):
        cli_commands.train(recipe, overrides, num_gpus=4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="LOCAL_RANK is 2, but this process sees 2 GPUs: start one process"):
        distributed.init_distributed()


@pytest.mark.parametrize(
    ("visible", "num_gpus", "expected"), [("2,3", 2, [2, 3]), (" 3, 1 ,0", 2, [1, 3]), ("1", 1, [1])]
)
def test_the_gpus_that_the_environment_names_are_used(
    visible: str, num_gpus: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "use_cpu", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = launch._launcher_command(num_gpus, None)
    assert "--num_gpus" not in command
    names = command[command.index("--include") + 1]
    assert parse_inclusion_exclusion({"localhost": 4}, names, "") == {"localhost": expected}
    assert "CUDA_VISIBLE_DEVICES" not in launch._prepare_launch([], None)[1]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "--include" not in launch._launcher_command(num_gpus, None)


def test_a_hostfile_that_nobody_named_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's default hostfile would start the run on other hosts, for which nothing was checked."""
    default = tmp_path / "hostfile"
    default.write_text("node7 slots=8\n")
    assert fetch_hostfile(str(default)) == {"node7": 8}
    monkeypatch.setattr(runner, "DLTS_HOSTFILE", str(default))
    _, _, *options = launch._launcher_command(2, None)
    arguments = runner.parse_args([*options[1:], "train.py"])
    assert arguments.hostfile != str(default) and fetch_hostfile(arguments.hostfile) is None


def test_a_gpu_that_is_not_named_by_its_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "use_cpu", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-cefb9859")
    with pytest.raises(UserError, match="names a GPU as 'GPU-cefb9859': name GPUs by their numbers"):
        launch.check_num_gpus(2)


missing = [name for name in ("ip", "sshd", "ssh", "pdsh", "pkill") if not shutil.which(name)]
if os.geteuid() != 0:
    missing.append("the rights of root")
if not TOOL.is_file():
    missing.append(str(TOOL))
two_hosts_only = pytest.mark.skipif(bool(missing), reason=f"two hosts on one machine need {missing}")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A hostfile of two network namespaces with ssh servers, and the variables that reach them."""
    folder = tmp_path_factory.mktemp("hosts")
    try:
        subprocess.run(["bash", TOOL, "up", folder], check=True, timeout=TIMEOUT_S)
        lines = shlex.split((folder / "env").read_text())
        (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
        yield folder / "hostfile", dict(line.split("=", 1) for line in lines)
    finally:
        subprocess.run(["bash", TOOL, "down", folder], check=True, timeout=TIMEOUT_S)


Hosts = tuple[Path, dict[str, str]]

ENDLESS = ("train.num_train_epochs=3000", "train.save_steps=1000000")
"""Settings of a run that does not end by itself."""


def start_over_pdsh(hosts: Hosts, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start `blockft train ARGUMENTS` on both hosts from the first one."""
    hostfile, environment = hosts
    options = ("--hostfile", hostfile, "--ssh-port", "2222", "--master-port", "29545")
    return start(
        "blockft", "train", *arguments, *options, cwd=hostfile.parent, namespace="node0", **environment
    )


def process_of_rank(run: Path, rank: int) -> psutil.Process:
    """Return the process of one rank of a run on this machine, in whatever network namespace it is."""
    for process in psutil.process_iter():
        try:
            is_of_run = f"train.output_dir={run}" in process.cmdline()
            if is_of_run and process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no rank {rank} of {run}")


def wait_for_two_steps(run: Path, launcher: subprocess.Popen[str]) -> None:
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") >= 2):
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.2)


@pytest.mark.slow  # two hosts start six interpreters
@two_hosts_only
@pytest.mark.parametrize("launcher", ["blockft", "deepspeed"])
def test_two_hosts_over_pdsh_match_single_host_losses(
    toy: Path, two_ranks: list[float], two_hosts: Hosts, launcher: str
) -> None:
    run = toy / f"by {launcher}, 100%h [a] $HOME" if launcher == "blockft" else toy / "by-deepspeed"
    arguments: tuple[str | Path, ...] = (toy / "recipe.yaml", f"train.output_dir={run}")
    if launcher == "blockft":
        finish(start_over_pdsh(two_hosts, *arguments))
    else:
        hostfile, environment = two_hosts
        options = ("--hostfile", hostfile, "--no_ssh_check", "--ssh_port", "2222", "--master_port", "29546")
        arguments = ("--master_addr", "10.77.0.1", "--module", "blockft", "train", *arguments)
        arguments = ("deepspeed.launcher.runner", *options, *arguments)
        finish(start(*arguments, cwd=hostfile.parent, namespace="node0", **environment))
    assert logged(run) == two_ranks
    assert json.loads((complete_checkpoints(run)[-1] / MARKER).read_text())["step"] == 5


@pytest.mark.slow  # two hosts start six interpreters, twice
@two_hosts_only
def test_sigterm_lets_all_hosts_save_and_the_run_resumes(toy: Path, two_hosts: Hosts) -> None:
    settings = ("train.num_train_epochs=20", "train.save_steps=25")
    commands.train(toy / "recipe.yaml", toy / "uninterrupted", *settings, num_ranks=2)
    run = toy / "stopped"
    arguments = (toy / "recipe.yaml", *settings, f"train.output_dir={run}")
    launcher = start_over_pdsh(two_hosts, *arguments)
    wait_for_two_steps(run, launcher)
    for process in psutil.Process(launcher.pid).children():
        process.send_signal(signal.SIGTERM)
    output = launcher.communicate()[0]
    assert launcher.returncode == 130, output
    (*_, last) = complete_checkpoints(run)
    num_steps = len(logged(run))
    assert 0 < num_steps < len(logged(toy / "uninterrupted")) and last.name == f"checkpoint-{num_steps}"
    finish(start_over_pdsh(two_hosts, *arguments, "--resume"))
    assert logged(run) == logged(toy / "uninterrupted")


@pytest.mark.slow  # two hosts start six interpreters
@two_hosts_only
@pytest.mark.parametrize("when", ["before the first step", "while training"])
def test_failed_host_terminates_other_host(toy: Path, two_hosts: Hosts, when: str) -> None:
    run = toy / f"killed-{when.split()[0]}"
    settings = ("train.num_train_epochs=3000", "train.save_steps=1000000")
    launcher = start_over_pdsh(two_hosts, toy / "recipe.yaml", f"train.output_dir={run}", *settings)
    if when == "while training":
        wait_for_two_steps(run, launcher)
        process_of_rank(run, 1).kill()
    else:
        while True:
            try:
                process_of_rank(run, 1).kill()
                break
            except AssertionError:
                assert launcher.poll() is None, launcher.communicate()[0]
                time.sleep(0.2)
    output = launcher.communicate()[0]
    assert launcher.returncode not in (0, 130), output
    with pytest.raises(AssertionError, match="no rank 0"):
        process_of_rank(run, 0)


@pytest.mark.slow  # three interpreters start
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", ["--num-gpus", "torchrun"])
def test_a_killed_rank_ends_the_run_and_is_named(toy: Path, launcher: str, rank: int) -> None:
    run = toy / f"killed-{launcher.strip('-')}-{rank}"
    arguments = ("blockft", "train", toy / "recipe.yaml", f"train.output_dir={run}", *ENDLESS)
    if launcher == "torchrun":
        options = ("--nproc-per-node", "2", "--master-port", str(free_port()))
        process = start("torch.distributed.run", *options, "-m", *arguments)
    else:
        process = start(*arguments, "--num-gpus", "2")
    wait_for_two_steps(run, process)
    process_of_rank(run, rank).kill()
    output = process.communicate()[0]
    assert process.returncode != 0
    assert f"blockft: rank {rank} on " in output and "it was killed" in output, output


def start_faulty(
    hosts: Hosts, run: Path, toy: Path, *settings: str, **environment: str
) -> subprocess.Popen[str]:
    hostfile, variables = hosts
    settings = (f"train.output_dir={run}", *ENDLESS, *settings)
    return start_over_pdsh((hostfile, variables | environment), toy / "recipe.yaml", *settings)


def add_a_host_without_machine(toy: Path, hosts: Hosts, run: Path) -> subprocess.Popen[str]:
    hostfile = hosts[0].with_name("three-hosts")
    hostfile.write_text(hosts[0].read_text() + "10.77.0.9 slots=1\n")
    return start_faulty((hostfile, hosts[1]), run, toy, "train.batch_rows=6")


def use_the_port(toy: Path, hosts: Hosts, run: Path) -> subprocess.Popen[str]:
    listen = "s = socket.create_server(('', 29545))"
    code = f"import socket, time; {listen}; print('up', flush=True); time.sleep(3600)"
    command = ["ip", "netns", "exec", "node0", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as blocker:
        assert blocker.stdout and blocker.stdout.readline()
        launcher = start_faulty(hosts, run, toy)
        launcher.wait()
        blocker.kill()
    return launcher


def change_a_version_on_node1(toy: Path, hosts: Hosts, run: Path) -> subprocess.Popen[str]:
    """Python imports sitecustomize when it starts, on both hosts."""
    folder = toy / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata, subprocess\n"
        "version = metadata.version\n"
        "if b'10.77.0.2' in subprocess.run(['ip', '-o', 'addr'], capture_output=True).stdout:\n"
        "    metadata.version = lambda name: '0.0.9' if name == 'transformers' else version(name)\n"
    )
    return start_faulty(hosts, run, toy, PYTHONPATH=f"{folder}:{PYTHON_PATH}")


@pytest.mark.slow  # a command and its probes start three interpreters
@two_hosts_only
@pytest.mark.parametrize(
    ("start_with_fault", "message"),
    [
        (add_a_host_without_machine, "blockft: 10.77.0.9 cannot be used: it must allow ssh"),
        (use_the_port, "blockft: port 29545 is in use (Address already in use) on node0: choose another"),
        (change_a_version_on_node1, "blockft: node1 has transformers 0.0.9, but node0 has "),
    ],
)
def test_hosts_that_cannot_train_together_are_named_before_training(
    toy: Path,
    two_hosts: Hosts,
    start_with_fault: Callable[[Path, Hosts, Path], subprocess.Popen[str]],
    message: str,
) -> None:
    run = toy / start_with_fault.__name__
    launcher = start_with_fault(toy, two_hosts, run)
    output = launcher.communicate()[0]
    assert launcher.returncode == 2 and message in output, output
    assert not run.exists()


@pytest.mark.slow  # two hosts start six interpreters, and a host that vanished is probed for 30 seconds
@two_hosts_only
def test_a_host_that_vanishes_ends_the_run_on_every_host(toy: Path, two_hosts: Hosts) -> None:
    run = toy / "vanished"
    launcher = start_faulty(two_hosts, run, toy)
    wait_for_two_steps(run, launcher)
    subprocess.run(["ip", "-n", "node1", "link", "set", "eth0", "down"], check=True)
    try:
        output = launcher.communicate()[0]
        assert launcher.returncode != 0, output
        assert "blockft: rank 1 on " in output and "no longer answers" in output
        commands.wait_until(lambda: not is_running(run, 0) and not is_running(run, 1))
    finally:
        subprocess.run(["ip", "-n", "node1", "link", "set", "eth0", "up"], check=True)


def is_running(run: Path, rank: int) -> bool:
    try:
        process_of_rank(run, rank)
    except AssertionError:
        return False
    return True


@pytest.mark.slow  # two interpreters start
def test_the_slurm_script_matches_single_host_losses(
    toy: Path, two_ranks: list[float], tmp_path: Path
) -> None:
    environment = fake_slurm(tmp_path, f'exec {sys.executable} -m blockft "$@"')
    port = next(port for port in iter(free_port, None) if port >= 20_000)  # the script adds 20,000
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "SLURM_JOB_ID": str(port - 20_000)}
    done = run_slurm_script(environment, toy / "recipe.yaml", toy / "slurm")
    assert done.returncode == 0, done.stderr
    assert logged(toy / "slurm") == two_ranks
