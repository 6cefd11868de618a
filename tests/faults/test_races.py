"""Two commands at once on one folder: exactly one works, the other is refused before it writes anything."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest

from blockft.model.checkpoint import complete_checkpoints
from blockft.stages.cache import verify_cache
from tests.commands import all_logged, run_ranks, start_ranks, wait_until
from tests.faults.toy import (
    build_toy,
    cache_command,
    generate_command,
    read_files,
    read_report,
    train_command,
)
from tests.hold import Hold

TRAINING = ("train.save_steps=2", "train.max_steps=4", "train.deepspeed=zero0")

Arguments = Sequence[str | Path]
Holds = Callable[[str], Hold]


WORK = {
    "prepare": "blockft.stages.prepare:_prepare",
    "train": "blockft.stages.train:_train",
    "export": "blockft.stages.export:_export",
    "eval": "blockft.stages.evaluate:_evaluate",
}
"""The function of each command that works while the command holds its lock."""


@pytest.fixture
def holds(tmp_path_factory: pytest.TempPathFactory) -> Holds:
    """A function that returns a hold of a command before its work: the folder is locked by then."""
    return lambda command: Hold(tmp_path_factory.mktemp("hold"), WORK[command])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every command reads; its run has 4 steps."""
    texts = [f"{i} is a number." for i in range(60)]
    return build_toy(tmp_path_factory.mktemp("races"), TRAINING, texts, num_requests=15)


def short_training(toy: Path, run: Path, *more: str) -> list[str | Path]:
    return train_command(toy, run, *TRAINING, *more)


def prepare_command(toy: Path, out: Path, *more: str) -> list[str | Path]:
    return ["prepare", toy / "recipe.yaml", f"data.output_dir={out}", *more]


def eval_command(toy: Path, out: Path) -> list[str | Path]:
    return ["eval", toy / "export", toy / "recipe.yaml", f"eval.output_dir={out}"]


def race(
    hold: Hold, first: Arguments, second: Arguments
) -> tuple[CompletedProcess[str], CompletedProcess[str]]:
    """Run two commands at once; return the one that worked, then the other, which must be refused.

    The one that has the lock works when the other one has ended.
    """
    ranks = [start_ranks(*arguments, before=hold) for arguments in (first, second)]
    wait_until(lambda: hold.num_reached == 2 or not all(each.is_alive() for each in ranks))
    hold.release()
    worked, refused = sorted((each.wait() for each in ranks), key=lambda done: done.returncode)
    assert worked.returncode == 0, worked.stderr
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    return worked, refused


def check_refused(refused: CompletedProcess[str], command: str, use: str = "written") -> None:
    assert f"is being {use} by process " in refused.stderr
    assert f"(blockft {command}): wait for it, or choose another folder" in refused.stderr


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_two_trainings_in_one_folder(toy: Path, tmp_path: Path, holds: Holds) -> None:
    """The second one names the folder by another path."""
    (tmp_path / "link").symlink_to(tmp_path)
    paths = tmp_path / "run", tmp_path / "link" / ".." / tmp_path.name / "run"
    _, refused = race(holds("train"), *(short_training(toy, path) for path in paths))
    check_refused(refused, "train")
    assert all_logged(tmp_path / "run") == all_logged(toy / "run") and not hidden(tmp_path)


def test_two_resumes_of_one_run(toy: Path, tmp_path: Path, holds: Holds) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy / "run", run)
    shutil.rmtree(run / "checkpoint-4")
    _, refused = race(holds("train"), *[short_training(toy, run, "--resume")] * 2)
    check_refused(refused, "train")
    assert all_logged(run) == all_logged(toy / "run") and not hidden(tmp_path)


@pytest.mark.slow  # other races of the same lock
def test_a_training_on_two_ranks_beside_one_on_one_rank(toy: Path, tmp_path: Path, holds: Holds) -> None:
    run, hold = tmp_path / "run", holds("train")
    two = start_ranks(*short_training(toy, run), num_ranks=2, before=hold)
    hold.wait_until_reached(two.is_alive, num_processes=2)
    refused = run_ranks(*short_training(toy, run))
    check_refused(refused, "train")
    hold.release()
    assert refused.returncode == 2 and two.wait().returncode == 0
    assert len(all_logged(run)) == len(all_logged(toy / "run")) and not hidden(tmp_path)


