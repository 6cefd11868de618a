"""Runs on several hosts, for real: the losses of one host, a clean stop, and no host left waiting."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from typer import Exit

from blockft.cli import pipeline
from blockft.config.recipe import RECIPES_FOLDER
from blockft.errors import UserError
from blockft.model.checkpoint import complete_checkpoints
from blockft.stages.prepare import prepare
from blockft.training import launch
from tests.run import toy_recipe
from tests.training.launched import LIMIT_S, ROOT, alone, finish, losses, start

TOOL = Path(os.environ.get("BLOCKFT_TOOLS", ROOT.parent / "shared" / "tools")) / "two_hosts.sh"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared toy recipe, and its run on two processes of this machine."""
    folder = tmp_path_factory.mktemp("toy")
    prepare(toy_recipe(folder))
    finish(
        start("blockft", "train", folder / "recipe.yaml", f"train.output_dir={folder}/two", "--num-gpus", "2")
    )
    return folder


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    """Two hosts that are this machine."""
    path = tmp_path / "hosts"
    path.write_text("here slots=1\nthere slots=1\n")
    return path


def test_hosts_that_each_start_their_own_give_the_losses_of_two_processes_on_one(
    toy: Path, hostfile: Path
) -> None:
    words = ("blockft", "train", toy / "recipe.yaml", f"train.output_dir={toy}/alone")
    finish(*(start(*words, *alone(rank, hostfile, 29541), GLOO_SOCKET_IFNAME="lo") for rank in (0, 1)))
    assert losses(toy / "alone") == losses(toy / "two")


