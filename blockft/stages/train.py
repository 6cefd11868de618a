"""`blockft train`: one run, from prepared examples to whole checkpoints."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch.utils.data import Subset
from transformers import PreTrainedModel

from blockft.config.choices import Objective, WeightInit
from blockft.config.recipe import dump_recipe
from blockft.config.settings import Recipe
from blockft.errors import UserError
from blockft.model.checkpoint import read_marker, remove_incomplete
from blockft.model.fingerprint import model_fingerprint
from blockft.model.load import compile_layers, load_config, load_model, load_tokenizer
from blockft.model.lora import add_adapter
from blockft.outputs import (
    DATA,
    LOSS_PLOT,
    METRICS,
    RECIPE,
    read_metrics,
    save_figure,
    truncate_metrics,
    write_atomic,
)
from blockft.progress import is_enabled
from blockft.stages.plan import NUM_PROCESSES, TEACHER, RunPlan, check_run, check_run_signature
from blockft.training.launch import (
    check_ranks,
    init_distributed,
    set_worker_environment,
    shutdown_distributed,
    use_cpu,
)
from blockft.training.objectives import Distillation

REFERENCE_LEN = 256
"""Tokens of the text on which exports are compared with the run: the start of its first row."""


def train(recipe: Recipe, *, resume: bool) -> Path:
    """Train as a worker among WORLD_SIZE (or alone) and return the run's folder; nothing if it is finished.

    Raises:
        UserError: see `check_run`; an unknown tracker; a loss that is not finite.
        KeyboardInterrupt: the run was asked to stop, and has saved a checkpoint.
    """
    set_worker_environment()
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # every rank checks: none writes before all have met
    plan, checkpoint = check_run(recipe, resume=resume, num_processes=num_processes)
    run = Path(recipe.train.output_dir)
    marker = read_marker(checkpoint) if checkpoint else None
    if marker and marker["step"] >= plan.num_steps and not marker["eval_due"]:
        if rank == 0:
            done = f"{run} is at step {marker['step']} of {plan.num_steps}: nothing is left to do"
            Console(stderr=True).print(done, soft_wrap=True, highlight=False)
        return run

    from transformers import TrainingArguments

    from blockft.training.lr_schedule import RecipeScheduleCallback
    from blockft.training.run_callback import RunCallback
    from blockft.training.trainer import BlockTrainer
    from blockft.training.universal_checkpoint import (
        LOAD_UNIVERSAL,
        UNIVERSAL,
        SeparateAdamStepsCallback,
        convert_to_universal,
        remove,
    )

    init_distributed()
    # ZeRO-0 has no shards
    same = not marker or marker["facts"][NUM_PROCESSES] == num_processes
    recut = not same and plan.facts["ZeRO stage"] > 0
    if recut:
        plan = replace(plan, deepspeed=plan.deepspeed | LOAD_UNIVERSAL)
    # before ZeRO-3 is told of: it would take the teacher's weights apart, too
    distillation, fingerprint = _distillation(recipe, plan)
    facts = plan.facts | fingerprint
    try:
        arguments = TrainingArguments(
            **_arguments(recipe, plan, num_processes),
            eval_on_start=bool(plan.eval_rows) and (not marker or marker["eval_due"]),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"the settings of train cannot be used: {str(error).splitlines()[0]}") from error
    check_ranks(run, {"recipe": dump_recipe(recipe), "checkpoint": str(checkpoint), **facts})
    if checkpoint:
        check_run_signature(checkpoint, facts)
    model = _model(recipe, plan)
    # or the Trainer turns it off in the config, and so in every export
    arguments.use_cache = model.config.use_cache
    record = RunCallback(
        run,
        tokenizer=load_tokenizer(recipe.model.path, recipe.model.revision),
        facts=facts,
        probe_ids=plan.rows[0]["input_ids"][0, :REFERENCE_LEN].clone(),
        save_total_limit=recipe.train.save_total_limit,
        keep_best=recipe.train.keep_best,
        evaluates=bool(plan.eval_rows),
        eval_steps=recipe.train.eval_steps,
        tokens_per_step=recipe.train.batch_rows * recipe.data.row_len,
        unlogged=marker["unlogged"] if marker else {},
        eval_due=bool(marker and marker["eval_due"]),
    )
    try:
        trainer = BlockTrainer(
            model=model,
            args=arguments,
            # no row too many: where only an evaluation was due at the last step, none shall be trained on
            train_dataset=Subset(plan.rows, range(plan.num_steps * recipe.train.batch_rows)),
            eval_rows=plan.eval_rows,
            distillation=distillation,
            callbacks=[record, RecipeScheduleCallback(), *([SeparateAdamStepsCallback()] if recut else [])],
        )
    except (ValueError, RuntimeError) as error:
        if not any(tracker in str(error) for tracker in recipe.train.report_to):
            raise
        raise UserError(f"train.report_to cannot be used: {str(error).splitlines()[0]}") from error
    record.trainer = trainer
    source = run / UNIVERSAL if recut else checkpoint
    if rank == 0:
        _start_run_folder(run, recipe, plan, checkpoint)
        if checkpoint and recut:
            convert_to_universal(checkpoint)
    torch.distributed.barrier()
    trainer.train(resume_from_checkpoint=str(source) if source else None)
    if rank == 0:
        remove(run)
        plot_loss(run)
    shutdown_distributed()
    if record.asked_to_stop:
        raise KeyboardInterrupt
    return run


def _model(recipe: Recipe, plan: RunPlan) -> PreTrainedModel | PeftModel:
    """The model to train, compiled and with an adapter if the recipe asks for them."""
    model = load_model(
        recipe.model.path,
        revision=recipe.model.revision,
        backend=plan.backend,
        dtype=plan.dtype,
        random_seed=recipe.train.seed if recipe.model.init is WeightInit.random else None,
    )
    if recipe.train.torch_compile:
        compile_layers(model)
    if recipe.train.lora is None:
        return model
    return add_adapter(model, recipe.train.lora, seed=recipe.train.seed, revision=recipe.model.revision)


def _distillation(recipe: Recipe, plan: RunPlan) -> tuple[Distillation | None, dict[str, str]]:
    """Who teaches the model, if the objective is that somebody does, and the fact of which model that is."""
    settings = recipe.train
    if settings.objective is Objective.sft:
        return None, {}
    if settings.teacher is None:
        return Distillation(None, settings.teacher_weight), {}
    teacher = load_model(settings.teacher, backend=plan.backend, dtype=plan.dtype).requires_grad_(False)
    fact = {TEACHER: model_fingerprint(teacher)}
    if settings.torch_compile:
        compile_layers(teacher)
    return Distillation(teacher, settings.teacher_weight), fact


def _start_run_folder(run: Path, recipe: Recipe, plan: RunPlan, checkpoint: Path | None) -> None:
    """Write what the run's folder says of itself, and forget what came after the checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    remove_incomplete(run)
    write_atomic(run / RECIPE, dump_recipe(recipe))
    write_atomic(run / DATA, json.dumps(plan.manifest, indent=2) + "\n")
    if checkpoint:
        marker = read_marker(checkpoint)
        truncate_metrics(run, last_step=marker["step"], eval_due=marker["eval_due"])
    else:
        write_atomic(run / METRICS, "")


