"""When one rank ends before its time, all others end at once and name it, without the help of a launcher."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from blockft import cli
from blockft.cli import commands as cli_commands
from blockft.errors import UserError
from blockft.stages.prepare import prepare
from blockft.training import distributed, rank_relay, rank_watch
from blockft.training.rank_relay import RankRelay
from tests.commands import (
    PYTHON_PATH,
    Ranks,
    fork_ranks,
    free_port,
    logged,
    start,
    start_ranks,
    wait_until,
)
from tests.run import toy_recipe

LONELY = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "3",
    "MASTER_ADDR": "127.0.0.1",
}
"""Variables of a rank whose others never start, without a port."""

LIMIT_S = 300
"""Ranks that have not ended by then are killed. A collective waits for twice as long."""


def do_nothing() -> None:
    pass


def run_watched(arguments: list[str], work: Callable[[rank_watch.RankWatch], object]) -> int:
    """Do the work of one rank as `blockft train` would: under the watch, inside the command line."""
    distributed.set_worker_environment()
    with rank_watch.watching_ranks(has_just_started=True) as watch:
        assert watch
        work(watch)
    return 0


def call_command_line(
    work: Callable[[rank_watch.RankWatch], object], before: Callable[[], None] = do_nothing
) -> None:
    # messages between the ranks of a machine that is slow for a while
    rank_watch.REPLY_S, rank_watch.LATE_S, rank_watch.CONNECT_BEFORE_ERROR_S = 120, 120, 120
    rank_watch.REPORT_AFTER_S = rank_relay.REPORT_AFTER_S = LIMIT_S
    before()
    cli_commands.parse_and_run = partial(run_watched, work=work)
    cli.main()


def run_ranks(
    work: Callable[[rank_watch.RankWatch], object],
    num_ranks: int = 3,
    before: Callable[[], None] = do_nothing,
    **environment: str,
) -> Ranks:
    command = partial(call_command_line, work, before)
    ranks = fork_ranks(command, num_ranks=num_ranks, GLOO_SOCKET_IFNAME="lo", **environment)
    ranks.wait_or_kill(LIMIT_S)
    return ranks


def exit_codes(ranks: Ranks) -> list[int | None]:
    return [process.exitcode for process in ranks.processes]


def is_rank(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


def reduce_forever() -> None:
    tensor = torch.ones(4)
    while True:
        dist.all_reduce(tensor)


def fail_while_reducing(rank: int, fail: Callable[[], object], watch: rank_watch.RankWatch) -> None:
    distributed.init_distributed(watch)
    if is_rank(rank):
        dist.all_reduce(torch.ones(4))
        fail()
    reduce_forever()


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_user_error() -> None:
    raise UserError("the disk is full: free some space")


def raise_internal_error() -> None:
    raise ValueError("too few dimensions")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_rank_is_named_by_one_other_rank(rank: int) -> None:
    ranks = run_ranks(partial(fail_while_reducing, rank, kill_this_process))
    codes = exit_codes(ranks)
    assert codes.pop(rank) == -signal.SIGKILL and codes == [2, 2]
    assert ranks.output("stderr").count("\n") == 1, ranks.output("stderr")
    line = ranks.output("stderr")
    assert line.startswith(f"blockft: rank {rank} on ") and "it was killed" in line


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_mistake_of_any_rank_is_printed_once(rank: int) -> None:
    ranks = run_ranks(partial(fail_while_reducing, rank, raise_user_error))
    assert exit_codes(ranks) == [2, 2, 2]
    lines = [line for line in ranks.output("stderr").splitlines() if line.startswith("blockft: ")]
    assert lines == ["blockft: the disk is full: free some space"]


def test_a_mistake_that_all_ranks_find_is_printed_once() -> None:
    ranks = run_ranks(fail_together)
    assert exit_codes(ranks) == [2, 2, 2]
    lines = [line for line in ranks.output("stderr").splitlines() if line.startswith("blockft: ")]
    assert lines == ["blockft: the disk is full: free some space"]


def fail_together(watch: rank_watch.RankWatch) -> None:
    distributed.init_distributed(watch)
    raise_user_error()


def test_the_traceback_of_an_internal_error_comes_first() -> None:
    ranks = run_ranks(partial(fail_while_reducing, 1, raise_internal_error))
    assert exit_codes(ranks) == [1, 1, 1]
    errors = ranks.output("stderr")
    assert errors.count("ValueError: too few dimensions") == 1 and errors.startswith("Traceback")


def fail_before_connecting(watch: rank_watch.RankWatch) -> None:
    if is_rank(1):
        raise_user_error()
    distributed.init_distributed(watch)


@pytest.mark.parametrize("late_rank", [0, 1])
def test_a_rank_that_fails_before_the_ranks_connect_ends_all(late_rank: int) -> None:
    ranks = run_ranks(partial(start_late, late_rank, fail_before_connecting), num_ranks=2)
    assert exit_codes(ranks) == [2, 2]
    assert ranks.output("stderr").count("the disk is full") == 1


def start_late(
    rank: int, work: Callable[[rank_watch.RankWatch], object], watch: rank_watch.RankWatch
) -> None:
    if is_rank(rank):
        time.sleep(1)
    work(watch)


@pytest.mark.parametrize("name", ["Python", "blockft", "the code of blockft", "torch", "transformers"])
def test_another_version_on_one_rank_is_named_before_the_ranks_connect(name: str) -> None:
    ranks = run_ranks(connect_only, before=partial(change_fact, name), num_ranks=2)
    assert exit_codes(ranks) == [2, 2]
    (line,) = [line for line in ranks.output("stderr").splitlines() if line.startswith("blockft: ")]
    if name == "the code of blockft":
        assert "and rank 0 have different files of the package blockft: install" in line
    else:
        assert f"has {name} 0.0.9, but rank 0 has " in line


def change_fact(name: str) -> None:
    if is_rank(1):
        facts = rank_watch.list_package_facts() | {name: "0.0.9"}
        rank_watch.list_package_facts = lambda: facts


def connect_only(watch: rank_watch.RankWatch) -> None:
    distributed.init_distributed(watch)
    raise AssertionError("the ranks have connected")


def test_ranks_that_do_not_connect_are_named() -> None:
    port = str(free_port())
    ranks = run_ranks(
        connect_only, before=end_the_wait_after_its_remark, num_ranks=1, **LONELY, MASTER_PORT=port
    )
    assert exit_codes(ranks) == [2]
    remark, error = ranks.output("stderr").splitlines()
    assert remark.startswith("blockft: rank 0 waits for 2 of 3 ranks at 127.0.0.1:")
    assert remark.endswith(": 1, 2")
    assert error.startswith("blockft: rank 1 on its host has not connected to 127.0.0.1:")


def test_a_rank_that_cannot_reach_the_first_host_says_so() -> None:
    variables = LONELY | {"RANK": "2", "MASTER_PORT": str(free_port())}
    ranks = run_ranks(connect_only, before=end_the_wait_after_its_remark, num_ranks=1, **variables)
    assert exit_codes(ranks) == [2]
    *_, remark, error = ranks.output("stderr").splitlines()
    assert remark.startswith("blockft: rank 2 waits for rank 0 at 127.0.0.1:")
    assert error.startswith("blockft: rank 2 cannot reach rank 0 at 127.0.0.1:")


def end_the_wait_after_its_remark() -> None:
    """Make the time limit pass when this rank has said that it waits; rank 0 first connects to itself."""
    rank_watch.REPORT_AFTER_S = rank_relay.REPORT_AFTER_S = 1
    notify, check_missing = rank_watch.notify, RankRelay._check_missing

    def notify_and_end(message: str) -> None:
        notify(message)
        watch = rank_watch._active
        assert watch
        watch._deadline = 0
        if watch._relay:
            watch._relay._deadline = 0

    def check_others(relay: RankRelay) -> None:
        if 0 not in relay._missing and rank_watch._active:
            check_missing(relay)

    rank_watch.notify = rank_relay.notify = notify_and_end
    RankRelay._check_missing = check_others


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_is_killed_before_it_connects_ends_the_others(rank: int) -> None:
    """The others do not wait until the time limit, because the ranks of a host start at the same moment."""
    ranks = run_ranks(connect_only, before=partial(be_killed_at_once, rank), LOCAL_WORLD_SIZE="3")
    codes = exit_codes(ranks)
    assert codes.pop(rank) == -signal.SIGKILL and codes == [2, 2]
    lines = [line for line in ranks.output("stderr").splitlines() if "it ended without a message" in line]
    if rank == 0:
        assert len(lines) == 2 and "cannot reach rank 0 of the same host at 127.0.0.1:" in lines[0]
    else:
        (line,) = lines
        assert line.startswith(f"blockft: rank {rank} on ") and "has not connected, but rank " in line


def be_killed_at_once(rank: int) -> None:
    """Kill a rank. The others wait for it for a second when all of them have connected."""
    rank_watch.SIBLING_S, rank_relay.SIBLING_S = 1, LIMIT_S
    check_missing = RankRelay._check_missing

    def check_last(relay: RankRelay) -> None:
        if len(relay._missing) == 1:
            rank_relay.SIBLING_S = 1
        check_missing(relay)

    RankRelay._check_missing = check_last
    if is_rank(rank):
        kill_this_process()


@pytest.mark.parametrize("num_local", ["", "1", "2", "many", "4"])
def test_ranks_that_do_not_start_at_the_same_moment_are_waited_for(num_local: str) -> None:
    """Where the launcher does not say that a host has both ranks, or where its word cannot be true."""
    work = partial(start_late, 1, fail_before_connecting)
    before = partial(connect_late, 1)
    environment = {"LOCAL_WORLD_SIZE": num_local} if num_local != "2" else {}
    ranks = run_ranks(work, 2, before, **environment)
    assert exit_codes(ranks) == [2, 2]
    assert ranks.output("stderr").count("the disk is full") == 1


def connect_late(rank: int) -> None:
    rank_watch.SIBLING_S = rank_relay.SIBLING_S = 0
    if is_rank(rank):
        time.sleep(3)


def test_a_later_watch_of_a_process_waits_for_slow_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a host are together only at their start: `blockft.train` may be called at any time."""
    for name, value in (LONELY | {"LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    place = rank_watch.RankPlace.from_environment
    assert (place(has_just_started=True).num_local, place(has_just_started=False).num_local) == (3, 1)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        ranks = run_ranks(connect_only, num_ranks=1, **LONELY | {"MASTER_PORT": port})
    assert exit_codes(ranks) == [2]
    assert f"blockft: port {port} of the first host is in use" in ranks.output("stderr")


def test_ranks_that_cannot_connect_to_each_other_end_with_the_interface(tmp_path: Path) -> None:
    ranks = run_ranks(partial(never_join, 1), before=shorten_group_time, num_ranks=2)
    assert exit_codes(ranks) == [2, 2]
    assert ranks.output("stderr").count("name the network interface between the hosts with GLOO_SOCKET") == 1


def shorten_group_time() -> None:
    distributed.GROUP_TIMEOUT_S = 3
    rank_watch.REPLY_S = 15  # rank 1 waits for so long, and rank 0 prints the message meanwhile


def never_join(rank: int, watch: rank_watch.RankWatch) -> None:
    if is_rank(rank):
        dist.barrier = lambda **options: time.sleep(3600)
    distributed.init_distributed(watch)


def test_a_rank_that_is_slow_or_stopped_ends_no_run(tmp_path: Path) -> None:
    work = partial(be_slow, tmp_path)
    ranks = fork_ranks(partial(call_command_line, work), num_ranks=2, GLOO_SOCKET_IFNAME="lo")
    stopped = ranks.processes[1].pid
    assert stopped
    wait_until((tmp_path / "is-slow").exists, ranks.is_alive)
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(4)
    os.kill(stopped, signal.SIGCONT)
    (tmp_path / "may-go-on").touch()
    assert ranks.wait().returncode == 0
    assert ranks.output("stderr") == ""


def be_slow(folder: Path, watch: rank_watch.RankWatch) -> None:
    distributed.init_distributed(watch)
    if is_rank(1):
        (folder / "is-slow").touch()
        wait_until((folder / "may-go-on").exists)
    dist.all_reduce(torch.ones(4))
    distributed.shutdown_distributed()


def test_a_child_of_a_killed_rank_does_not_hide_its_end() -> None:
    ranks = run_ranks(fork_and_die, num_ranks=2)
    assert exit_codes(ranks) == [2, -signal.SIGKILL]
    assert "rank 1 on " in ranks.output("stderr")


def fork_and_die(watch: rank_watch.RankWatch) -> None:
    distributed.init_distributed(watch)
    if is_rank(1):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        kill_this_process()
    time.sleep(2 * LIMIT_S)


@pytest.mark.parametrize("place", ["before", "inside", "after"])
def test_an_exception_around_a_collective_of_a_training_ends_it(place: str, tmp_path: Path) -> None:
    prepare(toy_recipe(tmp_path))
    run = tmp_path / "run"
    settings = ("train.num_train_epochs=3000", "train.save_steps=1000000")
    ranks = start_ranks(
        "train", tmp_path / "recipe.yaml", *settings, num_ranks=2, before=partial(fail_in_training, place)
    )
    ranks.wait_or_kill(LIMIT_S)
    assert exit_codes(ranks) == [1, 1]
    errors = ranks.output("stderr")
    assert "ValueError: too few dimensions" in errors and "Traceback" in errors
    assert len(logged(run)) >= 1


def fail_in_training(place: str) -> None:
    """Make rank 1 fail in its third step: before, inside or after the reduction of the gradients."""
    from deepspeed import DeepSpeedEngine

    if not is_rank(1):
        return
    name = {"before": "forward", "inside": "allreduce_gradients", "after": "step"}[place]
    original, calls = getattr(DeepSpeedEngine, name), count()

    def fail_later(*arguments: object, **options: object) -> object:
        if next(calls) == 4:
            raise_internal_error()
        return original(*arguments, **options)

    setattr(DeepSpeedEngine, name, fail_later)


BREAK_IMPORT = """
import os, sys, time
from pathlib import Path
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "typer":
            return
        from blockft.training import rank_watch
        assert rank_watch._active._is_connected.wait({limit_s})
        folder = Path(__file__).parent
        (folder / ("connected-" + os.environ["RANK"])).touch()
        if os.environ["RANK"] == "{rank}":
            while len(list(folder.glob("connected-*"))) < 2:
                time.sleep(0.01)
            {action}
        time.sleep(3600)
if "RANK" in os.environ:
    sys.meta_path.insert(0, Finder())
"""
"""Python runs it as sitecustomize at the start of every rank: one fails, the other one imports for long."""

MISTAKE = "from blockft.errors import UserError; raise UserError('no key: get one')"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        (MISTAKE, 2, "blockft: no key: get one"),
        ("raise ImportError('no libtoy')", 1, "ImportError: no libtoy"),
        ("os.kill(os.getpid(), 9)", 2, "blockft: rank {rank} on "),
    ],
)
def test_a_rank_that_fails_while_it_imports_ends_the_others(
    rank: int, action: str, code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAK_IMPORT.format(action=action, rank=rank, limit_s=LIMIT_S))
    port, processes = str(free_port()), []
    for i in range(2):
        variables = {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2", "MASTER_PORT": port}
        variables |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": f"{tmp_path}:{PYTHON_PATH}"}
        processes.append(start("blockft", "train", "demo", **variables))
    output = "".join(process.communicate()[0] for process in processes)
    codes = [process.returncode for process in processes]
    expected = [code, code]
    if "kill" in action:
        expected[rank] = -signal.SIGKILL
    assert codes == expected, output
    assert output.count(message.format(rank=rank)) == 1, output


def test_an_unknown_command_or_a_plan_of_a_rank_starts_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (LONELY | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_watch, "watching_ranks", lambda **options: raise_internal_error())
    for arguments in (["recipes"], ["train", "demo", "--dry-run"], ["train", "--help"], []):
        with cli._watching_ranks(arguments):
            pass
    with pytest.raises(ValueError, match="too few"):
        cli._watching_ranks(["train", "demo"])


def test_a_rank_that_is_started_twice_or_of_another_run_is_named() -> None:
    ranks = run_ranks(connect_only, before=become_twin, num_ranks=3)
    assert exit_codes(ranks) == [2, 2, 2]
    assert "rank 1 on " in ranks.output("stderr") and "was started a second time" in ranks.output("stderr")
    ranks = run_ranks(connect_only, before=grow, num_ranks=2)
    assert exit_codes(ranks) == [2, 2]
    assert "rank 1 on " in ranks.output("stderr")
    assert "belongs to a run of 5 ranks, but rank 0 to one of 2" in ranks.output("stderr")


def become_twin() -> None:
    if is_rank(2):
        os.environ |= {"RANK": "1", "LOCAL_RANK": "1"}


def grow() -> None:
    if is_rank(1):
        os.environ["WORLD_SIZE"] = "5"


def test_another_program_at_the_port_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=answer_like_a_web_server, args=(server,), daemon=True).start()
        variables = LONELY | {"RANK": "2", "MASTER_PORT": str(server.getsockname()[1])}
        ranks = run_ranks(connect_only, before=shorten_patience, num_ranks=1, **variables)
    assert exit_codes(ranks) == [2]
    line = ranks.output("stderr").splitlines()[-1]
    assert line.startswith(
        "blockft: rank 2 cannot reach rank 0, because another program answers at 127.0.0.1:"
    )


def answer_like_a_web_server(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def shorten_patience() -> None:
    rank_watch.OTHER_PROGRAM_S = 1