RANK = """
import datetime, os, pathlib, sys
import torch.distributed as dist
from blockft.errors import UserError
from blockft.training.launch import check_ranks
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
try:
    check_ranks(pathlib.Path(sys.argv[1]), {"data": sys.argv[2]})
except UserError as error:
    sys.exit(str(error))
finally:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("folders", "data", "said"),
    [
        (("a", "a"), ("x", "x"), None),
        (("a", "a"), ("x", "y"), "rank 1 has another data than rank 0"),
        (("a", "b"), ("x", "x"), "rank 1 does not see what rank 0 writes"),
    ],
)
def test_ranks_agree_on_the_run_and_its_folder_or_all_stop(
    folders: tuple[str, str], data: tuple[str, str], said: str | None, tmp_path: Path
) -> None:
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29542"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path / folders[rank] / "run", data[rank]],
            env=common | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in (0, 1)
    ]
    for process in started:
        heard = process.communicate(timeout=LIMIT_S)[1]
        assert process.returncode == (0 if said is None else 1) and (said or "") in heard, heard
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def fake_slurm(folder: Path, blockft: str) -> dict[str, str]:
    """An environment in which `srun` starts two tasks here, and `scontrol` notes what it is asked."""
    fakes = {
        "scontrol": f'echo "$@" >> {folder}/scontrol.log; if [ "$1" = show ]; then echo 127.0.0.1; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; export SLURM_NTASKS=2\n'
        'SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & first=$!\nSLURM_PROCID=0 SLURM_LOCALID=0 "$@" || exit $?\n'
        "wait $first",
        "blockft": blockft,
    }
    for name, code in fakes.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "SLURM_JOB_ID": "9512", "SLURM_JOB_NODELIST": "node[0-1]"}


def slurm(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", RECIPES_FOLDER / "launch" / "slurm.sh", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
    )


def test_the_slurm_script_starts_a_rank_a_task_and_requeues_what_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "run"
    says = f'echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT "$@" >> {tmp_path}/said; '
    stops = fake_slurm(tmp_path, says + f"mkdir -p {out}; exit 130")
    assert slurm(stops, "demo", out, "a=b c").returncode == 130
    assert "requeue 9512" in (tmp_path / "scontrol.log").read_text().splitlines()
    (tmp_path / "scontrol.log").unlink()
    assert slurm(fake_slurm(tmp_path, says), "demo", out).returncode == 0
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()
    ranks = [f"{i} {i} 2 127.0.0.1 29512 train demo train.output_dir={out}" for i in (0, 1)]
    said = (tmp_path / "said").read_text().splitlines()
    assert sorted(said[:2]) == [f"{rank} a=b c" for rank in ranks]
    assert sorted(said[2:]) == [f"{rank} --resume" for rank in ranks]


def test_the_readmes_launches_exist() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Several GPUs and nodes")[1]
    block = section.split("```")[1].strip().splitlines()
    helped = finish(start("blockft", "train", "--help"))[0]
    assert len(block) == 5
    for line in block:
        for option in re.findall(r"--[a-z-]+", line.split("#")[0] if "blockft train" in line[:13] else ""):
            assert f"{option} " in helped


def test_more_processes_than_gpus_are_refused_before_any_starts(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_workers(words: list[str], *, num_gpus: int, hosts: None) -> int:
        assert num_gpus == 2
        return 7

    monkeypatch.setattr(launch, "start_workers", start_workers)
    recipe, words = str(toy / "recipe.yaml"), [f"train.output_dir={toy}/gpus"]
    with pytest.raises(Exit):  # without GPUs they are processes on CPUs
        pipeline.train(recipe, words, num_gpus=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Exit):
        pipeline.train(recipe, words, num_gpus=2)
    with pytest.raises(UserError, match="--num-gpus is 4, and this process sees 2 GPUs: ask for 2 or fewer"):
        pipeline.train(recipe, words, num_gpus=4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="LOCAL_RANK is 2, and this process sees 2 GPUs: start one process"):
        launch.init_distributed()


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
        subprocess.run(["bash", TOOL, "up", folder], check=True, timeout=60)
        lines = shlex.split((folder / "env").read_text())
        (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
        yield folder / "hostfile", dict(line.split("=", 1) for line in lines)
    finally:
        subprocess.run(["bash", TOOL, "down", folder], check=True, timeout=60)


Hosted = tuple[Path, dict[str, str]]


def over_pdsh(hosts: Hosted, *words: str | Path) -> subprocess.Popen[str]:
    """`blockft train WORDS` on both hosts, started from the first."""
    file, environment = hosts
    launch = ("--hostfile", file, "--ssh-port", "2222", "--master-port", "29545")
    return start("blockft", "train", *words, *launch, cwd=file.parent, inside="node0", **environment)


def rank_of(run: Path, rank: int) -> psutil.Process:
    """The process of a rank of a run on this machine, whatever its network namespace."""
    for process in psutil.process_iter():
        try:
            ours = f"train.output_dir={run}" in process.cmdline() and process.environ().get("RANK") == str(
                rank
            )
        except psutil.Error:
            continue
        if ours:
            return process
    raise AssertionError(f"no rank {rank} of {run}")


def wait_for_steps(run: Path, started: subprocess.Popen[str]) -> None:
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") >= 2):
        assert started.poll() is None, started.communicate()[0]
        time.sleep(0.2)


@pytest.mark.slow
@two_hosts_only
@pytest.mark.parametrize("form", ["blockft", "deepspeed"])
def test_two_hosts_over_pdsh_give_the_losses_of_two_processes_on_one(
    toy: Path, two_hosts: Hosted, form: str
) -> None:
    run = toy / f"by {form}, 100%h [a] $HOME" if form == "blockft" else toy / "by-deepspeed"
    words = (toy / "recipe.yaml", f"train.output_dir={run}")
    if form == "blockft":
        finish(over_pdsh(two_hosts, *words))
    else:
        file, environment = two_hosts
        launch = ("--hostfile", file, "--no_ssh_check", "--ssh_port", "2222", "--master_port", "29546")
        words = ("--master_addr", "10.77.0.1", "--module", "blockft", "train", *words)
        launch = ("deepspeed.launcher.runner", *launch, *words)
        finish(start(*launch, cwd=file.parent, inside="node0", **environment))
    assert losses(run) == losses(toy / "two")
    assert json.loads((complete_checkpoints(run)[-1] / "whole.json").read_text())["step"] == 5


@pytest.mark.slow
@two_hosts_only
def test_sigterm_lets_all_hosts_save_and_the_resumed_run_goes_on(toy: Path, two_hosts: Hosted) -> None:
    words = (toy / "recipe.yaml", "train.num_train_epochs=20", "train.save_steps=25")
    finish(start("blockft", "train", *words, f"train.output_dir={toy}/never", "--num-gpus", "2"))
    run = toy / "stopped"
    started = over_pdsh(two_hosts, *words, f"train.output_dir={run}")
    wait_for_steps(run, started)
    for process in psutil.Process(started.pid).children():
        process.send_signal(signal.SIGTERM)
    said = started.communicate()[0]
    assert started.returncode == 130, said
    (*_, last) = complete_checkpoints(run)
    assert 0 < len(losses(run)) < len(losses(toy / "never")) and last.name == f"checkpoint-{len(losses(run))}"
    finish(over_pdsh(two_hosts, *words, f"train.output_dir={run}", "--resume"))
    assert losses(run) == losses(toy / "never")


@pytest.mark.slow
@two_hosts_only
@pytest.mark.parametrize("when", ["before the first step", "while training"])
def test_a_host_that_fails_ends_the_other(toy: Path, two_hosts: Hosted, when: str) -> None:
    run = toy / f"killed-{when.split()[0]}"
    words = (
        toy / "recipe.yaml",
        f"train.output_dir={run}",
        "train.num_train_epochs=3000",
        "train.save_steps=1000000",
    )
    started = over_pdsh(two_hosts, *words)
    if when == "while training":
        wait_for_steps(run, started)
        rank_of(run, 1).kill()
    else:
        while True:
            try:
                rank_of(run, 1).kill()
                break
            except AssertionError:
                assert started.poll() is None, started.communicate()[0]
                time.sleep(0.2)
    killed_at = time.monotonic()
    said = started.communicate()[0]
    assert started.returncode not in (0, 130), said
    assert time.monotonic() - killed_at < 60
    with pytest.raises(AssertionError, match="no rank 0"):
        rank_of(run, 0)


@pytest.mark.slow
def test_the_slurm_script_gives_the_losses_of_two_processes(toy: Path, tmp_path: Path) -> None:
    environment = fake_slurm(tmp_path, f'exec {sys.executable} -m blockft "$@"')
    done = slurm(environment | {"GLOO_SOCKET_IFNAME": "lo"}, toy / "recipe.yaml", toy / "slurm")
    assert done.returncode == 0, done.stderr
    assert losses(toy / "slurm") == losses(toy / "two")
