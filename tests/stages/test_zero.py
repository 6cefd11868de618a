"""Two ranks under ZeRO 0 to 3, all weights and LoRA: killed, resumed and exported; laws 8, 9, 10."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
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
from blockft.model.load import load_config
from blockft.outputs import METRICS, read_metrics
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from blockft.training.launch import SHARED_MEMORY
from tests.run import toy_recipe

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "train.num_train_epochs=3",
    "train.save_steps=7",
    "train.num_eval_examples=6",
    "train.save_total_limit=1",
)
LORA = "train.lora={r: 8, lora_alpha: 16}"
RUNS = [(stage, adapter) for adapter in (False, True) for stage in (1, 2, 3)]

Train = Callable[..., Path]


def command(folder: Path, run: Path, *words: str) -> list[str]:
    given = [f"train.output_dir={run}", *SETTINGS, *words, "--num-gpus", "2"]
    return [sys.executable, "-m", "blockft", "train", str(folder / "recipe.yaml"), *given]


def alone(folder: Path, run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Train with one process."""
    words = (*command(folder, run, *words), "--num-gpus", "1")
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    prepare(toy_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def train(folder: Path) -> Train:
    """Trains on two ranks, once for each choice of settings."""

    def run_of(stage: int, adapter: bool) -> Path:
        run = folder / f"run-{stage}-{'lora' if adapter else 'full'}"
        if not run.exists():
            words = (f"train.deepspeed=zero{stage}", *([LORA] if adapter else []))
            done = subprocess.run(command(folder, run, *words), capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stderr
        return run

    return run_of


def test_law_8_one_process_gives_the_losses_of_two(train: Train, folder: Path) -> None:
    run = folder / "alone"
    done = alone(folder, run, "train.deepspeed=zero0")
    assert done.returncode == 0, done.stderr
    for name in ("loss", "eval_loss_block", "eval_loss_full"):
        found, expected = (
            [line[name] for line in read_metrics(r) if name in line] for r in (run, train(2, False))
        )
        assert_close(found, expected, rtol=1e-5, atol=0)


def curve(run: Path) -> list[dict[str, Any]]:
    """All that was logged, but the speed."""
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(run)]


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None]).logits[0]
    return logits


@pytest.mark.parametrize(("stage", "adapter"), [(s, adapter) for s, adapter in RUNS if s != 2])
def test_law_8_every_stage_gives_the_same_losses(train: Train, stage: int, adapter: bool) -> None:
    lines, reference = (read_metrics(train(s, adapter)) for s in (stage, 2))
    assert [line["step"] for line in reference if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in reference if "eval_loss_block" in line] == [0, 7, 12]
    for name in ("loss", "eval_loss_block", "eval_loss_full"):
        found, expected = ([line[name] for line in of if name in line] for of in (lines, reference))
        assert expected[-1] < expected[0] - 0.5
        assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("stage", "adapter"), RUNS)
