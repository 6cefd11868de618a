"""A real model answers 200 questions, locally and behind a real server; `prepare` is killed three times."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from tests.commands import free_port, run_ranks, start_ranks, wait_until
from tests.endpoint import Reply, completion, endpoint, error
from tests.hold import Hold
from tests.readmes import DEMO_MODEL
from tests.stages.test_prepare import files

NUM_KILLS = 3
CONCURRENCY = 3

TWO_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
"""Environment of the server that holds the model."""

FAULTS = (
    Reply(status=429, body=error("slow down"), headers={"Retry-After": "0.2"}),
    Reply(status=500, body=error("broken")),
    Reply(body=json.dumps(completion("cut")).encode()[:50], declared=500),
    Reply(body=b"<html>busy</html>"),
    Reply(body=completion("x") | {"choices": []}),
)
"""What a server sends now and then. A fault that is a long wait is in the quick tests."""


@dataclass(frozen=True)
class Teacher:
    """A model that answers 200 questions, and what it is asked.

    sources: the sources of the recipe in YAML, one a line. The last one has gold responses, so that something
        is left to train on when all answers are cut off.
    """

    model: Path
    sources: tuple[str, ...]
    options: str
    batch_size: int
    """Number of questions that are asked together without a server."""


def demo_teacher(folder: Path) -> Teacher:
    """The demo's model, which needs nothing else, with questions in the wording that it has learned."""
    questions = folder / "questions.jsonl"
    names = [
        "".join(syllables).title() for syllables in product(["bra", "ke", "thu", "sol", "vi", "mo"], repeat=3)
    ]
    records = (
        {
            "question": f"What is the mayor of {name}?",
            "answers": [other],
            "ctxs": [
                {"title": "", "text": f"The {role} of {name} is {other}."} for role in ("mayor", "river")
            ],
        }
        for name, other in zip(names[:209], names[1:210], strict=True)
    )
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    asked, gold = "max_samples: 200, response: teacher", "skip_samples: 200"
    sources = tuple(f"{{format: fid, path: {questions}, {options}}}" for options in (asked, gold))
    wording = '{instruction: "Answer from the documents:", document: "\\n{text}", question: "\\n{question}"}'
    return Teacher(DEMO_MODEL, sources, f"max_new_tokens: 24, batch_size: 1, prompt: {wording}", 1)


def smollm2_teacher(folder: Path) -> Teacher:
    """SmolLM2-135M-Instruct with 40 questions over a passage and 160 instructions, which are shorter."""
    model = Path(os.environ.get("BLOCKFT_SMOLLM2", "../shared/smollm2"))
    if not (model / "config.json").is_file():
        pytest.skip(f"SmolLM2-135M-Instruct is not in {model} (set BLOCKFT_SMOLLM2)")
    data = Path(os.environ.get("BLOCKFT_REAL_DATA", "../shared/data"))
    if not (data / "alpaca_en_demo.json").exists():
        pytest.skip(f"the real data are not in {data} (set BLOCKFT_REAL_DATA)")
    sources = (
        f"{{format: fid, path: {data}/nq_open_oracle_dev.jsonl, max_samples: 40, response: teacher}}",
        f"{{format: alpaca, path: {data}/alpaca_en_demo.json, max_samples: 160, response: teacher}}",
        f"{{format: alpaca, path: {data}/alpaca_en_demo.json, skip_samples: 160, max_samples: 9}}",
    )
    return Teacher(model, sources, "max_new_tokens: 5, batch_size: 8", 8)


