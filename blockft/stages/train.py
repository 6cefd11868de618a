"""`blockft train`: one run, from prepared examples to whole checkpoints."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from blockft.config import Attention, Init, Precision, Recipe
from blockft.data.prepared import load_prepared
from blockft.errors import UserError
from blockft.model.checkpoint import find_checkpoint, read_facts
from blockft.model.load import load_config, load_model, load_tokenizer
from blockft.recipe import SHIPPED, dump_recipe
from blockft.rundir import (
    DATA,
    LOSS_PLOT,
    METRICS,
    RECIPE,
    cut_metrics,
    read_metrics,
    refuse_existing,
    write_whole,
)
from blockft.training.launch import prepare_worker, use_cpu
from blockft.training.rows import Rows

PROBE_LEN = 256


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any weight is loaded."""

    rows: Rows
    num_steps: int
    manifest: dict[str, Any]
    backend: str
    dtype: torch.dtype
    deepspeed: dict[str, Any]


def check_run(recipe: Recipe, *, resume: bool) -> None:
    """What can be said to the user at once, before processes start.

    Raises:
        UserError: the run exists and is not to be resumed, or cannot be.
    """
    run = Path(recipe.train.out)
    if resume:
        find_checkpoint(run)
    else:
        refuse_existing(run, "continue it with --resume, or choose another train.out")
    _plan(recipe, num_processes=1)


def train(recipe: Recipe, *, resume: bool) -> Path:
    """Train as a worker among WORLD_SIZE (or alone) and return the run's folder.

    Raises:
        UserError: see `check_run`; a checkpoint of other weights or data; a loss that is not finite.
    """
    prepare_worker()
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    plan, run = _plan(recipe, num_processes), Path(recipe.train.out)
    checkpoint = find_checkpoint(run) if resume else None
    facts = {
        "data": plan.manifest["content_hash"],
        "model": _shape(load_config(recipe.model.path, recipe.model.revision)),
    }
    if checkpoint:
        _check_same(checkpoint, facts)
    elif rank == 0:
        refuse_existing(run, "continue it with --resume, or choose another train.out")

    import deepspeed
    from transformers import TrainingArguments

    from blockft.training.record import RunRecord
    from blockft.training.trainer import BlockTrainer

    deepspeed.init_distributed(dist_backend="gloo" if use_cpu() else "nccl", verbose=False)
    arguments = TrainingArguments(**_arguments(recipe, plan, num_processes))
    model = load_model(
        recipe.model.path,
        revision=recipe.model.revision,
        backend=plan.backend,
        dtype=plan.dtype,
        random_seed=recipe.train.seed if recipe.model.init is Init.random else None,
    )
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / RECIPE, dump_recipe(recipe))
        write_whole(run / DATA, json.dumps(plan.manifest, indent=2) + "\n")
        if checkpoint:
            cut_metrics(run, last_step=read_facts(checkpoint)["step"])
        else:
            (run / METRICS).touch()
    record = RunRecord(
        run,
        tokenizer=load_tokenizer(recipe.model.path, recipe.model.revision),
        facts=facts,
        probe_ids=_probe_ids(plan.rows),
        keep_checkpoints=recipe.train.keep_checkpoints,
        tokens_per_step=recipe.train.batch_rows * recipe.data.row_len,
    )
    trainer = BlockTrainer(model=model, args=arguments, train_dataset=plan.rows, callbacks=[record])
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if rank == 0:
        plot_loss(run)
    if record.asked_to_stop:
        raise KeyboardInterrupt
    return run


def describe(recipe: Recipe, num_processes: int) -> None:
    """Print what the run would do: rows, steps, share of labels, fill, memory (`--dry-run`)."""
    from transformers import AutoModelForCausalLM

    plan = _plan(recipe, num_processes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(recipe.model.path, recipe.model.revision))
    num_parameters = sum(p.numel() for p in model.parameters())
    stage = plan.deepspeed.get("zero_optimization", {}).get("stage", 0)
    width = plan.dtype.itemsize
    # Adam keeps two float32 moments and, beside 16-bit weights, float32 ones; each stage shards one more
    states = {"optimizer": 8 if width == 4 else 12, "gradients": width, "weights": width}
    bytes_per_parameter = sum(
        size / (num_processes if stage > i else 1) for i, size in enumerate(states.values())
    )
    rows = plan.rows
    table = Table("what", "value", title="dry run: nothing is written")
    for what, value in {
        "views to train on, per epoch": f"{len(rows.items):,}",
        "tokens, per epoch": f"{rows.num_tokens:,}",
        "label tokens, per epoch": f"{rows.num_labels:,} ({rows.num_labels / rows.num_tokens:.1%})",
        f"rows of {recipe.data.row_len:,}": f"{len(rows.epochs[0]):,} per epoch (fill {rows.fill:.1%})",
        "optimizer steps": f"{plan.num_steps:,} of {recipe.train.batch_rows} rows",
        "parameters": f"{num_parameters:,} in {str(plan.dtype).removeprefix('torch.')}",
        "attention backend": plan.backend,
        f"memory for model states, ZeRO-{stage}, per process of {num_processes}": (
            f"{num_parameters * bytes_per_parameter / 2**30:.2f} GiB, activations not counted"
        ),
    }.items():
        table.add_row(what, value)
    Console().print(table)


