"""`blockft train`: one run, from prepared examples to complete checkpoints."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockft.config.recipe import dump_recipe
from blockft.config.settings import Recipe
from blockft.console import PlainConsole
from blockft.errors import check_type, is_first_of_host, notify
from blockft.folder_lock import FolderLock, reading_folder
from blockft.model.checkpoint import (
    complete_checkpoints,
    read_marker,
    remove_incomplete,
    remove_old_checkpoints,
)
from blockft.outputs import SharedWriteError, remove_temporary_files, write_errors
from blockft.run_folder import LOSS_PLOT, METRICS, truncate_metrics, write_data, write_recipe
from blockft.stages.memory_plan import (
    MemoryPlan,
    decide_checkpointing,
    plan_memory,
    reported_out_of_memory,
    smallest_gpu,
    warn_of_peak,
)
from blockft.stages.output_folder import lock_output
from blockft.stages.run_plan import check_resharding, check_run, verify_inputs, warn_of_settings
from blockft.stages.run_trainer import build_trainer
from blockft.training.compile_cache import use_compile_cache
from blockft.training.distributed import (
    errors_on_all_ranks,
    init_distributed,
    run_on_each_host,
    shutdown_distributed,
    worker_environment,
)
from blockft.training.library_internals import (
    LOAD_UNIVERSAL,
    expect_no_weights,
    mapped_files,
    only_weights_loaded,
    recompiles_limited,
)
from blockft.training.library_warnings import silence_known_warnings
from blockft.training.loss_plot import save_loss_plot
from blockft.training.peak_memory import use_expandable_segments
from blockft.training.plan import RunPlan
from blockft.training.rank_watch import RankWatch, watching_ranks
from blockft.training.universal_checkpoint import UNIVERSAL, convert_to_universal, remove_universal
from blockft.training.wandb_tracking import finish_wandb_run, start_wandb_run
from blockft.units import format_count, format_memory

if TYPE_CHECKING:
    from blockft.training.run_callback import RunCallback
    from blockft.training.trainer import BlockTrainer

ACTION = "blockft train"
"""Name of this command in the message for another process that wants to use the folder."""


class RunStopped(KeyboardInterrupt):
    """Raised when a run was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint.

    `checkpoint` is the path of that checkpoint; the run resumes from it with `resume=True`.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped; the checkpoint is {checkpoint}")
        self.checkpoint = checkpoint


def train(recipe: Recipe, *, resume: bool = False, name: str | None = None) -> Path:
    """Train the model of a recipe on its prepared data and return the run's folder (`train.output_dir`).

    The folder holds checkpoints, `recipe.yaml`, `data.json`, `metrics.jsonl`, `loss.png` and, if held-out
    prompts were answered, `sample_answers.jsonl`; `export` turns a checkpoint into a model folder. The call
    trains in this process: as one of WORLD_SIZE ranks if a launcher started it, otherwise alone. A run that
    is already finished trains no step; if it was killed at its very end, its old checkpoints are removed and
    `loss.png` is drawn.

    Args:
        recipe: settings of the run; `load_recipe` reads them from a YAML file.
        resume: continue the run in `train.output_dir` from its last complete checkpoint.
        name: name of the recipe, for the title of the loss plot and for trackers; by default the name of
            `train.output_dir`.

    Raises:
        UserError: recipe, prepared data, model and number of processes do not fit together; the folder exists
            and `resume` is not set, or cannot be resumed; another process writes it or the prepared data; a
            loss is not finite; the disk is full.
        TypeError: `recipe` is no recipe.
        RunStopped: the run was asked to stop and has saved a checkpoint.
    """
    check_type(recipe, Recipe, "recipe", "load_recipe reads one from a YAML file")
    with worker_environment():
        silence_known_warnings()
        use_expandable_segments()
        with (
            watching_ranks() as watch,
            # the other ranks share the lock of the first one as soon as all are connected
            lock_run(recipe) if os.environ["RANK"] == "0" else nullcontext() as lock,
        ):
            return _train(recipe, lock, watch, resume=resume, name=name)


@contextmanager
def lock_run(recipe: Recipe) -> Iterator[FolderLock]:
    """Hold the lock of a run's folder as its only writer, and keep writers away from its prepared data.

    Raises:
        UserError: another process uses the run's folder or writes the data; the folder's place is not
            allowed, or it cannot be written.
    """
    run, data = Path(recipe.train.output_dir), Path(recipe.data.output_dir)
    models = {"model.path": recipe.model.path, "train.teacher": recipe.train.teacher or recipe.model.path}
    with (
        lock_output(run, ACTION, models, other_outputs={"data.output_dir": data}) as locked,
        reading_folder(data, ACTION),
    ):
        yield locked.lock