@pytest.fixture(
    scope="module", params=[demo_teacher, pytest.param(smollm2_teacher, marks=pytest.mark.real_data)]
)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    build: Callable[[Path], Teacher] = request.param
    return build(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def recipe(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "recipe.yaml"
    sources = "".join(f"    - {source}\n" for source in teacher.sources)
    path.write_text(
        f"# a teacher\n"
        f"model: {{path: {teacher.model}}}\n"
        f"data:\n"
        f"  output_dir: set\n"
        f"  num_workers: 2\n"
        f"  sources:\n"
        f"{sources}"
        f"  teacher: {{model: {teacher.model}, {teacher.options}}}\n"
        f"train: {{output_dir: run}}\n"
    )
    return path


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url):
            return True
    except OSError:
        return False


@contextmanager
def real_server(model: Path) -> Iterator[str]:
    """Run `transformers serve`, which the package transformers ships; yields its address."""
    port = free_port()
    command = ["transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1", "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port), "--dtype", "float32"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | TWO_THREADS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), lambda: server.poll() is None)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        server.kill()
        server.wait()


def command(recipe: Path, out: Path, *settings: str) -> list[str | Path]:
    return ["prepare", recipe, f"data.output_dir={out}", *settings]


def count_answers(out: Path) -> int:
    path = out.with_name(f"{out.name}.answers.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finish(recipe: Path, out: Path, *settings: str) -> int:
    """Run prepare to its end, and return the number of answers that it asked for."""
    done = run_ranks(*command(recipe, out, *settings))
    assert done.returncode == 0, done.stderr
    assert count_answers(out) == 200
    (number,) = re.findall(r"teacher: (\d+) new answers?", done.stderr)
    return int(number)


def kill_and_finish(recipe: Path, out: Path, *settings: str, batch_size: int = 1) -> int:
    """Kill prepare at three moments, then run it to its end; return the answers asked for in the last run."""
    for number in range(NUM_KILLS):
        # before more than 50 answers are written
        call = ceil(50 / batch_size) + 1
        hold = Hold(out.with_name(f"hold-{number}"), "blockft.data.teacher_answers:AnswersFile.add", call)
        ranks = start_ranks(*command(recipe, out, *settings), before=hold)
        hold.wait_until_reached(ranks.is_alive)
        ranks.send_signal(signal.SIGKILL)
        assert ranks.wait().returncode == -signal.SIGKILL
    assert 150 <= count_answers(out) < 200 and not out.exists()
    return finish(recipe, out, *settings)


def outcome(out: Path) -> dict[str, bytes]:
    """Return all files of the prepared folder, and the answers."""
    return files(out) | {"answers": out.with_name(f"{out.name}.answers.jsonl").read_bytes()}


@pytest.mark.slow  # a model answers 400 questions on a CPU: SmolLM2 in three minutes
def test_a_local_teacher_that_is_killed_three_times_gives_the_same_bytes(
    recipe: Path, teacher: Teacher, tmp_path: Path
) -> None:
    assert finish(recipe, tmp_path / "undisturbed") == 200
    before = kill_and_finish(recipe, tmp_path / "killed", batch_size=teacher.batch_size)
    assert 0 < before <= 50, "no answered question is asked again"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")


@pytest.mark.slow  # a server answers 400 questions on a CPU: with SmolLM2 in five minutes
def test_a_real_server_with_faults_and_kills_gives_the_same_bytes(
    recipe: Path, teacher: Teacher, tmp_path: Path
) -> None:
    answered = Counter[str]()
    with real_server(teacher.model) as address:

        def forward(body: Any, before: int) -> Reply:
            request = urllib.request.Request(
                address, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                answer = response.read()
            answered[body["messages"][-1]["content"]] += 1
            return Reply(body=answer)

        def with_faults(body: Any, before: int) -> Reply:
            # the same fault for the same question
            number = crc32(body["messages"][-1]["content"].encode())
            if number % 2 == 0 and before < 2:
                return FAULTS[(number // 2 + before) % len(FAULTS)]
            return forward(body, before)

        options = (f"data.teacher.concurrency={CONCURRENCY}", "data.teacher.timeout_s=900")
        with endpoint(forward, takes_body=True) as server:
            settings = (*options, f"data.teacher.base_url={server.base_url}")
            assert finish(recipe, tmp_path / "undisturbed", *settings) == 200
            assert server.asked.total() == 200
        answered.clear()
        with endpoint(with_faults, takes_body=True) as server:
            settings = (*options, f"data.teacher.base_url={server.base_url}")
            kill_and_finish(recipe, tmp_path / "killed", *settings)
            # only the answers that were being written when the process was killed are asked for again
            assert 200 <= answered.total() <= 200 + NUM_KILLS * CONCURRENCY
            assert server.asked.total() > answered.total() + 50, "faults were sent"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
