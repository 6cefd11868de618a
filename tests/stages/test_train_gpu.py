"""Training on one GPU: the fast paths give the losses of the reference, and faults end in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockft.config.recipe import load_recipe
from blockft.errors import UserError
from blockft.model.checkpoint import complete_checkpoints
from blockft.stages.prepare import prepare
from blockft.stages.run_plan import build_plan
from tests.commands import logged
from tests.gpu_runs import (
    BFLOAT16,
    FLOAT32,
    LORA,
    REFERENCE,
    SETTINGS,
    TOLERANCE,
    ToyRuns,
    check_losses,
    one_process,
    train_here,
)

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=one_process(dtype), id=dtype[12:]) for dtype in (FLOAT32, BFLOAT16)]
)
ADAPTERS = pytest.mark.parametrize("adapter", [(), (LORA,)], ids=["full", "lora"])
EAGER = ("train.torch_compile=false",)
COMPILED = ("train.torch_compile=true",)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyRuns:
    return ToyRuns(tmp_path_factory.mktemp("gpu"))


def test_a_gpu_trains_in_bfloat16_with_flex_by_default(toy: ToyRuns) -> None:
    plan = build_plan(load_recipe(str(toy.recipe), ["data.row_len=512"]), 1)
    assert (plan.backend, str(plan.dtype)) == ("flex", "torch.bfloat16")


def test_a_rank_alone_names_its_device_to_nccl() -> None:
    """A warning that the device was guessed would be the first line of every run."""
    code = (
        "from blockft.training.distributed import init_distributed, set_worker_environment; "
        "set_worker_environment(); init_distributed()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "uessing device" not in done.stdout + done.stderr


@DTYPES
def test_flex_gives_the_losses_and_gradients_of_the_dense_reference(toy: ToyRuns, dtype: str) -> None:
    run = toy.train(dtype, "model.attention=flex", *EAGER)
    check_losses(run, toy.train(dtype, *REFERENCE), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_copies_of_the_first_block_give_the_losses_of_the_dense_reference(
    toy: ToyRuns, dtype: str, objective: str
) -> None:
    settings = (f"data.output_dir={toy.folder}/copies", "data.local_sees_first=true")
    if not (toy.folder / "copies").exists():
        prepare(load_recipe(str(toy.recipe), [*SETTINGS, *settings]))
    overrides = (dtype, *settings, f"train.objective={objective}")
    run = toy.train(*overrides, "model.attention=flex", *COMPILED)
    losses, expected = logged(run), logged(toy.train(*overrides, *REFERENCE))
    assert losses == pytest.approx(expected, rel=TOLERANCE[dtype], abs=1e-6)


def test_bfloat16_differs_from_float32_by_its_rounding_only(toy: ToyRuns) -> None:
    check_losses(toy.train(BFLOAT16, *COMPILED), toy.train(FLOAT32, *REFERENCE), TOLERANCE[BFLOAT16])


@ADAPTERS
@DTYPES
def test_compiled_layers_give_the_losses_of_eager_ones(
    toy: ToyRuns, dtype: str, adapter: tuple[str, ...]
) -> None:
    run = toy.train(dtype, *COMPILED, *adapter)
    check_losses(run, toy.train(dtype, *EAGER, *adapter), TOLERANCE[dtype])


@pytest.mark.parametrize("compiled", [EAGER, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradient_checkpointing_changes_no_loss(toy: ToyRuns, kind: str, compiled: tuple[str, ...]) -> None:
    run = toy.train(FLOAT32, *compiled, f"train.gradient_checkpointing={kind}")
    check_losses(run, toy.train(FLOAT32, *compiled, "train.gradient_checkpointing=none"), TOLERANCE[FLOAT32])


@pytest.mark.parametrize("teacher", ["null", "{toy}/model"], ids=["itself", "frozen"])
def test_distillation_gives_the_losses_of_the_dense_reference(toy: ToyRuns, teacher: str) -> None:
    """Under ZeRO-3, where a teacher must stay whole, and with compiled layers."""
    distill = ("train.objective=distill", f"train.teacher={teacher.format(toy=toy.folder)}")
    reference = logged(toy.train(FLOAT32, *distill, *REFERENCE))
    for fast in (("train.deepspeed=zero3", *EAGER), ("train.deepspeed=zero2", *COMPILED)):
        losses = logged(toy.train(FLOAT32, *distill, *fast))
        assert losses == pytest.approx(reference, rel=TOLERANCE[FLOAT32], abs=1e-6)


def test_two_equal_runs_give_the_same_losses_to_the_last_digit(toy: ToyRuns) -> None:
    """Nothing in a step depends on the order in which the threads of a GPU add."""
    first = toy.train(BFLOAT16, *COMPILED)
    again = toy.new_run("again")
    train_here(toy.recipe, again, BFLOAT16, *COMPILED)
    assert logged(again) == logged(first)


def test_a_loss_that_is_not_finite_stops_the_run(toy: ToyRuns) -> None:
    run = toy.new_run("nan")
    with pytest.raises(UserError, match="lower train.learning_rate"):
        train_here(toy.recipe, run, BFLOAT16, "train.learning_rate=1e38", "train.max_grad_norm=0")
    assert not complete_checkpoints(run)
    # the process can train again
    assert len(logged(toy.train(BFLOAT16, *COMPILED))) == 6


def test_a_full_memory_ends_the_run_in_one_sentence(toy: ToyRuns) -> None:
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        torch.cuda.empty_cache()
        with pytest.raises(UserError, match="the memory of a GPU is full"):
            train_here(toy.recipe, toy.new_run("oom"), BFLOAT16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_dry_run_of_a_gpu_names_its_backend(toy: ToyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    from blockft.stages.dry_run import print_dry_run

    print_dry_run(load_recipe(str(toy.recipe), ["data.row_len=512", f"train.output_dir={toy.folder}/dry"]), 1)
    out = capsys.readouterr().out
    assert "flex" in out and "bfloat16" in out
    assert not Path(toy.folder, "dry").exists()