@contextmanager
def _shared_by_ranks(lock: FolderLock | None, run: Path) -> Iterator[None]:
    """Let every rank hold the lock of a run's folder, so that it is free only when all ranks have ended.

    `lock` is the lock that the first rank holds; None on the others.
    """
    if lock:
        lock.share()
    torch.distributed.barrier()
    joined = None if lock else FolderLock(run, ACTION, shared=True)
    try:
        torch.distributed.barrier()
        yield
    finally:
        if joined:
            joined.release()


@contextmanager
def _reported_write_errors(run: Path, num_processes: int, *, is_first: bool) -> Iterator[None]:
    """Turn a full disk into a message that says how to resume; remove what is incomplete."""

    def remove() -> None:
        remove_incomplete(run)
        remove_universal(run)

    def remedy() -> str:
        if num_processes == 1:  # other ranks may still be writing: the resumed run removes it then
            remove()
        last = last_checkpoint(run)
        found = f"its last complete checkpoint is {last.name}" if last else "it has no complete checkpoint"
        return f"free some space, then resume {run} with --resume ({found})"

    with write_errors(run, name=run, remedy=remedy):
        try:
            yield
        except SharedWriteError:  # no rank writes any more
            if is_first:
                remove()
            torch.distributed.barrier()  # a rank that ends makes the others end as well
            raise


def _train(
    recipe: Recipe, lock: FolderLock | None, watch: RankWatch | None, *, resume: bool, name: str | None
) -> Path:
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # every rank checks, and no rank writes before all ranks are connected
    plan, checkpoint = check_run(recipe, resume=resume, num_processes=num_processes, verify=False)
    if rank == 0:
        warn_of_settings(recipe, plan)
    if plan.compiles:
        use_compile_cache()
        if recipe.train.torch_compile is None:
            notify("layers are compiled in the first step (train.torch_compile=false does without)")
    run = Path(recipe.train.output_dir)
    name = name or run.name
    title = run.name if name == run.name else f"{name}/{run.name}"
    if checkpoint and _is_finished(recipe, plan, checkpoint):
        if rank == 0:
            _complete_run_folder(recipe, title)
            step = read_marker(checkpoint)["step"]
            message = f"{run} is at step {step} of {plan.num_steps}: nothing is left to do"
            PlainConsole(stderr=True).print(message, soft_wrap=True)
        return run
    with ExitStack() as stack:
        stack.enter_context(_restored_process_state())
        stack.enter_context(_reported_write_errors(run, num_processes, is_first=rank == 0))
        wait_until_verified = stack.enter_context(_in_thread(partial(verify_inputs, recipe, checkpoint)))
        init_distributed(watch)
        stack.enter_context(_shared_by_ranks(lock, run))
        run_on_each_host(wait_until_verified)
        memory, checkpointing = _choose_checkpointing(recipe, plan)
        stack.enter_context(reported_out_of_memory(recipe, checkpointing))
        stack.enter_context(recompiles_limited("set train.torch_compile=false"))
        trainer, run_callback = _run_steps(
            recipe, plan, checkpoint, checkpointing=checkpointing, name=name, title=title
        )
        if rank == 0:
            expected_bytes = memory.estimate(checkpointing).peak_bytes if memory else None
            _report_result(recipe, plan, trainer, expected_bytes, title=title)
            if memory:
                warn_of_peak(memory, checkpointing, trainer.peak_memory_gib * 2**30)
        shutdown_distributed()
    if watch:
        watch.finish()
    if run_callback.stop_requested:
        raise RunStopped(run / f"checkpoint-{trainer.state.global_step}")
    return run


def _is_finished(recipe: Recipe, plan: RunPlan, checkpoint: Path) -> bool:
    """Return whether a checkpoint has all steps of its run, and no evaluation or sample answers are due."""
    marker = read_marker(checkpoint)
    answers_due = marker["answers_due"] and recipe.train.sample_steps is not None
    return marker["step"] >= plan.num_steps and not (answers_due or marker["eval_due"])


def _complete_run_folder(recipe: Recipe, title: str) -> None:
    """Remove old checkpoints and draw the losses, if a run with all steps was killed before it did so."""
    settings, run = recipe.train, Path(recipe.train.output_dir)
    with _reported_write_errors(run, 1, is_first=True):
        remove_temporary_files(run)
        remove_old_checkpoints(run, settings.save_total_limit, keep_best=settings.keep_best)
        remove_incomplete(run)
        remove_universal(run)
        if not (run / LOSS_PLOT).exists():
            save_loss_plot(run, title)


