"""Runs on two ranks under ZeRO 0 to 3, of all weights and of LoRA: killed, stopped, resumed and exported."""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockft.errors import UserError
from blockft.model.checkpoint import (
    MARKER,
    best_checkpoint,
    complete_checkpoints,
    find_checkpoint,
    load_reference_logits,
    read_marker,
)
from blockft.model.load import load_config, load_model
from blockft.outputs import temporary_path
from blockft.run_folder import LOSS_PLOT, METRICS, read_metrics
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from blockft.training.library_internals import SHARED_MEMORY
from blockft.training.universal_checkpoint import UNIVERSAL
from tests import commands
from tests.commands import Ranks, all_logged, logged, run_ranks, start_ranks
from tests.hold import Hold
from tests.run import toy_recipe
from tests.stages.test_checkpoint_files import count_trained, shard_bytes

SETTINGS = (
    "train.num_train_epochs=3",
    "train.save_steps=7",
    "train.num_eval_examples=6",
    "train.save_total_limit=1",
)
LORA = "train.lora={r: 8, lora_alpha: 16}"
RUNS = [(stage, adapter) for adapter in (False, True) for stage in (1, 2, 3)]
LOSSES = ("loss", "loss_block", "loss_full", "loss_source_0", "eval_loss_block", "eval_loss_full")

ON_STEP_END = "blockft.training.run_callback:RunCallback.on_step_end"

TrainOnce = Callable[[int, bool], Path]
Killed = Callable[[int], Path]


def train(run: Path, *overrides: str, num_ranks: int = 2) -> None:
    """Train with the toy recipe that lies beside the run."""
    commands.train(run.parent / "recipe.yaml", run, *SETTINGS, *overrides, num_ranks=num_ranks)


def start(run: Path, stage: int, step: int) -> tuple[Ranks, Hold]:
    """Start a run on two ranks, and return when both are held in a step, and have logged the one before."""
    recipe, zero, hold = run.parent / "recipe.yaml", f"train.deepspeed=zero{stage}", hold_at(run, step)
    ranks = start_ranks(
        *("train", recipe, f"train.output_dir={run}", *SETTINGS, zero), num_ranks=2, before=hold
    )
    hold.wait_until_reached(ranks.is_alive, num_processes=2)
    assert f'"step": {step - 1}, "loss"' in (run / METRICS).read_text()
    return ranks, hold


