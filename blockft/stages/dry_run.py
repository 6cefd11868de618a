"""`blockft train --dry-run`: the rows, steps and memory of a run, without starting it."""

from rich.table import Table

from blockft.config.choices import GradientCheckpointing
from blockft.config.settings import Recipe
from blockft.console import PlainConsole
from blockft.data.advice import RowFill, list_warnings
from blockft.errors import UserError, warn
from blockft.stages.memory_plan import MemoryPlan, describe_misfit, gpu_memory, plan_memory
from blockft.stages.run_plan import check_run, warn_of_settings
from blockft.training.memory_estimate import KINDS, usable_bytes
from blockft.training.plan import RunPlan
from blockft.units import format_count, format_memory


def print_dry_run(
    recipe: Recipe, num_processes: int, *, resume: bool = False, gpu_bytes: int | None = None
) -> None:
    """Print the rows, steps, share of labels, fill and memory of a run to stdout, without starting it.

    gpu_bytes: the memory of the GPUs of another machine, for which the run is planned. By default it is that
        of this machine's GPU; without one the memory is that of a process on the CPU.

    Raises:
        UserError: see `check_run`; the run does not fit into the GPU's memory.
    """
    gpu_bytes = gpu_memory() if gpu_bytes is None else gpu_bytes
    plan, _ = check_run(recipe, resume=resume, num_processes=num_processes, on_gpu=gpu_bytes is not None)
    warn_of_settings(recipe, plan)
    memory = plan_memory(recipe, plan)
    rows = plan.rows
    dtype = str(plan.dtype).removeprefix("torch.")
    parameters = f"{memory.num_parameters:,} in {dtype}, {memory.num_trained:,} of them trained"
    if memory.num_teacher:
        parameters += f"; {memory.num_teacher:,} of the teacher"
    epoch = rows.epochs[0]
    fill = RowFill.of_rows(epoch.rows, epoch.lengths, recipe.data.row_len)
    batch_rows, num_rows = recipe.train.batch_rows, len(epoch.rows)
    is_padded = len(epoch.rows[-1]) == 0
    padding = "" if not is_padded else f", padded to a multiple of train.batch_rows {batch_rows}"
    table = Table("quantity", "value", title="dry run: nothing is written")
    for quantity, value in {
        "examples to train on, counted per mode, per epoch": f"{rows.num_items:,}",
        "tokens per epoch": f"{rows.num_tokens:,}",
        **_describe_copies(plan),
        **_describe_sources(plan),
        "label tokens per epoch": f"{rows.num_labels:,} ({rows.num_labels / rows.num_tokens:.1%})",
        f"rows of {recipe.data.row_len:,} tokens": f"{num_rows:,} per epoch{padding}, {fill.fill:.1%} filled",
        "optimizer steps": f"{plan.num_steps:,} of {format_count(batch_rows, 'row')}",
        "parameters": parameters,
        "attention backend": plan.backend,
        "compiled layers": "yes" if plan.compiles else "no",
    }.items():
        table.add_row(quantity, value)
    PlainConsole().print(table)
    for warning in list_warnings(plan.manifest, epoch.lengths, fill):
        warn(warning)
    _print_memory(recipe, plan, memory, gpu_bytes)


def _describe_copies(plan: RunPlan) -> dict[str, str]:
    """Return the line about copies of the first block, if rows hold any."""
    if not (num_copied := plan.rows.num_copied_tokens):
        return {}
    share = num_copied / plan.rows.num_tokens
    return {"copies of first blocks add (data.local_sees_first)": f"{num_copied:,} tokens ({share:.1%})"}


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


def _print_memory(recipe: Recipe, plan: RunPlan, memory: MemoryPlan, gpu_bytes: int | None) -> None:
    """Print the expected peak by component, and for each kind of gradient checkpointing the longest row.

    Raises:
        UserError: `train.gradient_checkpointing` is auto and no kind fits, so that the run would stop.
    """
    wanted = recipe.train.gradient_checkpointing
    is_auto, chosen = wanted is GradientCheckpointing.auto, wanted.value
    if is_auto:
        # if no kind fits, the last one needs the least memory
        chosen = KINDS[0] if gpu_bytes is None else memory.choose(gpu_bytes) or KINDS[-1]
    shown = memory.estimate(chosen)
    fits = gpu_bytes is None or shown.peak_bytes <= usable_bytes(gpu_bytes)
    reason = "chosen by the recipe"
    if is_auto:
        reason = "chosen by auto" if fits else ""
    place = "on a CPU" if gpu_bytes is None else f"on a GPU of {format_memory(gpu_bytes)}"
    processes = "the process" if plan.num_processes == 1 else f"each of {plan.num_processes} processes"
    title = f"memory of {processes} {place}, ZeRO-{plan.zero_stage}"
    table = Table("part", "size", title=f"{title}, gradient checkpointing {chosen}")
    table.columns[1].justify = "right"
    for name, size in shown.components.items():
        table.add_row(name, format_memory(size))
    table.add_row("expected peak", format_memory(shown.peak_bytes))
    if shown.host_bytes:
        table.add_row("offloaded to the host", format_memory(shown.host_bytes))
    PlainConsole().print(table)
    columns = ["gradient checkpointing", "expected peak"]
    kinds = Table(*columns, *([] if gpu_bytes is None else ["longest data.row_len that fits", "choice"]))
    for kind in KINDS:
        cells = [kind, format_memory(memory.estimate(kind).peak_bytes)]
        if gpu_bytes is not None:
            longest = memory.longest_row(kind, gpu_bytes)
            cells += [f"{longest:,}" if longest else "none", reason if kind == chosen else ""]
        kinds.add_row(*cells)
    PlainConsole().print(kinds)
    if gpu_bytes is None or fits:
        return
    misfit = describe_misfit(recipe, plan, memory, gpu_bytes, chosen)
    if is_auto:
        raise UserError(misfit)
    warn(misfit)
