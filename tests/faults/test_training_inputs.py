"""Trainings with every schedule, with a DeepSpeed file, in a thread, and under every umask."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

import blockft
from blockft.errors import UserError
from blockft.model.checkpoint import MARKER
from tests import run
from tests.commands import blockft as command
from tests.commands import fork_ranks, logged, train
from tests.faults.test_python_api import train_in_a_thread


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    blockft.prepare(run.toy_recipe(folder))
    return folder


@pytest.mark.parametrize("config", ["zero0", "zero2", "zero3", "{toy}/adam.json", "{toy}/bare.json"])
def test_a_polynomial_schedule_falls_to_its_end(toy: Path, config: str) -> None:
    """ZeRO hides the peak, which this schedule reads."""
    auto = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    optimizer = {"type": "AdamW", "params": auto}
    (toy / "adam.json").write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": 1}}))
    (toy / "bare.json").write_text("{}")
    out = toy / f"run-{config.rpartition('/')[2]}"
    settings = "train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={lr_end: 1e-3}"
    train(
        toy / "recipe.yaml", out, *settings, f"train.deepspeed={config.format(toy=toy)}", "train.max_steps=3"
    )
    rates = logged(out, "learning_rate")
    # the schedule of an optimizer that DeepSpeed makes is a step ahead
    assert len(rates) == 3 and rates[0] == pytest.approx(7e-3 if "adam" in config else 1e-2)
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0]


def test_a_run_in_a_thread_trains(toy: Path) -> None:
    """Only the main thread of Python may handle signals."""
    done = fork_ranks(partial(train_in_a_thread, str(toy))).wait()
    assert done.returncode == 0, done.stderr
    assert (toy / "run" / "checkpoint-2" / MARKER).is_file()


def fail_to_train(folder: str) -> None:
    settings = "train.learning_rate=1e30", f"train.output_dir={folder}/failed"
    recipe = run.toy_recipe(Path(folder), *settings)
    with pytest.raises(UserError, match="became"):
        blockft.train(recipe)
    assert "RANK" not in os.environ and "MASTER_PORT" not in os.environ
    assert not torch.distributed.is_initialized()


def test_a_process_whose_run_failed_is_no_rank_any_more(toy: Path) -> None:
    """Otherwise every process that it starts would be a rank of that run, at a port that is still in use."""
    done = fork_ranks(partial(fail_to_train, str(toy))).wait()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077], ids=oct)
def test_every_output_has_the_permissions_of_the_umask(toy: Path, mask: int, tmp_path: Path) -> None:
    recipe, before = toy / "recipe.yaml", os.umask(mask)
    try:
        train(recipe, tmp_path / "run", "train.max_steps=1", before=partial(os.umask, mask))
        for arguments in (
            ("prepare", recipe, f"data.output_dir={tmp_path}/data"),
            ("export", tmp_path / "run", tmp_path / "model"),
            ("eval", tmp_path / "model", recipe, f"eval.output_dir={tmp_path}/eval", "eval.max_samples=1"),
            ("cache", "build", toy / "model", tmp_path / "text.jsonl", "--cache", tmp_path / "cache"),
            ("inspect", tmp_path / "data", "--png", tmp_path / "mask.png"),
        ):
            (tmp_path / "text.jsonl").write_text('"a"\n')
            done = command(*arguments)
            assert done.returncode == 0, done.stderr
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        mode = path.stat().st_mode & 0o777
        # DeepSpeed makes its scripts executable for the owner
        is_script = path.name.startswith("zero_to_")
        expected = (0o777 if path.is_dir() else 0o766 if is_script else 0o666) & ~mask
        assert mode == expected, (path, oct(mode))