def hold_at(run: Path, step: int) -> Hold:
    """Return a hold of a run in a step."""
    return Hold(run.parent / f"hold-{run.name}", ON_STEP_END, call=step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    prepare(toy_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def train_once(folder: Path) -> TrainOnce:
    """A function that trains on two ranks, once for each choice of ZeRO stage and adapter."""

    def train_or_reuse(stage: int, adapter: bool) -> Path:
        run = folder / f"run-{stage}-{'lora' if adapter else 'full'}"
        if not run.exists():
            train(run, f"train.deepspeed=zero{stage}", *([LORA] if adapter else []))
        return run

    return train_or_reuse


@pytest.fixture(scope="module")
def killed(folder: Path) -> Killed:
    """A function that returns a run whose two ranks were killed after step 8, once for each ZeRO stage."""

    def kill_or_reuse(stage: int) -> Path:
        run = folder / f"killed-{stage}"
        if not run.exists():
            ranks, _ = start(run, stage, 9)
            ranks.send_signal(signal.SIGKILL)
            ranks.wait()
            assert not list(SHARED_MEMORY.glob(f"deepspeed*_{ranks.port}_*"))
        return run

    return kill_or_reuse


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Path:
    """A run of one rank without ZeRO."""
    train(folder / "one-rank", "train.deepspeed=zero0", num_ranks=1)
    return folder / "one-rank"


def test_one_rank_gives_the_losses_of_two(train_once: TrainOnce, one_rank: Path) -> None:
    for name in LOSSES:
        assert_close(logged(one_rank, name), logged(train_once(2, False), name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("stage", [1, 3])
def test_four_ranks_give_the_losses_of_one(one_rank: Path, folder: Path, stage: int) -> None:
    run = folder / f"four-ranks-{stage}"
    train(run, f"train.deepspeed=zero{stage}", num_ranks=4)
    assert read_marker(find_checkpoint(run))["run_signature"]["number of processes"] == 4
    for name in LOSSES:
        assert_close(logged(run, name), logged(one_rank, name), rtol=1e-5, atol=0)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None]).logits[0]
    return logits


@pytest.mark.parametrize(("stage", "adapter"), [(stage, adapter) for stage, adapter in RUNS if stage != 2])
def test_every_zero_stage_gives_the_same_losses(train_once: TrainOnce, stage: int, adapter: bool) -> None:
    run, reference = train_once(stage, adapter), train_once(2, adapter)
    lines = read_metrics(reference)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss_block" in line] == [0, 7, 12]
    for name in LOSSES:
        expected = logged(reference, name)
        assert expected[-1] < expected[0] - 0.5
        assert_close(logged(run, name), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("adapter", "kind"), [(False, "full"), (True, "selective")])
def test_recomputed_layers_under_zero3_give_the_losses_of_kept_ones(
    train_once: TrainOnce, folder: Path, adapter: bool, kind: str
) -> None:
    """Each layer is gathered whole, also when it is computed again in the backward pass."""
    run = folder / f"recomputed-{adapter}-{kind}"
    settings = ("train.deepspeed=zero3", f"train.gradient_checkpointing={kind}")
    train(run, *settings, *([LORA] if adapter else []))
    for name in LOSSES:
        assert_close(logged(run, name), logged(train_once(2, adapter), name), rtol=1e-5, atol=0)


@pytest.mark.slow  # the compiler takes 20 s for each run
@pytest.mark.parametrize(("adapter", "kind"), [(False, "full"), (True, "selective"), (True, "none")])
def test_compiled_layers_under_zero3_give_the_losses_of_eager_ones(
    train_once: TrainOnce, folder: Path, adapter: bool, kind: str
) -> None:
    run = folder / f"compiled-{adapter}-{kind}"
    settings = ("train.torch_compile=true", f"train.gradient_checkpointing={kind}")
    train(run, "train.deepspeed=zero3", *settings, *([LORA] if adapter else []))
    for name in LOSSES:
        assert_close(logged(run, name), logged(train_once(2, adapter), name), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("stage", "adapter"), RUNS)
def test_an_export_gives_the_logits_of_its_run_and_answers(
    train_once: TrainOnce, folder: Path, stage: int, adapter: bool
) -> None:
    run = train_once(stage, adapter)
    out = export(run, folder / f"export-{stage}-{adapter}", max_shard_size="20KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    ids, positions, expected = load_reference_logits(find_checkpoint(run))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert_close(logits_of(model, ids)[positions], expected, rtol=1e-5, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not torch.allclose(logits_of(before, ids)[positions], expected, atol=1e-2), (
        "the run changed nothing"
    )
    prompt = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Answer.\na=7\na?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize(("stage", "adapter"), RUNS)
def test_shards_hold_12_bytes_per_trained_parameter(
    train_once: TrainOnce, folder: Path, stage: int, adapter: bool
) -> None:
    checkpoint = find_checkpoint(train_once(stage, adapter))
    num_trained = count_trained(checkpoint, folder / "model")
    assert 0 <= shard_bytes(checkpoint) - 12 * num_trained < 2000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_adapter_on_its_base_model_gives_the_logits_of_its_run(
    train_once: TrainOnce, folder: Path, stage: int
) -> None:
    run = train_once(stage, True)
    out = export(run, folder / f"adapter-{stage}", adapter_only=True)
    assert not list(out.glob("model*.safetensors"))
    ids, positions, expected = load_reference_logits(find_checkpoint(run))
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    for model in (AutoModelForCausalLM.from_pretrained(out), PeftModel.from_pretrained(base, out)):
        assert_close(logits_of(model, ids)[positions], expected, rtol=1e-5, atol=1e-5)
    assert load_config(str(out)).block_attention["version"] == 1


@pytest.fixture
def other_base_weights(folder: Path) -> Iterator[None]:
    """Change one weight of the base model while a test runs."""
    file = folder / "model" / "model.safetensors"
    original = file.read_bytes()
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    yield
    file.write_bytes(original)


def test_an_adapter_is_refused_on_other_base_weights(
    train_once: TrainOnce, folder: Path, request: pytest.FixtureRequest
) -> None:
    run = train_once(2, True)
    out = export(run, folder / "adapter-of-other-base", adapter_only=True)
    load_model(str(out), backend="sdpa", dtype=torch.float32)
    request.getfixturevalue("other_base_weights")
    with pytest.raises(UserError, match="was trained on other weights than .*model holds now"):
        load_model(str(out), backend="sdpa", dtype=torch.float32)
    with pytest.raises(UserError, match="was trained on other weights than .*model holds now"):
        export(run, folder / "none")
    assert not (folder / "none").exists()
    settings = (f"train.output_dir={run}", *SETTINGS, LORA, "train.num_train_epochs=4")
    resumed = run_ranks("train", folder / "recipe.yaml", *settings, "--resume", num_ranks=2)
    assert resumed.returncode == 2 and "digest of the weights of model.path = " in resumed.stderr


def test_a_run_of_all_weights_has_no_adapter_to_export(train_once: TrainOnce, folder: Path) -> None:
    with pytest.raises(UserError, match="adapter"):
        export(train_once(2, False), folder / "none", adapter_only=True)


def test_the_best_checkpoint_is_kept_and_exported(folder: Path) -> None:
    run = folder / "best"
    train(
        run,
        "train.learning_rate=1",
        "train.lr_scheduler_type=constant",
        "train.save_steps=1",
        "train.max_steps=4",
    )
    losses = {
        line["step"]: line["eval_loss_block"] for line in read_metrics(run) if "eval_loss_block" in line
    }
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best != 4, "the learning rate is so high that the loss must rise"
    assert [path.name for path in complete_checkpoints(run)] == [f"checkpoint-{best}", "checkpoint-4"]
    assert best_checkpoint(run) == find_checkpoint(run, best=True) == run / f"checkpoint-{best}"
    assert read_marker(run / "checkpoint-4")["eval_losses"]["block"] == losses[4]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_killed_between_two_checkpoints_resumes_as_if_never_killed(
    train_once: TrainOnce, killed: Killed, folder: Path, stage: int
) -> None:
    run = shutil.copytree(killed(stage), folder / f"resumed-{stage}")
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-7"]
    assert 8 <= read_metrics(run)[-1]["step"] < 12
    train(run, f"train.deepspeed=zero{stage}", "--resume")
    assert all_logged(run) == all_logged(train_once(stage, False))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_of_two_ranks_resumes_on_one(
    train_once: TrainOnce, killed: Killed, folder: Path, stage: int
) -> None:
    run = shutil.copytree(killed(stage), folder / f"one-rank-{stage}")
    train(run, f"train.deepspeed=zero{stage}", "--resume", num_ranks=1)
    assert not (run / ".universal").exists()
    losses, expected = logged(run), logged(train_once(stage, False))
    assert losses[:7] == expected[:7]
    assert_close(losses, expected, rtol=1e-3, atol=0)


def check_stopped_run_resumes(run: Path, exit_code: int, expected: Path) -> None:
    """A run that SIGTERM stopped has saved its last step, and resumes as if never stopped."""
    assert exit_code == 130
    assert read_marker(find_checkpoint(run))["step"] == read_metrics(run)[-1]["step"] < 12
    train(run, "train.deepspeed=zero3", "--resume")
    assert all_logged(run) == all_logged(expected)


def test_sigterm_makes_the_ranks_save_and_the_run_resumes(train_once: TrainOnce, folder: Path) -> None:
    run = folder / "stopped"
    ranks, hold = start(run, 3, 7)
    ranks.send_signal(signal.SIGTERM)
    hold.release()
    check_stopped_run_resumes(run, ranks.wait().returncode, train_once(3, False))


WAIT_FOR_A_SIGNAL = """
import os, time
from pathlib import Path
if "RANK" in os.environ:
    from blockft.training.run_callback import RunCallback
    end_step = RunCallback.on_step_end
    def wait_and_end_step(self, args, state, control, **passed):
        if state.global_step == 7:
            Path(__file__).with_name("waits-" + os.environ["RANK"]).touch()
            while not self.stop_requested:
                time.sleep(0.01)
        return end_step(self, args, state, control, **passed)
    RunCallback.on_step_end = wait_and_end_step
"""
"""Python runs it as sitecustomize at the start of every process: ranks wait for a signal in step 7."""


@pytest.mark.slow  # the launcher starts five interpreters
def test_the_command_line_passes_sigterm_on_to_its_ranks(
    train_once: TrainOnce, folder: Path, tmp_path: Path
) -> None:
    run = folder / "stopped-launcher"
    (tmp_path / "sitecustomize.py").write_text(WAIT_FOR_A_SIGNAL)
    overrides = (f"train.output_dir={run}", *SETTINGS, "train.deepspeed=zero3", "--num-gpus", "2")
    path = f"{tmp_path}:{commands.PYTHON_PATH}"
    process = commands.start("blockft", "train", folder / "recipe.yaml", *overrides, PYTHONPATH=path)
    commands.wait_until(lambda: len(list(tmp_path.glob("waits-*"))) == 2, lambda: process.poll() is None)
    # the child of `timeout`, which would end with a code of its own
    (command,) = psutil.Process(process.pid).children()
    command.send_signal(signal.SIGTERM)
    process.communicate()
    check_stopped_run_resumes(run, process.returncode, train_once(3, False))


def test_a_finished_run_is_unchanged_and_a_run_without_a_checkpoint_starts_again(folder: Path) -> None:
    run = folder / "early"
    train(run, "train.max_steps=3", num_ranks=1)
    lines = read_metrics(run)
    train(run, "train.max_steps=3", "--resume", num_ranks=1)
    assert read_metrics(run) == lines and [p.name for p in complete_checkpoints(run)] == ["checkpoint-3"]
    (run / "checkpoint-3" / MARKER).unlink()
    train(run, "train.max_steps=3", "--resume", num_ranks=1)
    assert [line["step"] for line in read_metrics(run)] == [line["step"] for line in lines]


def test_a_run_that_was_killed_while_it_drew_its_losses_is_completed(folder: Path) -> None:
    run = folder / "undrawn"
    train(run, "train.max_steps=2", num_ranks=1)
    drawn = sorted(path.name for path in run.iterdir())
    (run / LOSS_PLOT).rename(temporary_path(run / LOSS_PLOT))
    train(run, "train.max_steps=2", "--resume", num_ranks=1)
    assert sorted(path.name for path in run.iterdir()) == drawn
    temporary_path(run / METRICS).write_text("")
    train(run, "train.max_steps=3", "--resume", num_ranks=1)
    assert not list(run.glob(".*"))


def test_a_run_that_was_killed_while_it_removed_old_folders_is_completed(folder: Path) -> None:
    run, settings = folder / "unremoved", ("train.max_steps=3", "train.save_steps=1")
    train(run, *settings, "train.save_total_limit=3", num_ranks=1)
    assert len(complete_checkpoints(run)) == 3
    kept = [path.name for path in run.iterdir() if path.name not in ("checkpoint-1", "checkpoint-2")]
    (run / "checkpoint-1").rename(run / ".checkpoint-1.removed")
    (run / UNIVERSAL).mkdir()
    train(run, *settings, "train.save_total_limit=1", "--resume", num_ranks=1)
    assert sorted(path.name for path in run.iterdir()) == sorted(kept)


def test_a_killed_export_leaves_no_finished_folder(train_once: TrainOnce, folder: Path) -> None:
    """The process is killed when the weights of the export are on disk."""
    run, out = train_once(2, False), folder / "out" / "killed"
    out.parent.mkdir()
    hold = Hold(folder / "hold-export", "blockft.stages.export:_compare_logits")
    process = start_ranks("export", run, out, before=hold)
    hold.wait_until_reached(process.is_alive)
    assert list(out.parent.glob(".*/model.safetensors"))
    process.send_signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    # the lock of a killed process locks nothing
    (temporary,) = [path for path in out.parent.iterdir() if path.name != ".killed.lock"]
    assert temporary.name.startswith(".killed.")
    export(run, out)
    assert [path.name for path in out.parent.iterdir()] == ["killed"]
    assert json.loads((out / "config.json").read_text())["block_attention"]


def learning_rates(run: Path) -> list[float]:
    return [line["learning_rate"] for line in read_metrics(run) if "loss" in line]


def test_a_resumed_run_follows_the_schedule_of_its_present_recipe(folder: Path) -> None:
    settings = ("train.deepspeed=zero1", "train.warmup_steps=1", "train.learning_rate=2e-4")
    settings += ("train.max_steps=6",)
    uninterrupted, run = folder / "schedule-uninterrupted", folder / "schedule"
    train(uninterrupted, *settings, num_ranks=1)
    train(run, *settings, "train.learning_rate=1e-3", "train.max_steps=3", num_ranks=1)
    train(run, *settings, "--resume", num_ranks=1)
    rates, expected = learning_rates(run), learning_rates(uninterrupted)
    assert rates[:3] != expected[:3] and rates[3:] == expected[3:]
    # a setting that would change the weights is refused, and a finished run has nothing left to do
    resume = ("train", folder / "recipe.yaml", f"train.output_dir={run}", *SETTINGS, *settings, "--resume")
    refused = run_ranks(*resume, "train.weight_decay=0.1")
    assert refused.returncode == 2 and "trained with train.weight_decay = 0.0, but" in refused.stderr
    done = run_ranks(*resume)
    message = re.sub(r"\s+", " ", done.stderr)
    assert done.returncode == 0 and "at step 6 of 6: nothing is left to do" in message