def test_a_run_is_owned_until_its_last_rank_has_ended(toy: Path, tmp_path: Path) -> None:
    """A rank outlives the first one for a moment, in which it may still write."""
    run = tmp_path / "run"
    ranks = start_ranks(
        *short_training(
            toy, run, "train.max_steps=10000", "train.num_train_epochs=10000", "train.save_steps=10000"
        ),
        num_ranks=2,
    )
    wait_until((run / "metrics.jsonl").exists, ranks.is_alive)
    first, second = ranks.processes
    assert second.pid
    psutil.Process(second.pid).suspend()
    first.kill()
    first.join()
    refused = run_ranks(*short_training(toy, run, "--resume"))
    check_refused(refused, "train")
    assert refused.returncode == 2
    second.kill()
    second.join()
    assert run_ranks(*short_training(toy, run, "--resume")).returncode == 0
    assert all_logged(run) == all_logged(toy / "run")


@pytest.mark.slow  # other races of the same lock
def test_an_export_beside_the_training_of_its_run(toy: Path, tmp_path: Path, holds: Holds) -> None:
    """The run keeps the checkpoint that is being exported, and removes it later."""
    run, out, hold = tmp_path / "run", tmp_path / "model", holds("export")
    shutil.copytree(toy / "run", run)
    shutil.rmtree(run / "checkpoint-4")
    exporting = start_ranks("export", run, out, before=hold)
    hold.wait_until_reached(exporting.is_alive)
    assert (run / ".checkpoint-2.lock").exists()
    resumed = run_ranks(*short_training(toy, run, "train.save_total_limit=1", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    hold.release()
    assert exporting.wait().returncode == 0
    assert "after 2 steps" in (out / "README.md").read_text() and not hidden(tmp_path)


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_two_prepares_of_one_folder(toy: Path, tmp_path: Path, holds: Holds, more: tuple[str, ...]) -> None:
    out = tmp_path / "data"
    if more:
        shutil.copytree(toy / "data", out)
    _, refused = race(holds("prepare"), *[prepare_command(toy, out, *more)] * 2)
    check_refused(refused, "prepare")
    assert read_files(out) == read_files(toy / "data") and not hidden(tmp_path)


def test_a_folder_that_appears_while_prepare_works_stays(toy: Path, tmp_path: Path, holds: Holds) -> None:
    for was_there in (False, True):
        out, hold = tmp_path / str(was_there), holds("prepare")
        if was_there:
            out.mkdir()  # an empty folder may be replaced, but not the file that appears in it
        ranks = start_ranks(*prepare_command(toy, out), before=hold)
        hold.wait_until_reached(ranks.is_alive)
        out.mkdir(exist_ok=True)
        (out / "precious").touch()
        hold.release()
        done = ranks.wait()
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert [path.name for path in out.iterdir()] == ["precious"] and not hidden(tmp_path)


@pytest.mark.slow  # other races of the same lock
def test_prepare_beside_a_training_on_its_data(toy: Path, tmp_path: Path, holds: Holds) -> None:
    data, run, hold = tmp_path / "data", tmp_path / "run", holds("train")
    shutil.copytree(toy / "data", data)
    on_data = f"data.output_dir={data}"
    training = start_ranks(*short_training(toy, run, on_data), before=hold)
    hold.wait_until_reached(training.is_alive)
    refused = run_ranks(*prepare_command(toy, data, "--overwrite"))
    check_refused(refused, "train", use="read")
    hold.release()
    assert training.wait().returncode == 0
    hold = holds("prepare")
    preparing = start_ranks(*prepare_command(toy, data, "--overwrite"), before=hold)
    hold.wait_until_reached(preparing.is_alive)
    refused = run_ranks(*short_training(toy, tmp_path / "run2", on_data))
    check_refused(refused, "prepare")
    hold.release()
    assert preparing.wait().returncode == 0
    assert read_files(data) == read_files(toy / "data") and not hidden(tmp_path)
    assert all_logged(run) == all_logged(toy / "run") and not (tmp_path / "run2").exists()


@pytest.mark.slow  # other races of the same lock
def test_two_exports_to_one_folder(toy: Path, tmp_path: Path, holds: Holds) -> None:
    _, refused = race(holds("export"), *[["export", toy / "run", tmp_path / "export"]] * 2)
    check_refused(refused, "export")
    assert read_files(tmp_path / "export") == read_files(toy / "export") and not hidden(tmp_path)


@pytest.mark.slow  # other races of the same lock
def test_two_evaluations_into_one_folder(toy: Path, tmp_path: Path, holds: Holds) -> None:
    assert run_ranks(*eval_command(toy, tmp_path / "alone")).returncode == 0
    _, refused = race(holds("eval"), *[eval_command(toy, tmp_path / "eval")] * 2)
    check_refused(refused, "eval")
    assert read_report(tmp_path / "eval") == read_report(tmp_path / "alone") and not hidden(tmp_path)


@pytest.mark.slow  # other races of the same lock
def test_two_builds_of_one_cache_and_a_prune_beside_answers(toy: Path, tmp_path: Path) -> None:
    """A cache has any number of writers."""
    cache = tmp_path / "cache"
    builds = [start_ranks(*cache_command(toy, cache)) for _ in range(2)]
    for build in builds:
        done = build.wait()
        assert done.returncode == 0 and " blocks in " in done.stdout, done.stderr
    verify_cache(cache)
    expected = run_ranks(*generate_command(toy, tmp_path / "other")).stdout
    answering = start_ranks(*generate_command(toy, cache))
    while answering.is_alive():
        assert run_ranks("cache", "prune", cache, "--max-bytes", "0").returncode == 0
    answered = answering.wait()
    assert answered.returncode == 0, answered.stderr
    fields = [
        [json.loads(line)["answer"] for line in text.splitlines()] for text in (expected, answered.stdout)
    ]
    assert fields[0] == fields[1]
    verify_cache(cache)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["prepare", "{recipe}", "data.output_dir={toy}/run/data"], "lies inside train.output_dir"),
        (["prepare", "{recipe}", "data.output_dir={toy}"], "contains model.path"),
        (["prepare", "{recipe}", "data.output_dir={toy}/model"], "is model.path"),
        (
            ["prepare", "{recipe}", "data.output_dir={toy}/x", "train.output_dir={toy}/x/y"],
            "contains train.output_dir",
        ),
        (
            ["prepare", "{recipe}", "data.output_dir={toy}/new", "train.output_dir={toy}/new"],
            "is train.output_dir",
        ),
        (["prepare", "{recipe}", "data.output_dir={toy}/export/../run/data"], "lies inside train.output_dir"),
        (["train", "{recipe}", "train.output_dir={toy}/data"], "is data.output_dir"),
        (["train", "{recipe}", "train.output_dir={toy}/data/run"], "lies inside data.output_dir"),
        (["train", "{recipe}", "train.output_dir={toy}/export", "model.path={toy}/export"], "is model.path"),
        (["export", "{toy}/run", "{toy}/run/model"], "lies inside the run"),
        (["export", "{toy}/run", "{toy}/run/checkpoint-4/model"], "lies inside the checkpoint"),
        (["export", "{toy}/run", "{toy}/data/model"], "lies inside the prepared folder"),
        (
            ["eval", "{toy}/export", "{recipe}", "eval.output_dir={toy}/cache/eval"],
            "lies inside the block cache",
        ),
        (["eval", "{toy}/export", "{recipe}", "eval.output_dir={toy}/export"], "is the model"),
    ],
)
def test_an_output_that_would_harm_another_folder_is_refused(
    command: list[str], reason: str, toy: Path
) -> None:
    if not (toy / "cache").exists():
        assert run_ranks(*cache_command(toy, toy / "cache")).returncode == 0
    before = read_files(toy)
    arguments = [word.format(toy=toy, recipe=toy / "recipe.yaml") for word in command]
    done = run_ranks(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert reason in done.stderr and "Traceback" not in done.stderr
    assert read_files(toy) == before
