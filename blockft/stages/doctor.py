"""`blockft doctor`: check machine, hosts and network before a run."""

import json
import shutil
from functools import partial
from pathlib import Path

from blockft.config.settings import Recipe
from blockft.errors import UserError
from blockft.inputs import existing_parent
from blockft.model.checkpoint import complete_checkpoints
from blockft.printable import print_text
from blockft.stages.memory_plan import checkpoint_bytes
from blockft.stages.run_plan import check_run
from blockft.training.distributed import use_cpu
from blockft.training.group_check import GROUP_CHECK_S, describe_group_check, print_group_check
from blockft.training.host_checks import REACHABLE, build_host_checks
from blockft.training.hosts import Hosts
from blockft.training.launch import run_briefly
from blockft.training.machine_checks import build_machine_checks
from blockft.training.preflight import Check, Status, run_checks
from blockft.training.worker_environment import is_worker
from blockft.units import format_bytes, format_count


def doctor(recipe: Recipe | None, *, hosts: Hosts | None, num_gpus: int, as_json: bool) -> bool:
    """Print the result of every check as a line, or all as JSON; return whether all have passed.

    A process that a launcher started only checks, with the others, that they form one group.
    """
    if is_worker():
        print_group_check()
        return True
    results = []
    for result in run_checks(_build_checks(recipe, hosts, num_gpus)):
        results.append(result)
        if not as_json:
            print_text(f"{result.status:<8} {result.name}: {result.message}", flush=True)
    if as_json:
        records = [{"check": r.name, "status": r.status, "message": r.message} for r in results]
        print_text(json.dumps(records, indent=2, ensure_ascii=False))
    return all(result.status is Status.ok for result in results)


def _build_checks(recipe: Recipe | None, hosts: Hosts | None, num_gpus: int) -> list[Check]:
    num_processes = hosts.num_processes if hosts else num_gpus
    output_dirs = [Path(recipe.train.output_dir), Path(recipe.data.output_dir)] if recipe else [Path("out")]
    checks = build_machine_checks(list(dict.fromkeys(output_dirs)))
    group_needs = ["packages", "GPUs", "communication", "DeepSpeed operator"]
    if recipe:
        recipe_check = partial(_check_recipe, recipe, num_processes)
        space_check = partial(_check_space, recipe, num_processes)
        checks.append(Check(name="recipe", run=recipe_check, needs=["packages"], seconds=60))
        needs = ["recipe", f"folder {output_dirs[0]}"]
        checks.append(Check(name="space for checkpoints", run=space_check, needs=needs, seconds=60))
    if hosts:
        model = recipe.model.path if recipe and Path(recipe.model.path).is_dir() else None
        host_checks = build_host_checks(
            hosts,
            data_dir=recipe.data.output_dir if recipe else None,
            model=model,
            output_dir=str(output_dirs[0]),
        )
        checks += host_checks
        group_needs += [REACHABLE, "versions on all hosts", "master port", "network"]

    def check_group() -> str:
        return describe_group_check(
            *run_briefly(["doctor"], num_gpus=num_gpus, hosts=hosts, timeout_s=GROUP_CHECK_S)
        )

    checks.append(Check(name="all-reduce", run=check_group, needs=group_needs, seconds=GROUP_CHECK_S + 20))
    return checks


def _check_recipe(recipe: Recipe, num_processes: int) -> str:
    """Check that recipe, data, model and number of processes fit together, for a new run or a resumed one."""
    resume = Path(recipe.train.output_dir).exists()
    plan, checkpoint = check_run(recipe, resume=resume, num_processes=num_processes, verify=False)
    start = f"resumes from {checkpoint.name}" if checkpoint else "starts at step 0"
    device = "CPU" if use_cpu() else "GPU"
    return f"the run has {plan.num_steps:,} steps on {num_processes} {device} processes, and {start}"


def _check_space(recipe: Recipe, num_processes: int) -> str:
    """Check that the disk of the run has space for the checkpoints that the run keeps at the same time.

    Raises:
        UserError: it has less.
    """
    run = Path(recipe.train.output_dir)
    plan, _ = check_run(recipe, resume=run.exists(), num_processes=num_processes, verify=False)
    settings, size = recipe.train, checkpoint_bytes(recipe)
    # a checkpoint is removed when the next one is whole
    most = settings.save_total_limit + 1 + bool(settings.keep_best and plan.eval_rows)
    num_checkpoints = min(most, -(-plan.num_steps // settings.save_steps))
    num_missing = max(1, num_checkpoints - len(complete_checkpoints(run)))
    place = existing_parent(run)
    free, needed = shutil.disk_usage(place).free, num_missing * size
    kept = f"{format_count(num_missing, 'checkpoint')} of {format_bytes(size)}"
    if free < needed:
        raise UserError(
            f"{place} has {format_bytes(free)} of free space, but the run writes {kept}: free some space, "
            "lower train.save_total_limit, or choose another train.output_dir"
        )
    return f"the run writes {kept}, and {format_bytes(free)} are free"
