"""Commands that are killed at any moment: the same command then ends well, as if it had never been killed.

Each trial kills a command by SIGKILL, at a random time or before one of its changes of files, and runs it
again. The slow tests try 20 changes of each command, evenly spaced; BLOCKFT_KILL_POINTS sets another number.
"""

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from safetensors.numpy import load_file

from blockft.model.checkpoint import REFERENCE_LOGITS, complete_checkpoints, find_checkpoint
from blockft.outputs import lock_output_folder
from blockft.stages.cache import verify_cache
from tests.commands import all_logged, run_ranks, start_ranks
from tests.faults.kill_points import KillPoint
from tests.faults.toy import (
    build_toy,
    cache_command,
    generate_command,
    read_files,
    read_report,
    train_command,
)

NUM_KILL_POINTS = int(os.environ.get("BLOCKFT_KILL_POINTS", "20"))

TRAINING = ("train.save_steps=2", "train.max_steps=6", "train.num_eval_examples=4", "train.eval_steps=3")


def read_run(run: Path) -> Any:
    """Return what a run has logged, its checkpoints, and the logits of the last one."""
    logits = load_file(find_checkpoint(run) / REFERENCE_LOGITS)["logits"].tolist()
    return all_logged(run), [path.name for path in complete_checkpoints(run)], logits


def read_cache(folder: Path) -> list[str]:
    """Verify every entry of a cache, and return the names of its entries."""
    verify_cache(folder)
    return sorted(path.name for path in folder.rglob("*.safetensors"))


@dataclass(frozen=True)
class Verb:
    """A command that writes a folder.

    command: its arguments, given the toy folder and the folder to write.
    outcome: what must not depend on a kill: the content of the folder, or what the command printed.
    """

    command: Callable[[Path, Path], Sequence[str | Path]]
    outcome: Callable[[Path], Any]
    num_ranks: int = 1
    resumes: bool = False
    answers: bool = False

    def arguments(self, toy: Path, out: Path) -> list[str | Path]:
        return [*self.command(toy, out), *(["--resume"] if self.resumes and out.exists() else [])]

    def read(self, out: Path, done: CompletedProcess[str]) -> Any:
        if not self.answers:
            return self.outcome(out)
        fields = ("id", "answer", "answer_ids", "prompt_tokens")
        return [{name: json.loads(line)[name] for name in fields} for line in done.stdout.splitlines()]


def long_training(toy: Path, run: Path) -> list[str | Path]:
    return train_command(toy, run, *TRAINING)


def teacher_command(toy: Path, out: Path) -> list[str | Path]:
    """Prepare two sources, the first with the answers of a local teacher."""
    source = f"format: samples, path: {toy}/train.jsonl"
    settings = ("batch_size: 4", "max_new_tokens: 2", "temperature: 1")
    return [
        "prepare",
        toy / "recipe.yaml",
        f"data.output_dir={out}",
        f"data.sources=[{{{source}, response: teacher}}, {{{source}}}]",
        f"data.teacher={{model: {toy}/model, {', '.join(settings)}}}",
    ]


def read_taught(out: Path) -> dict[str, bytes]:
    """Return the files of a prepared folder, and the answers of its teacher."""
    return read_files(out) | {"answers": out.with_name(f"{out.name}.answers.jsonl").read_bytes()}