def describe(recipe: Recipe, num_processes: int, *, resume: bool = False) -> None:
    """Print what the run would do: rows, steps, share of labels, fill, memory (`--dry-run`).

    Raises:
        UserError: see `check_run`.
    """
    from transformers import AutoModelForCausalLM

    plan, _ = check_run(recipe, resume=resume, num_processes=num_processes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(recipe.model.path, recipe.model.revision))
        num_teacher = 0
        if recipe.train.teacher is not None:
            teacher = AutoModelForCausalLM.from_config(load_config(recipe.train.teacher))
            num_teacher = sum(p.numel() for p in teacher.parameters())
    num_parameters = sum(p.numel() for p in model.parameters())
    if recipe.train.lora is not None:
        model = add_adapter(model, recipe.train.lora, seed=recipe.train.seed)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stage = plan.deepspeed.get("zero_optimization", {}).get("stage", 0)
    width = plan.dtype.itemsize
    # Adam keeps two float32 moments and, beside 16-bit weights, float32 ones; each stage shards one more
    states = {
        "optimizer": num_trained * (8 if width == 4 else 12),
        "gradients": num_trained * width,
        "weights": (num_parameters + (num_trained if recipe.train.lora is not None else 0)) * width,
    }
    num_bytes = sum(size / (num_processes if stage > i else 1) for i, size in enumerate(states.values()))
    num_bytes += num_teacher * width
    rows = plan.rows
    table = Table("what", "value", title="dry run: nothing is written")
    for what, value in {
        "views to train on, per epoch": f"{len(rows.items):,}",
        "tokens, per epoch": f"{rows.num_tokens:,}",
        "label tokens, per epoch": f"{rows.num_labels:,} ({rows.num_labels / rows.num_tokens:.1%})",
        f"rows of {recipe.data.row_len:,}": f"{len(rows.epochs[0]):,} per epoch (fill {rows.fill:.1%})",
        "optimizer steps": f"{plan.num_steps:,} of {recipe.train.batch_rows} rows",
        "parameters": f"{num_parameters:,} in {str(plan.dtype).removeprefix('torch.')}, "
        f"{num_trained:,} are trained" + (f", {num_teacher:,} teach" if num_teacher else ""),
        "attention backend": plan.backend,
        f"memory for model states, ZeRO-{stage}, per process of {num_processes}": (
            f"{num_bytes / 2**30:.2f} GiB, activations not counted"
        ),
    }.items():
        table.add_row(what, value)
    Console().print(table)


def plot_loss(run: Path) -> None:
    """Draw the run's loss as a picture beside its metrics."""
    from matplotlib.figure import Figure

    metrics = read_metrics(run)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for line in metrics for name in line if "loss" in name):
        lines = [line for line in metrics if name in line]
        label = name.replace("eval_loss_", "held out, view ").replace("loss", "training")
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=label)
    axes.legend()
    axes.set(xlabel="step", ylabel="loss per label token", title=run.name)
    save_figure(figure, run / LOSS_PLOT)


def _arguments(recipe: Recipe, plan: RunPlan, num_processes: int) -> dict[str, Any]:
    """The settings of transformers.Trainer."""
    settings = recipe.train
    return {
        "output_dir": settings.output_dir,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings.batch_rows // num_processes,
        "max_steps": plan.num_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "lr_scheduler_kwargs": settings.lr_scheduler_kwargs,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "save_steps": settings.save_steps,
        "seed": settings.seed,
        "bf16": plan.dtype is torch.bfloat16,
        "deepspeed": plan.deepspeed,
        "use_cpu": use_cpu(),
        "report_to": settings.report_to,
        "run_name": Path(settings.output_dir).name,
        "disable_tqdm": not is_enabled(),
        # the trainer would drop the block ids, and go on with plain causal attention
        "remove_unused_columns": False,
        "average_tokens_across_devices": True,
        "accelerator_config": {"even_batches": False},
        "dataloader_pin_memory": not use_cpu(),
    }
