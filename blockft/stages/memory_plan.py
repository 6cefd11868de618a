"""The memory that a recipe needs on a GPU, and the kind of gradient checkpointing that fits."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from blockft.config.choices import GradientCheckpointing, Objective, Optimizer, Quantization
from blockft.config.recipe import RECIPES_FOLDER
from blockft.config.settings import Recipe
from blockft.errors import RankError, UserError, first_line, warn
from blockft.model.decoder_layers import attention_windows
from blockft.model.load import build_meta_model, load_config
from blockft.model.shared_input import share_products
from blockft.stages.run_plan import build_training_model
from blockft.training.deepspeed_config import is_offloaded, load_deepspeed_config
from blockft.training.layer_memory import measure_loss
from blockft.training.memory_estimate import (
    ADAM_8BIT_BYTES,
    ADAM_BYTES,
    KINDS,
    MemoryEstimate,
    ModelMemory,
    RunMemory,
    choose_kind,
    estimate_memory,
    longest_row,
    measure_model,
    usable_bytes,
)
from blockft.training.objectives import DistillationTargets, distill_loss, label_loss
from blockft.training.plan import RunPlan
from blockft.units import format_memory

TOLERANCE = 1.1
"""A peak above the expected one by more than this factor gives a warning."""

MAX_GPUS = 64
"""Largest number of GPUs that is proposed."""

OUT_OF_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED")
"""Text of errors of CUDA and of its libraries when the memory of a GPU is full."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory of a run.

    num_parameters, num_trained, num_teacher
                parameters of the base model, of what is trained, and of another model that teaches
    model, run  what the estimate reads
    """

    num_parameters: int
    num_trained: int
    num_teacher: int
    model: ModelMemory
    run: RunMemory

    def estimate(self, kind: str) -> MemoryEstimate:
        return estimate_memory(self.model, self.run, kind)

    def choose(self, gpu_bytes: float) -> str | None:
        """Return the kind of gradient checkpointing with the least recomputation that fits, or None."""
        return choose_kind(self.model, self.run, gpu_bytes)

    def longest_row(self, kind: str, gpu_bytes: float) -> int:
        return longest_row(self.model, self.run, kind, gpu_bytes)


def plan_memory(recipe: Recipe, plan: RunPlan) -> MemoryPlan:
    """Return what the memory of a run is estimated from; no weights are loaded."""
    settings = recipe.train
    model = copy.deepcopy(plan.model)  # on the meta device: only its sizes are copied
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore
    if plan.shares_products:
        share_products(base)
    base.to(plan.dtype)  # type: ignore[arg-type]  # DeepSpeed does so, also with the adapter
    num_teacher = _count_teacher(recipe)
    return MemoryPlan(
        num_parameters=plan.num_parameters,
        num_trained=sum(p.numel() for p in base.parameters() if p.requires_grad),
        num_teacher=num_teacher,
        model=measure_model(
            base,
            compiled=plan.compiles,
            loss_bytes=_measure_loss_bytes(recipe, plan),
            teacher_bytes=float(num_teacher * plan.dtype.itemsize),
            quantized=recipe.model.quantization is not None,
        ),
        run=RunMemory(
            deepspeed=plan.deepspeed,
            num_processes=plan.num_processes,
            row_len=recipe.data.row_len,
            num_labels=plan.rows.max_row_labels(),
            accumulates=settings.batch_rows > plan.num_processes,
            moment_bytes=ADAM_BYTES if settings.optimizer is Optimizer.adamw else ADAM_8BIT_BYTES,
            dense_masks=len(attention_windows(base.config)) if plan.backend == "sdpa" else 0,
        ),
    )


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the size of a checkpoint: trained weights in float32 and their moments; loads no weights."""
    model, _ = build_training_model(recipe)
    moments = ADAM_BYTES if recipe.train.optimizer is Optimizer.adamw else ADAM_8BIT_BYTES
    return round((4 + moments) * sum(p.numel() for p in model.parameters() if p.requires_grad))