def _run_steps(
    recipe: Recipe, plan: RunPlan, checkpoint: Path | None, *, checkpointing: str, name: str, title: str
) -> tuple["BlockTrainer", "RunCallback"]:
    """Train the steps that are left after a checkpoint; all ranks call it. See `build_trainer`."""
    run, is_first = Path(recipe.train.output_dir), os.environ["RANK"] == "0"
    source, is_resharded = checkpoint, check_resharding(plan, checkpoint)
    if is_resharded:
        source, plan = run / UNIVERSAL, replace(plan, deepspeed=plan.deepspeed | LOAD_UNIVERSAL)
    trainer, run_callback = build_trainer(recipe, plan, checkpoint, checkpointing=checkpointing, title=title)
    with errors_on_all_ranks():
        if is_first:
            _start_run_folder(run, recipe, plan, checkpoint)
            if checkpoint and is_resharded:
                convert_to_universal(checkpoint)
    if is_first and "wandb" in recipe.train.report_to:
        start_wandb_run(run, project=name, name=title)
    if checkpoint and plan.zero_stage > 0:
        expect_no_weights(trainer.model)
    with only_weights_loaded(), mapped_files(), closing(trainer.train_dataset):
        trainer.train(resume_from_checkpoint=str(source) if source else None)
    if is_first:
        remove_universal(run)
    return trainer, run_callback


def _report_result(
    recipe: Recipe, plan: RunPlan, trainer: "BlockTrainer", expected_bytes: float | None, *, title: str
) -> None:
    """Plot the losses of a run, print a summary, and end its wandb run."""
    run = Path(recipe.train.output_dir)
    loss_plot = save_loss_plot(run, title)
    _print_summary(run, plan, trainer, expected_bytes)
    if "wandb" in recipe.train.report_to:
        finish_wandb_run(loss_plot, trainer.state.global_step)


def _print_summary(run: Path, plan: RunPlan, trainer: "BlockTrainer", expected_bytes: float | None) -> None:
    """Print the tokens, the speed and the memory of a run, and where its metrics are."""
    step, mean = trainer.state.global_step, trainer.throughput.mean()
    parts = [format_count(sum(plan.rows.list_batch_tokens()[:step]), "token")]
    if mean:  # a resumed run may have had no step left
        parts.append(f"{mean.tokens_per_s:,.0f} tokens/s on average")
        if mean.utilization is not None:
            parts.append(f"{mean.utilization:.1%} utilization")
        expected = "" if expected_bytes is None else f" ({format_memory(expected_bytes)} expected)"
        parts.append(f"peak memory {format_memory(trainer.peak_memory_gib * 2**30)}{expected}")
    console = PlainConsole(stderr=True)
    console.print(f"trained {format_count(step, 'step')}: {', '.join(parts)}", soft_wrap=True)
    console.print(f"metrics: {run / METRICS}", soft_wrap=True)


def _choose_checkpointing(recipe: Recipe, plan: RunPlan) -> tuple[MemoryPlan | None, str]:
    """Return the memory of the run, None on a CPU, and its kind of gradient checkpointing; all ranks call it.

    Raises:
        UserError: see `decide_checkpointing`.
    """
    memory = None
    if (gpu_bytes := smallest_gpu()) is not None:
        memory = plan_memory(recipe, plan)
    kind, sentence = decide_checkpointing(recipe, plan, memory, gpu_bytes)
    if memory:
        notify(sentence)
    return memory, kind


@contextmanager
def _restored_process_state() -> Iterator[None]:
    """Restore what a run changes in the process: the handlers of SIGINT and SIGTERM, and DeepSpeed's config.

    With the config of a ZeRO-3 run in place, transformers would load every later model without its weights.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    may_set = threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        for number, handler in handlers.items() if may_set else ():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _in_thread(check: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Start `check` in a thread of the first rank of a host; yield a function that waits for its result."""
    if not is_first_of_host():
        yield lambda: None
        return
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(check).result


def _start_run_folder(run: Path, recipe: Recipe, plan: RunPlan, checkpoint: Path | None) -> None:
    """Write the recipe and the manifest of a run, and remove what was written after the checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    start = f"resumes from {checkpoint.name}" if checkpoint else "starts again at step 0"
    for name in remove_incomplete(run):
        notify(f"{name} is incomplete, because its save was interrupted: it is removed, and the run {start}")
    remove_temporary_files(run)
    write_recipe(run, dump_recipe(recipe))
    write_data(run, plan.manifest)
    # an evaluation that is due is not counted, because it is logged again
    truncate_metrics(run, read_marker(checkpoint)["metrics"] if checkpoint else None)


def last_checkpoint(run: Path) -> Path | None:
    """Return the last complete checkpoint of a run, or None if it has none."""
    return next(reversed(complete_checkpoints(run)), None)