def test_law_10_an_export_gives_the_runs_logits_and_answers(
    train: Train, folder: Path, stage: int, adapter: bool
) -> None:
    run = train(stage, adapter)
    out = export(run, folder / f"export-{stage}-{adapter}", max_shard_size="20KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    ids, expected = load_reference_logits(find_checkpoint(run))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert_close(logits_of(model, ids), expected, rtol=1e-5, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not torch.allclose(logits_of(before, ids), expected, atol=1e-2), "nothing learnt"
    prompt = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Answer.\na=7\na?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_law_10_an_adapter_on_its_base_equals_the_run(train: Train, folder: Path, stage: int) -> None:
    run = train(stage, adapter=True)
    out = export(run, folder / f"adapter-{stage}", adapter_only=True)
    assert not list(out.glob("model*.safetensors"))
    ids, expected = load_reference_logits(find_checkpoint(run))
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    for model in (AutoModelForCausalLM.from_pretrained(out), PeftModel.from_pretrained(base, out)):
        assert_close(logits_of(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert load_config(str(out)).block_attention["version"] == 1


def test_the_adapter_of_a_run_of_all_weights_is_refused(train: Train, folder: Path) -> None:
    with pytest.raises(UserError, match="adapter"):
        export(train(2, adapter=False), folder / "none", adapter_only=True)


def test_the_best_checkpoint_is_kept_and_exported(train: Train, folder: Path) -> None:
    run = folder / "best"
    words = (
        "train.learning_rate=1",
        "train.lr_scheduler_type=constant",
        "train.save_steps=1",
        "train.max_steps=4",
    )
    done = subprocess.run(command(folder, run, *words), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    losses = {
        line["step"]: line["eval_loss_block"] for line in read_metrics(run) if "eval_loss_block" in line
    }
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best != 4, "the settings make it worse and worse"
    assert [path.name for path in complete_checkpoints(run)] == [f"checkpoint-{best}", "checkpoint-4"]
    assert best_checkpoint(run) == find_checkpoint(run, best=True) == run / f"checkpoint-{best}"
    assert read_marker(run / "checkpoint-4")["eval_losses"]["block"] == losses[4]


def processes_of(launched: subprocess.Popen[bytes]) -> list[psutil.Process]:
    parent = psutil.Process(launched.pid)
    return [*parent.children(recursive=True), parent]


def wait_for_step(run: Path, step: int, launched: subprocess.Popen[bytes]) -> None:
    """Until a step is logged."""
    while launched.poll() is None:
        text = (run / METRICS).read_text() if (run / METRICS).exists() else ""
        if f'"step": {step}, "loss"' in text:
            return
        time.sleep(0.005)
    raise AssertionError("the run ended too early")


def start(folder: Path, run: Path, stage: int) -> subprocess.Popen[bytes]:
    words = command(folder, run, f"train.deepspeed=zero{stage}")
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def resume(folder: Path, run: Path, stage: int) -> None:
    words = command(folder, run, f"train.deepspeed=zero{stage}", "--resume")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", [2, 3])
def test_law_9_a_run_killed_between_two_checkpoints_goes_on_as_if_it_had_not_been(
    train: Train, folder: Path, stage: int
) -> None:
    run = folder / f"killed-{stage}"
    shared_memory = set(SHARED_MEMORY.glob("deepspeed*"))
    launched = start(folder, run, stage)
    wait_for_step(run, 8, launched)
    for process in processes_of(launched):
        process.send_signal(signal.SIGKILL)
    launched.wait()
    assert set(SHARED_MEMORY.glob("deepspeed*")) <= shared_memory
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-7"]
    assert 8 <= read_metrics(run)[-1]["step"] < 12
    resume(folder, run, stage)
    assert curve(run) == curve(train(stage, adapter=False))


def test_law_9_a_run_asked_to_stop_saves_and_goes_on(train: Train, folder: Path) -> None:
    run = folder / "stopped"
    launched = start(folder, run, 3)
    wait_for_step(run, 6, launched)
    launched.send_signal(signal.SIGTERM)
    assert launched.wait() == 130
    last = find_checkpoint(run)
    assert read_marker(last)["step"] == read_metrics(run)[-1]["step"] < 12
    resume(folder, run, 3)
    assert curve(run) == curve(train(3, False))


@pytest.mark.parametrize("stage", [2, 3])
def test_law_9_a_run_goes_on_with_another_number_of_processes(train: Train, folder: Path, stage: int) -> None:
    """From two to one after a kill."""
    run = folder / f"recut-{stage}"
    launched = start(folder, run, stage)
    wait_for_step(run, 8, launched)
    for process in processes_of(launched):
        process.send_signal(signal.SIGKILL)
    launched.wait()
    zero = f"train.deepspeed=zero{stage}"
    done = alone(folder, run, zero, "--resume")
    assert done.returncode == 0, done.stderr
    assert not (run / ".universal").exists()
    found, expected = (
        [line["loss"] for line in curve(r) if "loss" in line] for r in (run, train(stage, False))
    )
    assert found[:7] == expected[:7]
    assert_close(found, expected, rtol=1e-3, atol=0)


def test_a_finished_run_is_not_resumed_and_one_without_checkpoint_begins_anew(folder: Path) -> None:
    run = folder / "early"
    done = alone(folder, run, "train.max_steps=3")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(run)
    done = alone(folder, run, "train.max_steps=3", "--resume")
    assert done.returncode == 0, done.stderr
    assert read_metrics(run) == lines and [p.name for p in complete_checkpoints(run)] == ["checkpoint-3"]
    (run / "checkpoint-3" / MARKER).unlink()
    done = alone(folder, run, "train.max_steps=3", "--resume")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(run)] == [line["step"] for line in lines]


def test_an_export_killed_while_it_writes_leaves_no_folder(train: Train, folder: Path) -> None:
    """The folder is watched, and the process killed as soon as something of the export lies anywhere."""
    run, out = train(2, adapter=False), folder / "out" / "killed"
    out.parent.mkdir()
    words = [sys.executable, "-m", "blockft", "export", str(run), str(out)]
    launched = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while launched.poll() is None and not list(out.parent.glob(".*/model.safetensors")):
        time.sleep(0.001)
    launched.kill()
    assert launched.wait() == -signal.SIGKILL
    (draft,) = out.parent.iterdir()
    assert draft.name.startswith(".killed.")
    export(run, out)
    assert [path.name for path in out.parent.iterdir()] == ["killed"]
    assert json.loads((out / "config.json").read_text())["block_attention"]


def rates(run: Path) -> list[float]:
    return [line["learning_rate"] for line in read_metrics(run) if "loss" in line]


def test_a_run_goes_on_under_the_schedule_of_its_recipe(folder: Path) -> None:
    whole, run = folder / "schedule-whole", folder / "schedule"
    words = ("train.deepspeed=zero1", "train.warmup_steps=1", "train.learning_rate=2e-4", "train.max_steps=6")
    assert alone(folder, whole, *words).returncode == 0
    begun = alone(folder, run, *words, "train.learning_rate=1e-3", "train.max_steps=3")
    gone_on = alone(folder, run, *words, "--resume")
    assert (begun.returncode, gone_on.returncode) == (0, 0), gone_on.stderr
    assert rates(run)[:3] != rates(whole)[:3] and rates(run)[3:] == rates(whole)[3:]
    # what would change the weights otherwise is refused, and there may be nothing to do
    refused = alone(folder, run, *words, "train.weight_decay=0.1", "--resume")
    assert refused.returncode == 2 and "another train.weight_decay (0.0)" in refused.stderr
    done = alone(folder, run, *words, "--resume")
    assert done.returncode == 0 and "at step 6 of 6: nothing is left to do" in done.stderr
