"""A run is planned for the memory of a GPU, and a full memory is reported in one sentence."""

import json
import shutil
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
from blockft.training.memory_estimate import KINDS, OUTSIDE_BYTES, USABLE_SHARE, usable_bytes
from blockft.training.plan import RunPlan
from blockft.units import parse_bytes
from tests.commands import blockft
from tests.run import toy_recipe


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    prepare(toy_recipe(folder, head_dim=16))  # the smallest heads of FlexAttention
    return folder


Planned = tuple[Recipe, RunPlan, MemoryPlan]


@pytest.fixture
def planned(toy: Path) -> Planned:
    """A run whose rows are so long that activations are most of its memory."""
    recipe = toy_recipe(toy, "train.deepspeed=zero0", "train.torch_compile=false")
    plan = build_plan(recipe, 1, on_gpu=True)
    memory = plan_memory(recipe, plan)
    deeper = replace(memory.model, layers=[*memory.model.layers] * 8)
    return recipe, plan, replace(memory, model=deeper, run=memory.run.with_row_len(10_000_000))


def gpu_for(memory: MemoryPlan, kind: str) -> float:
    """Return the smallest memory of a GPU into which a kind fits."""
    return memory.estimate(kind).peak_bytes / USABLE_SHARE + OUTSIDE_BYTES + 1


def test_auto_takes_the_least_recomputation_that_fits_and_says_why(planned: Planned) -> None:
    recipe, plan, memory = planned
    for kind in KINDS:
        chosen, sentence = decide_checkpointing(recipe, plan, memory, gpu_for(memory, kind))
        assert chosen == kind
        assert sentence.startswith(f"gradient checkpointing: {kind} (auto: ")
    assert "; selective would need" in sentence


def test_a_kind_in_the_recipe_is_taken_even_if_the_estimate_does_not_fit(planned: Planned) -> None:
    recipe, plan, memory = planned
    recipe.train.gradient_checkpointing = GradientCheckpointing.none
    assert decide_checkpointing(recipe, plan, memory, 1e9)[0] == "none"


LARGE = ("model.init=random", "data.row_len=65536", "train.torch_compile=false", "train.batch_rows=64")


@pytest.fixture(scope="module")
def large(toy: Path) -> Path:
    """A model with the tokenizer of the toy model, whose weights need about 1 GiB."""
    folder = toy / "large"
    shutil.copytree(toy / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    return folder


def plan_large(toy: Path, large: Path, *overrides: str) -> Planned:
    recipe = toy_recipe(toy, f"model.path={large}", *LARGE, *overrides)
    plan = build_plan(recipe, 1, on_gpu=True)
    return recipe, plan, plan_memory(recipe, plan)


def gpu_for_share(memory: MemoryPlan, share: float) -> float:
    """Return the memory of a GPU of which a share of the run's smallest peak may be filled."""
    return memory.estimate("full").peak_bytes * share / USABLE_SHARE + OUTSIDE_BYTES


def test_every_remedy_suffices_by_the_estimate(toy: Path, large: Path) -> None:
    recipe, plan, memory = plan_large(toy, large)
    counts = []
    for share in (0.75, 0.5, 0.35, 0.2, 0.01):
        gpu_bytes = gpu_for_share(memory, share)
        remedies = list_remedies(recipe, plan, memory, gpu_bytes)
        counts.append(len(remedies))
        for text in remedies:
            if "data.row_len" in text:
                row_len = int(text.split("data.row_len=")[1].split()[0])
                shorter = replace(memory, run=memory.run.with_row_len(row_len))
                assert shorter.estimate("full").peak_bytes <= usable_bytes(gpu_bytes)
            else:
                needed = parse_bytes(text.split("needs ")[1].rstrip(")"))
                assert needed <= usable_bytes(gpu_bytes) * 1.02, text  # the size is printed with one digit
    assert counts[0] >= 3 and counts[-1] == 0 and counts == sorted(counts, reverse=True), counts


def test_a_run_that_cannot_fit_is_refused_with_what_would(toy: Path, large: Path) -> None:
    recipe, plan, memory = plan_large(toy, large)
    message = (
        r"needs [\d.]+ GiB on each GPU with train.gradient_checkpointing=full, but of [\d.]+ GiB only [\d.]+ "
        r"GiB may be filled: .*train an adapter \(train.lora\) \(needs [\d.]+ GiB\), or .*"
    )
    with pytest.raises(UserError, match=message):
        decide_checkpointing(recipe, plan, memory, gpu_for_share(memory, 0.75))
    with pytest.raises(UserError, match="no change of one setting suffices .* so take larger GPUs"):
        decide_checkpointing(recipe, plan, memory, gpu_for_share(memory, 0.01))


@pytest.mark.parametrize(
    ("overrides", "is_remedy"),
    [
        (("train.lora={r: 8}",), True),
        (("train.lora={r: 8}", "model.quantization=nf4"), False),
        (("train.lora={r: 8}", "train.deepspeed=zero3"), False),
    ],
)
def test_quantization_is_a_remedy_where_it_is_possible(
    toy: Path, large: Path, overrides: tuple[str, ...], is_remedy: bool
) -> None:
    recipe, plan, memory = plan_large(toy, large, *overrides)
    remedies = list_remedies(recipe, plan, memory, 1e12)
    assert any("model.quantization=nf4" in remedy for remedy in remedies) is is_remedy


@pytest.mark.parametrize(("batch_rows", "is_named"), [(1, True), (4, False)])
def test_more_gpus_are_a_remedy_with_rows_that_they_can_share(
    toy: Path, large: Path, batch_rows: int, is_named: bool
) -> None:
    recipe, plan, memory = plan_large(toy, large, f"train.batch_rows={batch_rows}")
    (remedy,) = [text for text in list_remedies(recipe, plan, memory, 1e12) if "among 2 GPUs" in text]
    assert ("--hostfile, train.batch_rows a multiple of 2, needs" in remedy) is is_named


def test_the_kind_on_a_cpu_is_none(toy: Path) -> None:
    recipe = toy_recipe(toy)
    assert decide_checkpointing(recipe, build_plan(recipe, 1), None, None)[0] == "none"


@pytest.mark.parametrize(
    ("setting", "on_gpu", "compiles"),
    [("null", True, True), ("null", False, False), ("true", False, True), ("false", True, False)],
)
def test_layers_are_compiled_on_a_gpu_unless_the_recipe_says_otherwise(
    toy: Path, setting: str, on_gpu: bool, compiles: bool
) -> None:
    for config in ("zero2", "zero3"):
        recipe = toy_recipe(toy, f"train.deepspeed={config}", f"train.torch_compile={setting}")
        assert build_plan(recipe, 1, on_gpu=on_gpu).compiles is compiles


@pytest.mark.parametrize(
    ("section", "is_remedy"),
    [(None, True), ({}, True), ({"device": "none"}, True), ({"device": "cpu"}, False)],
)
def test_offloading_is_a_remedy_where_nothing_is_offloaded(
    toy: Path, section: dict[str, str] | None, is_remedy: bool
) -> None:
    recipe = toy_recipe(toy)
    plan = build_plan(recipe, 1, on_gpu=True)
    plan = replace(plan, deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": section}})
    remedies = list_remedies(recipe, plan, plan_memory(recipe, plan), 1e12)
    assert any("(train.deepspeed=zero2-offload)" in remedy for remedy in remedies) is is_remedy


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
    with pytest.raises(UserError, match=r"needs .* but of 953.7 MiB only 0 B may be filled"):
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
