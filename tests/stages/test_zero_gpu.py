"""ZeRO 0 to 3 on one GPU, of all weights and of LoRA: losses, exact resume, and exports equal to the run."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from blockft.model.checkpoint import complete_checkpoints, find_checkpoint, load_reference_logits
from blockft.stages.export import export
from tests.gpu_runs import (
    BFLOAT16,
    FLOAT32,
    TOLERANCE,
    ToyRuns,
    check_losses,
    forget_last_checkpoint,
    losses_without_speed,
    train_here,
    zero_runs,
)

pytestmark = pytest.mark.gpu

STAGES = zero_runs(0, 1, 2, 3)
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyRuns:
    return ToyRuns(tmp_path_factory.mktemp("zero-gpu"))


@STAGES
@DTYPES
def test_every_zero_stage_gives_the_same_losses(
    toy: ToyRuns, dtype: str, stage: int, adapter: tuple[str, ...]
) -> None:
    run = toy.train(dtype, *adapter, f"train.deepspeed=zero{stage}")
    check_losses(run, toy.train(dtype, *adapter, "train.deepspeed=zero2"), TOLERANCE[dtype])


@STAGES
def test_a_resumed_run_gives_the_losses_of_one_never_stopped(
    toy: ToyRuns, stage: int, adapter: tuple[str, ...]
) -> None:
    """To every printed digit. The checkpoints of a GPU are read as weights only, too."""
    settings = (BFLOAT16, *adapter, f"train.deepspeed=zero{stage}")
    expected = toy.train(*settings)
    run = forget_last_checkpoint(expected, toy.new_run(f"resumed-{stage}-{len(adapter)}"))
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-3"]
    train_here(toy.recipe, run, *settings, resume=True)
    assert losses_without_speed(run) == losses_without_speed(expected)


@STAGES
@DTYPES
def test_an_export_gives_the_logits_of_its_run(
    toy: ToyRuns, dtype: str, stage: int, adapter: tuple[str, ...]
) -> None:
    """The export is made and compared on the CPU, the run's logits are those of the GPU."""
    run = toy.train(dtype, *adapter, f"train.deepspeed=zero{stage}")
    out = export(run, toy.folder / f"export-{dtype}-{stage}-{len(adapter)}")
    ids, positions, expected = load_reference_logits(find_checkpoint(run))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for device in ("cpu", "cuda"):
        with torch.no_grad():
            logits = model.to(device)(input_ids=ids[None].to(device)).logits[0, positions].cpu()
        is_rounded = dtype == BFLOAT16 and adapter
        difference = float((logits - expected).norm() / expected.norm())
        assert difference < (2e-2 if is_rounded else 1e-5), device