def decide_checkpointing(
    recipe: Recipe, plan: RunPlan, memory: MemoryPlan | None, gpu_bytes: float | None
) -> tuple[str, str]:
    """Return the kind of gradient checkpointing of a run and a sentence about it.

    memory     None on a CPU
    gpu_bytes  the memory of the smallest GPU of the run; None on a CPU

    Raises:
        UserError: the setting is auto, and no kind fits.
    """
    wanted = recipe.train.gradient_checkpointing
    if wanted is not GradientCheckpointing.auto:
        return wanted.value, f"gradient checkpointing: {wanted} (by the recipe)"
    if gpu_bytes is None or memory is None:
        return "none", "gradient checkpointing: none (on a CPU)"
    kind = memory.choose(gpu_bytes)
    if kind is None:
        raise UserError(describe_misfit(recipe, plan, memory, gpu_bytes))
    expected = format_memory(memory.estimate(kind).peak_bytes)
    sentence = f"gradient checkpointing: {kind} (auto: {expected} of {format_memory(gpu_bytes)} are expected"
    if kind != KINDS[0]:
        less = KINDS[KINDS.index(kind) - 1]
        sentence += f"; {less} would need {format_memory(memory.estimate(less).peak_bytes)}"
    return kind, f"{sentence})"


def describe_misfit(
    recipe: Recipe, plan: RunPlan, memory: MemoryPlan, gpu_bytes: float, kind: str = KINDS[-1]
) -> str:
    """Return the sentence that a run does not fit with a kind of gradient checkpointing, and what would."""
    sizes = (memory.estimate(kind).peak_bytes, gpu_bytes, max(0.0, usable_bytes(gpu_bytes)))
    peak, whole, usable = map(format_memory, sizes)
    remedies = ", or ".join(list_remedies(recipe, plan, memory, gpu_bytes, kind)) or (
        "no change of one setting suffices (shorter rows, an adapter, quantization, offloading, up to "
        f"{MAX_GPUS} GPUs), so take larger GPUs or a smaller model"
    )
    return (
        f"the run needs {peak} on each GPU with train.gradient_checkpointing={kind}, but of {whole} only "
        f"{usable} may be filled: {remedies}"
    )


def list_remedies(
    recipe: Recipe, plan: RunPlan, memory: MemoryPlan, gpu_bytes: float, kind: str = KINDS[-1]
) -> list[str]:
    """Return the changes of which each alone makes a run fit, by the estimate, with the expected peak."""
    remedies = []
    if (sufficient := memory.choose(gpu_bytes)) and sufficient != kind:
        peak = format_memory(memory.estimate(sufficient).peak_bytes)
        remedies.append(f"set train.gradient_checkpointing={sufficient} (needs {peak})")
    if longest := memory.longest_row(kind, gpu_bytes):
        remedies.append(f"prepare rows of at most data.row_len={longest} tokens")
    for text, changed in _list_changes(recipe, plan):
        peak_bytes = changed.estimate(kind).peak_bytes
        if peak_bytes <= usable_bytes(gpu_bytes):
            remedies.append(f"{text} (needs {format_memory(peak_bytes)})")
    return remedies + _share_among_gpus(recipe, plan, gpu_bytes, kind)


