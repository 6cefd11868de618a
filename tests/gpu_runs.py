"""Toy runs on a GPU: a model whose heads suit the kernels, and rows of one compiled shape.

Most tests train in their own process, because the imports of a new one take as long as ten trainings. They
use the same shapes, because each further shape is compiled once more.
"""

import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.testing import assert_close

import blockft
from blockft.config.recipe import load_recipe
from blockft.model.checkpoint import MARKER, complete_checkpoints
from blockft.stages.prepare import prepare
from tests.commands import all_logged, logged
from tests.run import toy_recipe

SIZE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}
"""Heads of 64 dimensions, grouped as in real models, and four layers, so that every second one exists."""

SETTINGS = (
    "data.row_len=512",
    "train.batch_rows=2",
    "train.learning_rate=1e-3",
    "train.lr_scheduler_type=constant",  # so that a run with fewer steps has the same rates
    "train.num_train_epochs=4",
    "train.max_steps=6",
    "train.save_steps=3",
    "train.num_eval_examples=4",
    "train.torch_compile=false",  # tests of compiled layers say so
)
LORA = "train.lora={r: 8, lora_alpha: 16, target_modules: all-linear}"
FLOAT32, BFLOAT16 = "model.dtype=float32", "model.dtype=bfloat16"
REFERENCE = ("model.attention=sdpa", "train.torch_compile=false", "train.gradient_checkpointing=none")
LOSSES = ("loss", "eval_loss_block", "eval_loss_full")
TOLERANCE = {FLOAT32: 1e-4, BFLOAT16: 5e-2}
"""Largest relative difference of losses that another order of the same sums explains, by dtype."""


def zero_runs(*stages: int) -> pytest.MarkDecorator:
    """Return a test's parameters `stage` and `adapter`: ZeRO stages, of all weights and of LoRA.

    The tests of one choice run in one process, which trains its runs once.
    """
    return pytest.mark.parametrize(
        ("stage", "adapter"),
        [
            pytest.param(stage, adapter, id=f"zero{stage}-{name}", marks=one_process(f"zero{stage}-{name}"))
            for name, adapter in (("full", ()), ("lora", (LORA,)))
            for stage in stages
        ],
    )


def one_process(name: str) -> pytest.MarkDecorator:
    """Return the marker of tests that pytest-xdist runs in one process (`--dist loadgroup`)."""
    return pytest.mark.xdist_group(name)


class ToyRuns:
    """A folder with a prepared toy recipe and its runs, each of which is trained once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recipe = folder, folder / "recipe.yaml"
        self._runs: dict[tuple[str, ...], Path] = {}
        prepare(toy_recipe(folder, *SETTINGS, **SIZE))

    def train(self, *overrides: str) -> Path:
        """Train in this process, unless a run with these overrides exists, and return the run's folder."""
        if overrides not in self._runs:
            run = self.folder / f"run-{len(self._runs)}"
            train_here(self.recipe, run, *overrides)
            self._runs[overrides] = run
        return self._runs[overrides]

    def new_run(self, name: str) -> Path:
        """Return the path of a run that does not exist yet."""
        run = self.folder / name
        assert not run.exists()
        return run


def train_here(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> None:
    """Train in this process, whose environment stays as it was."""
    loaded = load_recipe(str(recipe), [f"train.output_dir={run}", *SETTINGS, *overrides])
    with patch.dict(os.environ):
        blockft.train(loaded, resume=resume)


def check_losses(run: Path, expected: Path, rtol: float) -> None:
    """Check that two runs logged the same losses and norms of gradients, and that they have learnt."""
    for name in LOSSES:
        losses = logged(expected, name)
        assert losses[-1] < losses[0] - 0.1, f"{name} did not fall: {losses}"
        assert_close(logged(run, name), losses, rtol=rtol, atol=0)
    norms, expected_norms = logged(run, "grad_norm"), logged(expected, "grad_norm")
    if norms and expected_norms:  # ZeRO-0 logs none in float32
        assert_close(norms, expected_norms, rtol=10 * rtol, atol=0)


def forget_last_checkpoint(run: Path, copy: Path) -> Path:
    """Copy a run as a kill during its last save leaves it, and return the copy."""
    shutil.copytree(run, copy)
    (complete_checkpoints(copy)[-1] / MARKER).unlink()
    return copy


def losses_without_speed(run: Path) -> list[dict[str, Any]]:
    """Return every logged line without what depends on the clock."""
    return all_logged(run)