def plot_loss(run: Path) -> None:
    """Draw the run's loss as a picture beside its metrics."""
    import matplotlib.pyplot as plt

    metrics = read_metrics(run)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["step"] for line in metrics], [line["loss"] for line in metrics])
    axes.set(xlabel="step", ylabel="loss per label token", title=run.name)
    figure.savefig(run / LOSS_PLOT, dpi=120)
    plt.close(figure)


def _plan(recipe: Recipe, num_processes: int) -> Plan:
    settings = recipe.train
    if settings.batch_rows % num_processes:
        raise UserError(
            f"train.batch_rows is {settings.batch_rows}, which {num_processes} processes cannot share: "
            f"make it a multiple of {num_processes}"
        )
    prepared = load_prepared(Path(recipe.data.out))
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    rows = Rows(
        prepared.examples,
        [view.value for view in recipe.data.views],
        row_len=recipe.data.row_len,
        batch_rows=settings.batch_rows,
        epochs=settings.epochs,
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    num_steps = len(rows) // settings.batch_rows
    auto_backend = "sdpa" if use_cpu() else "flex"
    auto_dtype = torch.float32 if use_cpu() else torch.bfloat16
    backend, dtype = recipe.model.attention, recipe.model.dtype
    return Plan(
        rows=rows,
        num_steps=min(num_steps, settings.max_steps or num_steps),
        manifest=prepared.manifest,
        backend=auto_backend if backend is Attention.auto else backend.value,
        dtype=auto_dtype if dtype is Precision.auto else getattr(torch, dtype.value),
        deepspeed=_deepspeed(settings.deepspeed),
    )


def _deepspeed(name: str) -> dict[str, Any]:
    """DeepSpeed's settings from a JSON file or by the name of one that ships."""
    shipped = SHIPPED / "deepspeed" / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in (SHIPPED / "deepspeed").glob("*.json")))
        raise UserError(f"train.deepspeed {name!r} is neither a file nor one that ships ({names})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _arguments(recipe: Recipe, plan: Plan, num_processes: int) -> dict[str, Any]:
    """The settings of transformers.Trainer."""
    settings = recipe.train
    return {
        "output_dir": settings.out,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings.batch_rows // num_processes,
        "max_steps": plan.num_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "lr_scheduler_kwargs": settings.scheduler_kwargs,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": False,
        "save_steps": settings.save_steps,
        "seed": settings.seed,
        "bf16": plan.dtype is torch.bfloat16,
        "deepspeed": plan.deepspeed,
        "use_cpu": use_cpu(),
        "report_to": settings.report_to,
        "run_name": Path(settings.out).name,
        "disable_tqdm": not sys.stderr.isatty(),
        # the trainer would drop the block ids, and go on with plain causal attention
        "remove_unused_columns": False,
        "average_tokens_across_devices": True,
        "accelerator_config": {"even_batches": False},
        "dataloader_pin_memory": not use_cpu(),
    }


def _probe_ids(rows: Rows) -> torch.Tensor:
    """The start of the first row's tokens: the text on which exports are compared with the run."""
    return rows[0]["input_ids"][0, :PROBE_LEN].clone()


def _shape(config: Any) -> dict[str, Any]:
    """What of a model's configuration decides which weights fit it."""
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {name: getattr(config, name) for name in (*names, "num_attention_heads", "num_key_value_heads")}


def _check_same(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Raises:
    UserError: the checkpoint comes from other data or another model.
    """
    found = read_facts(checkpoint)
    for name, remedy in {"model": "set model.path", "data": "set data.out"}.items():
        if found[name] != facts[name]:
            raise UserError(
                f"{checkpoint} is a checkpoint of another {name} ({found[name]}) than the recipe's "
                f"({facts[name]}): {remedy} to what the run began with, or start a new run"
            )
