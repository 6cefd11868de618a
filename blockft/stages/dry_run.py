"""`blockft train --dry-run`: the rows, steps and memory of a run, without starting it."""

import torch
from rich.table import Table

from blockft.config.settings import Recipe
from blockft.console import PlainConsole
from blockft.data.advice import RowFill, list_warnings
from blockft.errors import warn
from blockft.model.load import load_config
from blockft.model.lora import add_adapter
from blockft.stages.run_plan import check_run, warn_of_settings
from blockft.training.plan import RunPlan
from blockft.units import format_count


def print_dry_run(recipe: Recipe, num_processes: int, *, resume: bool = False) -> None:
    """Print the rows, steps, share of labels, fill and memory of a run to stdout, without starting it.

    Raises:
        UserError: see `check_run`.
    """
    plan, _ = check_run(recipe, resume=resume, num_processes=num_processes)
    warn_of_settings(recipe, plan)
    num_parameters, num_trained, num_teacher = _count_parameters(recipe)
    state_bytes = estimate_state_bytes(
        num_parameters=num_parameters,
        num_trained=num_trained,
        num_teacher=num_teacher,
        has_adapter=recipe.train.lora is not None,
        bytes_per_weight=plan.dtype.itemsize,
        zero_stage=plan.zero_stage,
        num_processes=num_processes,
    )
    rows = plan.rows
    parameters = (
        f"{num_parameters:,} in {str(plan.dtype).removeprefix('torch.')}, {num_trained:,} of them trained"
    )
    if num_teacher:
        parameters += f"; {num_teacher:,} of the teacher"
    epoch = rows.epochs[0]
    fill = RowFill.of_rows(epoch.rows, epoch.lengths, recipe.data.row_len)
    batch_rows, num_rows = recipe.train.batch_rows, len(epoch.rows)
    is_padded = len(epoch.rows[-1]) == 0
    padding = "" if not is_padded else f", padded to a multiple of train.batch_rows {batch_rows}"
    table = Table("quantity", "value", title="dry run: nothing is written")
    for quantity, value in {
        "examples to train on, counted per mode, per epoch": f"{rows.num_items:,}",
        "tokens per epoch": f"{rows.num_tokens:,}",
        **_describe_sources(plan),
        "label tokens per epoch": f"{rows.num_labels:,} ({rows.num_labels / rows.num_tokens:.1%})",
        f"rows of {recipe.data.row_len:,} tokens": f"{num_rows:,} per epoch{padding}, {fill.fill:.1%} filled",
        "optimizer steps": f"{plan.num_steps:,} of {format_count(batch_rows, 'row')}",
        "parameters": parameters,
        "attention backend": plan.backend,
        "compiled layers": "yes" if plan.compiles else "no",
        f"memory for model states, ZeRO-{plan.zero_stage}, per process of {num_processes}": (
            f"{state_bytes / 2**30:.2f} GiB without activations"
        ),
    }.items():
        table.add_row(quantity, value)
    PlainConsole().print(table)
    for warning in list_warnings(plan.manifest, epoch.lengths, fill):
        warn(warning)


def _describe_sources(plan: RunPlan) -> dict[str, str]:
    """Return the lines about the sources of an epoch, if there are several."""
    sources = plan.manifest["sources"]
    if len(sources) == 1:
        return {}
    counts = plan.rows.count_by_source(len(sources))
    return {
        f"of source {index}, {source['path']}": f"{format_count(items, 'example')}, "
        f"{format_count(num_tokens, 'token')}"
        for index, (source, (items, num_tokens)) in enumerate(zip(sources, counts, strict=True))
    }


def _count_parameters(recipe: Recipe) -> tuple[int, int, int]:
    """Return the number of parameters of the model, of those that are trained, and of the teacher."""
    from transformers import AutoModelForCausalLM

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
    return num_parameters, num_trained, num_teacher


def estimate_state_bytes(
    *,
    num_parameters: int,
    num_trained: int,
    num_teacher: int,
    has_adapter: bool,
    bytes_per_weight: int,
    zero_stage: int,
    num_processes: int,
) -> float:
    """Return the bytes per process of weights, gradients and optimizer states under ZeRO (stage 0 to 3).

    Adam keeps two float32 moments and, for 16-bit weights, a float32 copy of them. ZeRO-1 shards the
    optimizer states, ZeRO-2 also the gradients, ZeRO-3 also the weights. With an adapter `num_trained` counts
    its parameters and `num_parameters` those of the base model. Activations are not counted.
    """
    states = (
        num_trained * (8 if bytes_per_weight == 4 else 12),
        num_trained * bytes_per_weight,
        (num_parameters + (num_trained if has_adapter else 0)) * bytes_per_weight,
    )
    num_bytes = sum(size / (num_processes if zero_stage > index else 1) for index, size in enumerate(states))
    return num_bytes + num_teacher * bytes_per_weight