def _list_changes(recipe: Recipe, plan: RunPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Yield changes of settings, and the memory of the run with each."""
    is_full = recipe.train.lora is None
    if is_full:
        yield "train an adapter (train.lora)", _plan_adapter(recipe, plan, quantized=False)
    if recipe.model.quantization is None and plan.zero_stage < 3:
        name = "quantize the frozen weights (model.quantization=nf4)"
        text = "train an adapter on quantised weights (train.lora with model.quantization=nf4)"
        yield text if is_full else name, _plan_adapter(recipe, plan, quantized=True)
    if is_full and not is_offloaded(plan.deepspeed, "offload_optimizer"):
        config = f"zero{3 if plan.zero_stage == 3 else 2}-offload"
        changed = plan_memory(recipe, _with_deepspeed(plan, config))
        yield f"offload to the host (train.deepspeed={config})", changed


def _plan_adapter(recipe: Recipe, plan: RunPlan, *, quantized: bool) -> MemoryPlan:
    """Return the memory of the run if it trained its own adapter, or one with the default options."""
    changed = recipe.model_copy(deep=True)
    changed.train.lora = recipe.train.lora or {}
    if quantized:
        changed.model.quantization = Quantization.nf4
    model, _ = build_training_model(changed)
    return plan_memory(changed, replace(plan, model=model))


def _with_deepspeed(plan: RunPlan, config: str) -> RunPlan:
    """Return the plan with a shipped DeepSpeed config."""
    return replace(plan, deepspeed=load_deepspeed_config(config, RECIPES_FOLDER / "deepspeed"))


def _share_among_gpus(recipe: Recipe, plan: RunPlan, gpu_bytes: float, kind: str) -> list[str]:
    """Return the smallest power of two of GPUs that suffices under ZeRO-3, as a list with one remedy.

    The list is empty if none up to `MAX_GPUS` suffices.
    """
    if recipe.model.quantization is not None:  # ZeRO-3 cannot shard it
        return []
    config = "" if plan.zero_stage == 3 else "train.deepspeed=zero3 with "
    shared = plan_memory(recipe, _with_deepspeed(plan, "zero3") if config else plan)
    num_gpus = 2
    while num_gpus <= MAX_GPUS:
        run = replace(shared.run, num_processes=num_gpus, accumulates=recipe.train.batch_rows > num_gpus)
        peak_bytes = replace(shared, run=run).estimate(kind).peak_bytes
        if num_gpus > plan.num_processes and peak_bytes <= usable_bytes(gpu_bytes):
            is_shared = recipe.train.batch_rows % num_gpus == 0
            rows = "" if is_shared else f", train.batch_rows a multiple of {num_gpus}"
            options, size = f"{config}--num-gpus or --hostfile{rows}", format_memory(peak_bytes)
            return [f"share the weights among {num_gpus} GPUs ({options}, needs {size})"]
        num_gpus *= 2
    return []


def warn_of_peak(memory: MemoryPlan, kind: str, measured_bytes: float) -> None:
    """Warn if the measured peak of a run is far above the expected one."""
    if measured_bytes > TOLERANCE * memory.estimate(kind).peak_bytes:
        warn(
            f"the peak memory is more than {TOLERANCE - 1:.0%} above the expected one: "
            "train.gradient_checkpointing=auto may choose a kind that does not fit, so set selective or full "
            "if a longer run fills the memory"
        )


@contextmanager
def reported_out_of_memory(recipe: Recipe, kind: str) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU into a sentence with a remedy.

    Raises:
        RankError: the GPU of this process has too little memory. Checkpoints are not touched.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        remedies = [f"data.row_len smaller than {recipe.data.row_len} (prepare again)"]
        if kind != KINDS[-1]:
            more = KINDS[KINDS.index(kind) + 1]
            remedies.insert(0, f"train.gradient_checkpointing={more} instead of {kind}")
        raise RankError(
            f"the memory of a GPU is full ({first_line(error)[:200]}): use {', or '.join(remedies)}, and "
            "resume from the last complete checkpoint with --resume, if there is one"
        ) from error


def gpu_memory() -> int | None:
    """Return the memory of this process's GPU in bytes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def smallest_gpu() -> int | None:
    """Return the memory of the smallest GPU of the run; None on CPUs. All ranks call it."""
    sizes: list[int | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, gpu_memory())
    return min((size for size in sizes if size is not None), default=None)


def _count_teacher(recipe: Recipe) -> int:
    if recipe.train.teacher is None:
        return 0
    return sum(p.numel() for p in build_meta_model(load_config(recipe.train.teacher)).parameters())


def _measure_loss_bytes(recipe: Recipe, plan: RunPlan) -> float:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(logits.shape[:2], dtype=torch.long)
        outputs = SimpleNamespace(logits=logits)
        if recipe.train.objective is Objective.sft:
            return label_loss(outputs, labels, 1)
        targets = DistillationTargets(
            labels, torch.ones_like(labels, dtype=torch.bool), logits.detach() * 1, 1
        )
        return distill_loss(outputs, targets, 1)

    return measure_loss(loss, dtype=plan.dtype)
