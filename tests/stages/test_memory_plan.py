"""A run is planned for the memory of a GPU, and a full memory is reported in one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockft.config.choices import GradientCheckpointing
from blockft.config.recipe import load_recipe
from blockft.config.settings import Recipe
from blockft.errors import UserError
from blockft.run_folder import METRICS
from blockft.stages.dry_run import print_dry_run
from blockft.stages.memory_plan import (
    MemoryPlan,
    decide_checkpointing,
    list_remedies,
    plan_memory,
    reported_out_of_memory,
)
from blockft.stages.prepare import prepare
from blockft.stages.run_plan import build_plan
from blockft.stages.train import train
from blockft.training.memory_estimate import KINDS, OUTSIDE_BYTES, USABLE_SHARE
from tests.commands import blockft
from tests.run import toy_recipe


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    prepare(toy_recipe(folder, head_dim=16))  # the smallest heads of FlexAttention
    return folder


@pytest.fixture
def planned(toy: Path) -> tuple[Recipe, MemoryPlan]:
    """A run whose rows are so long that activations are most of its memory."""
    recipe = toy_recipe(toy, "train.deepspeed=zero0", "train.torch_compile=false")
    memory = plan_memory(recipe, build_plan(recipe, 1, on_gpu=True))
    deeper = replace(memory.model, layers=[*memory.model.layers] * 8)
    return recipe, replace(memory, model=deeper, run=memory.run.with_row_len(10_000_000))


def gpu_for(memory: MemoryPlan, kind: str) -> float:
    """Return the smallest memory of a GPU into which a kind fits."""
    return memory.estimate(kind).peak_bytes / USABLE_SHARE + OUTSIDE_BYTES + 1


def test_auto_takes_the_least_recomputation_that_fits_and_says_why(
    planned: tuple[Recipe, MemoryPlan],
) -> None:
    recipe, memory = planned
    for kind in KINDS:
        chosen, sentence = decide_checkpointing(recipe, memory, gpu_for(memory, kind))
        assert chosen == kind
        assert sentence.startswith(f"gradient checkpointing: {kind} (auto: ")
    assert "; selective would need" in sentence


def test_a_kind_in_the_recipe_is_taken_even_if_the_estimate_does_not_fit(
    planned: tuple[Recipe, MemoryPlan],
) -> None:
    recipe, memory = planned
    recipe.train.gradient_checkpointing = GradientCheckpointing.none
    assert decide_checkpointing(recipe, memory, 1e9)[0] == "none"


def test_a_run_that_cannot_fit_is_refused_with_what_would(planned: tuple[Recipe, MemoryPlan]) -> None:
    recipe, memory = planned
    message = (
        r"needs .* with train.gradient_checkpointing=full, but of 5.0 GB only .* may be filled: prepare rows "
        r"of at most data.row_len=\d+ tokens, or train an adapter .*zero2-offload.*zero3 with --num-gpus"
    )
    with pytest.raises(UserError, match=message):
        decide_checkpointing(recipe, memory, 5e9)


@pytest.mark.parametrize(
    ("overrides", "is_remedy"),
    [
        (("train.lora={r: 8}",), True),
        (("train.lora={r: 8}", "model.quantization=nf4"), False),
        (("train.lora={r: 8}", "train.deepspeed=zero3"), False),
        ((), False),
    ],
)
def test_quantization_is_a_remedy_where_it_is_possible(
    planned: tuple[Recipe, MemoryPlan], toy: Path, overrides: tuple[str, ...], is_remedy: bool
) -> None:
    _, memory = planned
    recipe = toy_recipe(toy, *overrides)
    if "train.deepspeed=zero3" in overrides:
        memory = replace(memory, run=replace(memory.run, deepspeed={"zero_optimization": {"stage": 3}}))
    remedies = list_remedies(recipe, memory, 5e9)
    assert any("model.quantization=nf4" in remedy for remedy in remedies) is is_remedy


def test_the_kind_on_a_cpu_is_none(toy: Path) -> None:
    assert decide_checkpointing(toy_recipe(toy), None, None)[0] == "none"


@pytest.mark.parametrize(
    ("section", "is_remedy"),
    [(None, True), ({}, True), ({"device": "none"}, True), ({"device": "cpu"}, False)],
)
def test_offloading_is_a_remedy_where_nothing_is_offloaded(
    planned: tuple[Recipe, MemoryPlan], section: dict[str, str] | None, is_remedy: bool
) -> None:
    recipe, memory = planned
    deepspeed = {"zero_optimization": {"stage": 2, "offload_optimizer": section}}
    memory = replace(memory, run=replace(memory.run, deepspeed=deepspeed))
    remedies = list_remedies(recipe, memory, 5e9)
    assert ("offload to the host (train.deepspeed=zero2-offload)" in remedies) is is_remedy


@pytest.mark.parametrize("settings", [(), ("model.attention=flex",)])
def test_a_dry_run_prints_the_peak_and_the_longest_row_of_each_kind(
    toy: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...]
) -> None:
    print_dry_run(toy_recipe(toy, *settings), 1, gpu_bytes=80 * 10**9)
    out = capsys.readouterr().out
    assert "expected peak" in out and "buffers of DeepSpeed" in out and "chosen by auto" in out
    assert "bfloat16" in out and "flex" in out, "it is planned for a GPU"
    assert all(kind in out for kind in KINDS)


def test_a_dry_run_refuses_what_auto_refuses_after_it_has_printed_the_memory(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"needs .* but of 1.0 GB only 0 B may be filled"):
        print_dry_run(toy_recipe(toy), 1, gpu_bytes=10**9)
    assert "expected peak" in capsys.readouterr().out
    print_dry_run(toy_recipe(toy, "train.gradient_checkpointing=full"), 1, gpu_bytes=10**9)
    assert "may be filled" in capsys.readouterr().err, "a run with this setting would begin"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu-memory", "80GB"), "add --dry-run"),
        (("--gpu-memory", "80", "--dry-run"), "at least 1GB"),
        (("--gpu-memory", "much", "--dry-run"), "is not a size"),
    ],
)
def test_a_wrong_memory_is_refused(toy: Path, arguments: tuple[str, ...], message: str) -> None:
    done = blockft("train", toy / "recipe.yaml", *arguments)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_the_kinds_train_alike_and_are_not_part_of_the_signature(toy: Path) -> None:
    """A run that began with one kind resumes with another one; its losses are those of either."""
    curves = {}
    schedule = "train.lr_scheduler_type=constant"
    for kind in ("none", "full"):
        run = f"train.output_dir={toy}/{kind}"
        first = (run, schedule, f"train.gradient_checkpointing={kind}", "train.max_steps=4")
        train(toy_recipe(toy, *first))
        train(toy_recipe(toy, run, schedule, "train.gradient_checkpointing=selective"), resume=True)
        lines = (toy / kind / METRICS).read_text().splitlines()
        curves[kind] = [line.split('"tokens_per_s"')[0] for line in lines]
    assert curves["none"] == curves["full"] and len(curves["none"]) == 5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_memory_of_a_gpu_is_one_sentence(toy: Path, error: RuntimeError) -> None:
    recipe = toy_recipe(toy)
    with (
        pytest.raises(UserError, match="memory of a GPU is full .*: use train.gradient_checkpointing=full"),
        reported_out_of_memory(recipe, "selective"),
    ):
        raise error
    with pytest.raises(UserError, match="use data.row_len smaller"), reported_out_of_memory(recipe, "full"):
        raise error
    with pytest.raises(RuntimeError, match="another"), reported_out_of_memory(recipe, "full"):
        raise RuntimeError("another error")


def test_a_full_memory_during_training_keeps_the_last_checkpoint(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockft.training.trainer import BlockTrainer

    step = BlockTrainer.training_step

    def fail_at_the_last_step(trainer: BlockTrainer, *arguments: object) -> torch.Tensor:
        if trainer.state.global_step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(trainer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockTrainer, "training_step", fail_at_the_last_step)
    recipe = load_recipe(str(toy / "recipe.yaml"), [f"train.output_dir={toy}/full-memory"])
    with pytest.raises(UserError, match="the memory of a GPU is full"):
        train(recipe)
    monkeypatch.undo()
    assert (toy / "full-memory" / "checkpoint-4" / "complete.json").is_file()
    train(recipe, resume=True)