VERBS = {
    "prepare": Verb(
        lambda toy, out: ["prepare", toy / "recipe.yaml", f"data.output_dir={out}", "data.num_workers=2"],
        read_files,
    ),
    "prepare-teacher": Verb(teacher_command, read_taught),
    "train": Verb(long_training, read_run, resumes=True),
    "train-2-ranks": Verb(long_training, read_run, num_ranks=2, resumes=True),
    "export": Verb(lambda toy, out: ["export", toy / "run", out], read_files),
    "eval": Verb(
        lambda toy, out: [
            "eval",
            toy / "export",
            toy / "recipe.yaml",
            f"eval.output_dir={out}",
            "eval.batch_size=2",
        ],
        read_report,
    ),
    "cache-build": Verb(cache_command, read_cache),
    "generate": Verb(generate_command, read_cache, answers=True),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every command reads: data, a run, its export, requests and documents."""
    rng = random.Random(0)
    texts = [f"{rng.random()} is a number." for _ in range(100)]
    return build_toy(tmp_path_factory.mktemp("kills"), TRAINING, texts, num_requests=6)


@pytest.fixture(scope="module")
def undisturbed(toy: Path) -> dict[str, tuple[Any, float]]:
    """The outcome and the duration in seconds of each command; filled as the tests need them."""
    return {}


def run_undisturbed(name: str, toy: Path, known: dict[str, tuple[Any, float]]) -> tuple[Any, float]:
    if name not in known:
        verb = VERBS[name]
        for attempt in range(2):  # the first call also starts the warm process
            start = time.monotonic()
            out = toy / "undisturbed" / f"{name}-{attempt}" / "out"
            done = run_ranks(*verb.arguments(toy, out), num_ranks=verb.num_ranks)
            assert done.returncode == 0, done.stderr
            known[name] = verb.read(out, done), time.monotonic() - start
    return known[name]


def repeat(verb: Verb, toy: Path, out: Path) -> Any:
    """Run a command again that was killed, until its end, and return its outcome."""
    if verb.outcome in (read_files, read_report, read_taught) and out.exists():
        return verb.read(out, CompletedProcess([], 0, "", ""))  # it was killed after its work was done
    done = run_ranks(*verb.arguments(toy, out), num_ranks=verb.num_ranks)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return verb.read(out, done)


def check_what_is_left(name: str, out: Path) -> None:
    """Check that a command that was killed and repeated has left no hidden files in or beside its folder."""
    if VERBS[name].answers or name == "cache-build":
        return
    # a command that was killed at its very end is not repeated, but its folder has no hidden files for ever
    with lock_output_folder(out, "test"):
        pass
    left = {path.name for path in [*out.parent.iterdir(), *out.iterdir()] if path.name.startswith(".")}
    # the next `prepare` removes the lock of its cache
    assert left <= {".out.cache.lock"}, left


@pytest.mark.parametrize("name", VERBS)
def test_a_command_that_is_killed_at_a_random_time_ends_as_if_it_was_never_killed(
    name: str, toy: Path, undisturbed: dict[str, tuple[Any, float]]
) -> None:
    verb, (expected, duration_s) = VERBS[name], run_undisturbed(name, toy, undisturbed)
    for seed in range(2):
        rng = random.Random(f"{name} {seed}")
        out = toy / "trials" / f"{name}-{seed}" / "out"
        delay_s = rng.uniform(0, 1.05) * duration_s
        ranks = start_ranks(*verb.arguments(toy, out), num_ranks=verb.num_ranks)
        time.sleep(delay_s)
        rng.choice(ranks.processes).kill()  # the other ranks end by themselves, or are killed
        ranks.wait_or_kill(rng.random())
        assert repeat(verb, toy, out) == expected, (seed, delay_s)
        check_what_is_left(name, out)


def run_until(point: KillPoint, verb: Verb, toy: Path, out: Path) -> list[str]:
    """Run a command until it is killed or ends, and return the names of its changes of files up to there."""
    ranks = start_ranks(*verb.arguments(toy, out), num_ranks=verb.num_ranks, before=point)
    ranks.processes[0].join()
    ranks.wait_or_kill(random.Random(point.number).random())
    return point.log.read_text().splitlines()


@pytest.mark.slow  # 160 commands are killed and repeated: five minutes
@pytest.mark.parametrize("name", VERBS)
def test_a_command_that_is_killed_before_a_change_of_files_ends_as_if_it_was_never_killed(
    name: str, toy: Path, undisturbed: dict[str, tuple[Any, float]]
) -> None:
    verb, (expected, _) = VERBS[name], run_undisturbed(name, toy, undisturbed)
    out, log = toy / "counted" / name / "out", toy / f"{name}.log"
    num_changes = len(run_until(KillPoint(out.parent, log), verb, toy, out))
    num_points, num_killed = min(NUM_KILL_POINTS, num_changes), 0
    for number in [num_changes - i * num_changes // num_points for i in range(num_points)]:
        out, log = toy / "points" / f"{name}-{number}" / "out", toy / f"{name}-{number}.log"
        changes = run_until(KillPoint(out.parent, log, number), verb, toy, out)
        num_killed += len(changes) == number
        assert repeat(verb, toy, out) == expected, changes[-1]
        check_what_is_left(name, out)
    # threads may change files in another order, and a command that ends earlier is not killed
    assert num_killed >= num_points - 2
