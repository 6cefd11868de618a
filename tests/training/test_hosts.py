"""Hostfiles and launches that are refused before any host starts, and how arguments reach other hosts."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockft.config.recipe import RECIPES_FOLDER
from blockft.errors import UserError
from blockft.training.hosts import read_environment_files, read_hostfile
from blockft.training.library_internals import quote_for_remote_shell
from tests.commands import blockft
from tests.training.hosts import node_options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "names no host"),
        ("# none\n\n", "names no host"),
        ("a slots=1\nb\n", "line 2 is 'b'"),
        ("a slots=0\n", "line 1"),
        ("a slots=two\n", "line 1"),
        ("a slots=2x\n", "line 1"),
        ("a slots=1\n\na slots=1\n", "line 3 names a again"),
        ("node[0-3] slots=1\n", "line 1"),
    ],
)
def test_an_unreadable_hostfile_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_hostfile(tmp_path / "hosts")


def test_deepspeed_reads_the_shipped_hostfile_like_blockft() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = RECIPES_FOLDER / "launch" / "hostfile"
    assert read_hostfile(path) == dict(fetch_hostfile(str(path))) == {"node0": 8, "node1": 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node-rank", "0"], "--hostfile"),
        (["--master-port", "29500"], "--hostfile"),
        (["--hostfile", "no/such"], "no/such"),
        (["--hostfile", "{hosts}", "--num-gpus", "2"], "--num-gpus"),
        (["--hostfile", "{hosts}", "--no-ssh"], "--node-rank"),
        (["--hostfile", "{hosts}", "--no-ssh", "--node-rank", "2"], "hosts 0 to 1"),
        (["--hostfile", "{hosts}", "--no-ssh", "--node-rank", "-1"], "hosts 0 to 1"),
        (["--hostfile", "{hosts}", "--node-rank", "0"], "--no-ssh"),
        (["--hostfile", "{hosts}", "--no-ssh", "--node-rank", "0"], "--master-addr"),
        (["--hostfile", "{hosts}"], "--no-ssh --node-rank"),
        (["train.batch_rows=3", *node_options(0, Path("{hosts}"), 29543)], "multiple of 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_impossible_launch_is_refused(hostfile: Path, arguments: list[str], message: str) -> None:
    """On a machine that resolves neither host and has no pdsh on PATH."""
    run = hostfile.parent / "run"
    options = [argument.format(hosts=hostfile) for argument in arguments]
    done = blockft("train", "demo", f"train.output_dir={run}", *options, PATH="/nowhere")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("blockft: ")
    assert message in done.stderr
    assert not run.exists()


def test_a_launcher_inside_a_run_and_a_bad_environment_file_are_refused(
    hostfile: Path, tmp_path: Path
) -> None:
    arguments = ("train", "demo", "--dry-run", *node_options(1, hostfile, 29544))
    assert blockft(*arguments, RANK="0").stderr.startswith("blockft: RANK is set")
    (tmp_path / ".deepspeed_env").write_text("A=1\n# a comment\n")
    assert blockft(*arguments, cwd=tmp_path).stderr == (
        "blockft: .deepspeed_env, line 2 is '# a comment': every line must be NAME=VALUE\n"
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab =[]{},:$`\\\"'%*;&(~#é"), min_size=1), min_size=1, max_size=3))
def test_arguments_reach_other_hosts_unchanged(arguments: list[str]) -> None:
    """Through DeepSpeed's quoting, pdsh's % and the remote shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    quoted = [quote_for_remote_shell(argument) for argument in arguments]
    runner = SimpleNamespace(args=SimpleNamespace(user_args=quoted))
    line = " ".join(PDSHRunner.parse_user_args(runner)).replace("%%", "%")
    done = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == arguments


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_user_without_a_home_folder_has_the_environment_file_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    assert read_environment_files() == {}
    (tmp_path / ".deepspeed_env").write_text("A=1\n")
    assert read_environment_files() == {"A": "1"}
