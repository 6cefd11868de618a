"""Runs that answer held-out prompts: nothing else changes, and no answer is lost by stops and resumes."""

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from blockft.model.checkpoint import find_checkpoint, read_marker
from blockft.run_folder import SAMPLE_ANSWERS, read_sample_answers
from blockft.stages.prepare import prepare
from blockft.stages.run_plan import list_settings_without_effect
from tests.commands import all_logged, run_ranks
from tests.run import toy_recipe
from tests.stages.test_stop import ask_to_stop, describe

SETTINGS = (
    "train.num_eval_examples=6",
    "train.max_steps=6",
    "train.num_train_epochs=2",
    "train.save_steps=5",
)
SAMPLES = ("train.sample_steps=2", "train.num_sample_prompts=3", "train.sample_max_new_tokens=5")
ZERO3 = "train.deepspeed=zero3"


def train(run: Path, *overrides: str, stop_at: int | None = None, num_ranks: int = 2) -> str:
    """Train with the recipe that lies beside the run, stop after a step if one is given; return stderr."""
    before = None if stop_at is None else partial(ask_to_stop, stop_at)
    arguments = ("train", run.parent / "recipe.yaml", f"train.output_dir={run}", *SETTINGS, *overrides)
    done = run_ranks(*arguments, num_ranks=num_ranks, before=before)
    assert done.returncode == (0 if stop_at is None else 130), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    prepare(toy_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of two ranks under ZeRO-3 that answers three prompts at steps 2, 4 and 6."""
    run = folder / "run"
    (folder / "stderr").write_text(train(run, ZERO3, *SAMPLES))
    return run


def test_answers_are_written_and_shown_for_each_prompt_and_mode(run: Path) -> None:
    records = read_sample_answers(run)
    expected = [(step, i, mode) for step in (2, 4, 6) for i in range(3) for mode in ("block", "full")]
    assert [(r["step"], r["prompt"], r["mode"]) for r in records] == expected
    assert len({r["sample_id"] for r in records}) == 3
    for record in records:
        assert record["source"] == 0 and record["question"].endswith("?") and record["expected"].isdigit()
        assert record["num_tokens"] <= 5 and (record["ended"] or record["num_tokens"] == 5)
    shown = [line for line in (run.parent / "stderr").read_text().splitlines() if ", sample q" in line]
    assert len(shown) == 9 and shown[0].startswith("step 2, sample q") and ', full "' in shown[0]
    assert any(record["ended"] for record in records), "the model learns to end its answers"


def test_answers_change_no_loss_and_do_not_depend_on_the_ranks(run: Path, folder: Path) -> None:
    for name, overrides, num_ranks in (
        ("without", [ZERO3, "train.sample_steps=null"], 2),
        ("one", SAMPLES, 1),
    ):
        train(folder / name, *overrides, num_ranks=num_ranks)
    assert all_logged(folder / "without") == all_logged(run)
    assert not (folder / "without" / SAMPLE_ANSWERS).exists()
    assert read_sample_answers(folder / "one") == read_sample_answers(run)


def test_a_stopped_run_answers_every_prompt_once(run: Path, folder: Path) -> None:
    """It stops at a step with answers, between two of them, and at the last step."""
    stopped = folder / "stopped"
    for step in (2, 3, 6):
        resume = ["--resume"] if stopped.exists() else []
        train(stopped, ZERO3, *SAMPLES, *resume, stop_at=step)
        marker = read_marker(find_checkpoint(stopped))
        assert marker["step"] == step and marker["answers_due"] == (step != 3)
    train(stopped, ZERO3, *SAMPLES, "--resume")
    assert (stopped / SAMPLE_ANSWERS).read_bytes() == (run / SAMPLE_ANSWERS).read_bytes()
    assert all_logged(stopped) == all_logged(run)
    assert describe(find_checkpoint(stopped)) == describe(find_checkpoint(run))


def test_answers_after_the_checkpoint_are_written_again(run: Path, folder: Path) -> None:
    """As after a kill: the last checkpoint has no marker, and the last line is incomplete."""
    killed = shutil.copytree(run, folder / "killed")
    (killed / "checkpoint-6" / "complete.json").unlink()
    with (killed / SAMPLE_ANSWERS).open("a") as answers:
        answers.write('{"step": 7, "prom')
    assert len(read_sample_answers(killed)) == 18
    train(killed, ZERO3, *SAMPLES, "--resume")
    assert (killed / SAMPLE_ANSWERS).read_bytes() == (run / SAMPLE_ANSWERS).read_bytes()
    (killed / SAMPLE_ANSWERS).write_text("changed\n")
    (killed / "checkpoint-6" / "complete.json").unlink()
    done = run_ranks(
        "train", folder / "recipe.yaml", f"train.output_dir={killed}", *SETTINGS, ZERO3, "--resume"
    )
    assert done.returncode == 2 and f"{SAMPLE_ANSWERS} has changed since the run wrote it" in done.stderr


def send_signal_while_answering() -> None:
    """Make runs of this process receive SIGTERM while they compute their first sample answers."""
    from blockft.training.sample_answers import _RowDecoder

    step = _RowDecoder.step

    def step_and_signal(self: _RowDecoder, model: object) -> None:
        step(self, model)  # type: ignore[arg-type]
        _RowDecoder.step = step  # type: ignore[method-assign]
        signal.raise_signal(signal.SIGTERM)

    _RowDecoder.step = step_and_signal  # type: ignore[method-assign]


def test_a_signal_while_a_prompt_is_answered_saves_and_stops(folder: Path) -> None:
    interrupted = folder / "interrupted"
    arguments = ("train", folder / "recipe.yaml", f"train.output_dir={interrupted}", *SETTINGS, *SAMPLES)
    done = run_ranks(*arguments, before=send_signal_while_answering)
    assert done.returncode == 130, done.stderr
    marker = read_marker(find_checkpoint(interrupted))
    assert marker["step"] == 2 and marker["answers_due"] and not read_sample_answers(interrupted)
    train(interrupted, *SAMPLES, "--resume", num_ranks=1)
    assert {record["step"] for record in read_sample_answers(interrupted)} == {2, 4, 6}


def test_an_adapter_answers_too(folder: Path) -> None:
    run = folder / "adapter"
    train(run, "train.lora={r: 4}", *SAMPLES, num_ranks=1)
    assert len(read_sample_answers(run)) == 18


def test_wandb_gets_a_table_of_all_answers(folder: Path) -> None:
    run = folder / "tracked"
    arguments = ("train", folder / "recipe.yaml", f"train.output_dir={run}", *SETTINGS, *SAMPLES)
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    done = run_ranks(*arguments, "train.report_to=[wandb]", **environment)
    assert done.returncode == 0, done.stderr
    tables = sorted(folder.glob("wandb/offline-run-*/files/media/table/sample answers*.json"))
    assert len(tables) == 3 and "expected" in tables[0].read_text()
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    logged_bytes = log.read_bytes()
    for name in (b"train/loss_block", b"train/loss_source_0", b"train/peak_memory_gib", b"eval/loss_block"):
        assert name in logged_bytes, name


def test_settings_of_answers_without_held_out_examples_are_warned_of(folder: Path) -> None:
    found = list_settings_without_effect(
        toy_recipe(folder, "train.sample_steps=7", "train.num_sample_prompts=2")
    )
    assert found == [
        f"train.{name} has no effect: no examples are held out (train.num_eval_examples is 0)"
        for name in ("sample_steps", "num_sample_prompts")
    ]
    assert list_settings_without_effect(toy_recipe(folder)) == []
    with_examples = ("train.sample_steps=7", "train.num_eval_examples=6")
    assert list_settings_without_effect(toy_recipe(folder, *with_examples)) == []
    never = ("train.sample_steps=null", "train.num_eval_examples=6", "train.num_sample_prompts=2")
    assert list_settings_without_effect(toy_recipe(folder, *never)) == [
        "train.num_sample_prompts has no effect: train.sample_steps is null"
    ]


def test_a_run_that_is_shorter_than_the_distance_answers_at_its_end(folder: Path) -> None:
    train(folder / "short", "train.sample_max_new_tokens=2", num_ranks=1)
    assert {record["step"] for record in read_sample_answers(folder / "short")} == {6}
