"""`blockft train`: one run, from prepared examples to complete checkpoints."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from peft import PeftModel
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockft.config.choices import Objective, Optimizer, Positions, WeightInit
from blockft.config.recipe import dump_recipe
from blockft.config.settings import Recipe
from blockft.console import PlainConsole
from blockft.data.encoder import Encoder
from blockft.errors import UserError, check_type, first_line, is_first_of_host, notify
from blockft.folder_lock import FolderLock, reading_folder
from blockft.model.checkpoint import complete_checkpoints, read_marker, remove_incomplete
from blockft.model.decoder_layers import compile_layers
from blockft.model.fingerprint import model_fingerprint
from blockft.model.gradient_checkpointing import checkpoint_layers
from blockft.model.load import digest_base_weights, load_model, load_tokenizer
from blockft.model.lora import add_adapter
from blockft.model.shared_input import share_products
from blockft.outputs import SharedWriteError, write_errors
from blockft.run_folder import METRICS, truncate_metrics, write_data, write_recipe
from blockft.stages.memory_plan import (
    MemoryPlan,
    decide_checkpointing,
    plan_memory,
    report_peak,
    reported_out_of_memory,
    smallest_gpu,
)
from blockft.stages.output_folder import lock_output
from blockft.stages.run_plan import (
    check_resharding,
    check_run,
    choose_pad_id,
    verify_inputs,
    warn_of_settings,
)
from blockft.training.compile_cache import use_compile_cache
from blockft.training.distributed import (
    check_ranks,
    errors_on_all_ranks,
    init_distributed,
    run_on_each_host,
    shutdown_distributed,
    use_cpu,
    watch_ranks,
    worker_environment,
)
from blockft.training.library_internals import (
    LOAD_UNIVERSAL,
    expect_no_weights,
    mapped_files,
    only_weights_loaded,
)
from blockft.training.library_warnings import silence_known_warnings
from blockft.training.loss_plot import save_loss_plot
from blockft.training.objectives import Distillation
from blockft.training.plan import (
    BASE_WEIGHTS,
    TEACHER_FINGERPRINT,
    RunPlan,
    check_run_signature,
)
from blockft.training.rank_watch import RankWatch
from blockft.training.sample_answers import SampleAnswers, SamplePrompt
from blockft.units import format_count

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from blockft.training.run_callback import RunCallback
    from blockft.training.trainer import BlockTrainer

ACTION = "blockft train"
"""Name of this command in the message for another process that wants to use the folder."""

_OPTIMIZERS = {Optimizer.adamw: "adamw_torch_fused", Optimizer.adamw_8bit: "adamw_bnb_8bit"}
"""Names of transformers for the choices of `train.optimizer`."""

REFERENCE_LEN = 256
"""Number of tokens of the reference text, on which exports are compared: the start of the run's first row."""


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
    is already finished is not changed.

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
        watch = watch_ranks()
        with (
            watch.watching() if watch else nullcontext(),
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
        from blockft.training.universal_checkpoint import remove_universal

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
    if recipe.train.torch_compile is None and not use_cpu():
        _report_compile(plan)
    run = Path(recipe.train.output_dir)
    marker = read_marker(checkpoint) if checkpoint else None
    answers_due = bool(marker and marker["answers_due"] and recipe.train.sample_steps is not None)
    is_due = answers_due or bool(marker and marker["eval_due"])
    if marker and marker["step"] >= plan.num_steps and not is_due:
        if rank == 0:
            message = f"{run} is at step {marker['step']} of {plan.num_steps}: nothing is left to do"
            PlainConsole(stderr=True).print(message, soft_wrap=True)
        return run
    title = run.name if name is None or name == run.name else f"{name}/{run.name}"
    with ExitStack() as stack:
        stack.enter_context(_restored_process_state())
        stack.enter_context(_reported_write_errors(run, num_processes, is_first=rank == 0))
        wait_until_verified = stack.enter_context(_in_thread(partial(verify_inputs, recipe, checkpoint)))
        init_distributed(watch)
        stack.enter_context(_shared_by_ranks(lock, run))
        run_on_each_host(wait_until_verified)
        memory, checkpointing = _plan_memory(recipe, plan)
        stack.enter_context(reported_out_of_memory(recipe, checkpointing))
        # DeepSpeed, which this module imports, needs the worker's environment
        from blockft.training.universal_checkpoint import UNIVERSAL, convert_to_universal, remove_universal

        is_resharded = check_resharding(plan, checkpoint)
        if is_resharded:
            plan = replace(plan, deepspeed=plan.deepspeed | LOAD_UNIVERSAL)
        trainer, run_callback = _build_trainer(
            recipe,
            plan,
            checkpoint,
            checkpointing=checkpointing,
            name=name or run.name,
            title=title,
        )
        source = run / UNIVERSAL if is_resharded else checkpoint
        with errors_on_all_ranks():
            if rank == 0:
                _start_run_folder(run, recipe, plan, checkpoint)
                if checkpoint and is_resharded:
                    convert_to_universal(checkpoint)
        if checkpoint and plan.zero_stage > 0:
            expect_no_weights(trainer.model)
        with only_weights_loaded(), mapped_files():
            trainer.train(resume_from_checkpoint=str(source) if source else None)
        if memory:
            report_peak(memory, checkpointing)
        if rank == 0:
            remove_universal(run)
            loss_plot = save_loss_plot(run, title)
            _print_summary(run, plan, trainer)
            if "wandb" in recipe.train.report_to:
                from blockft.training.wandb_tracking import finish_wandb_run

                finish_wandb_run(loss_plot, trainer.state.global_step)
        shutdown_distributed()
    if watch:
        watch.finish()
    if run_callback.stop_requested:
        raise RunStopped(run / f"checkpoint-{trainer.state.global_step}")
    return run


def _report_compile(plan: RunPlan) -> None:
    if plan.compiles:
        notify("layers are compiled in the first step (train.torch_compile=false does without)")
    else:
        notify(
            "layers are not compiled, because ZeRO-3 gathers their weights one by one (train.torch_compile)"
        )


def _print_summary(run: Path, plan: RunPlan, trainer: "BlockTrainer") -> None:
    """Print the tokens, the speed and the memory of a run, and where its metrics are."""
    step, mean = trainer.state.global_step, trainer.throughput.mean()
    parts = [format_count(sum(plan.rows.list_batch_tokens()[:step]), "token")]
    if mean:  # a resumed run may have had no step left
        parts.append(f"{mean.tokens_per_s:,.0f} tokens/s on average")
        if mean.utilization is not None:
            parts.append(f"{mean.utilization:.1%} utilization")
        parts.append(f"peak memory {trainer.peak_memory_gib:.1f} GiB")
    console = PlainConsole(stderr=True)
    console.print(f"trained {format_count(step, 'step')}: {', '.join(parts)}", soft_wrap=True)
    console.print(f"metrics: {run / METRICS}", soft_wrap=True)


def _plan_memory(recipe: Recipe, plan: RunPlan) -> tuple[MemoryPlan | None, str]:
    """Return the memory of the run, None on a CPU, and its kind of gradient checkpointing; all ranks call it.

    Raises:
        UserError: see `decide_checkpointing`.
    """
    memory = None
    if (gpu_bytes := smallest_gpu()) is not None:
        memory = plan_memory(recipe, plan)
    kind, sentence = decide_checkpointing(recipe, memory, gpu_bytes)
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


# --- the trainer of a run


def _build_trainer(
    recipe: Recipe,
    plan: RunPlan,
    checkpoint: Path | None,
    *,
    checkpointing: str,
    name: str,
    title: str,
) -> tuple["BlockTrainer", "RunCallback"]:
    """Load the models and build the trainer with its callbacks; all ranks call it.

    `checkpointing` is the kind of gradient checkpointing.
    """
    from blockft.training.lr_schedule import RecipeScheduleCallback
    from blockft.training.peak_flops import sum_peak_flops
    from blockft.training.prefetch import PrefetchedRows
    from blockft.training.progress_line import ProgressLineCallback
    from blockft.training.run_callback import RunCallback
    from blockft.training.throughput import Throughput
    from blockft.training.trainer import BlockTrainer
    from blockft.training.wandb_tracking import WandbConfigCallback, log_sample_answers, set_default_project

    run = Path(recipe.train.output_dir)
    marker = read_marker(checkpoint) if checkpoint else None
    # TrainingArguments enable ZeRO-3, which would shard the weights of a teacher loaded after them
    distillation, teacher_signature = _load_distillation(recipe, plan)
    run_signature = plan.run_signature | teacher_signature | _digest_base_weights(recipe)
    arguments = _build_arguments(recipe, plan, marker, title)
    check_ranks(run, {"recipe": dump_recipe(recipe), "checkpoint": str(checkpoint), **run_signature})
    if checkpoint:
        check_run_signature(checkpoint, run_signature)
    model = _load_model(recipe, plan, checkpointing)
    # otherwise the Trainer turns the cache off in the config, and so in every export
    arguments.use_cache = model.config.use_cache
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision, recipe.model.chat_template)
    progress_line = ProgressLineCallback()
    run_callback = RunCallback(
        run,
        tokenizer=tokenizer,
        run_signature=run_signature,
        reference_ids_T=plan.rows[0]["input_ids"][0, :REFERENCE_LEN].clone(),
        save_total_limit=recipe.train.save_total_limit,
        keep_best=recipe.train.keep_best,
        has_eval_rows=bool(plan.eval_rows),
        eval_steps=recipe.train.eval_steps,
        unlogged=marker["unlogged"] if marker else {},
        eval_due=bool(marker and marker["eval_due"]),
        sample_answers=_build_sample_answers(recipe, plan, tokenizer),
        answers_due=bool(marker and marker["answers_due"]),
        progress_line=progress_line,
    )
    callbacks = [run_callback, progress_line, RecipeScheduleCallback()]
    if "wandb" in recipe.train.report_to:
        set_default_project(name)
        run_callback.show_answers = log_sample_answers
        callbacks.append(
            WandbConfigCallback({"recipe": yaml.safe_load(dump_recipe(recipe)), "data": plan.manifest})
        )
    try:
        trainer = BlockTrainer(
            model=model,
            args=arguments,
            # exactly the rows of all steps: a run that only has to evaluate must not train another step
            train_dataset=PrefetchedRows(
                Subset(plan.rows, range(plan.num_steps * recipe.train.batch_rows)),
                stride=plan.num_processes,
                # the Trainer reads all rows of a step at its start
                num_ahead=recipe.train.batch_rows // plan.num_processes,
                pinned=not use_cpu(),
            ),
            eval_rows=plan.eval_rows,
            throughput=Throughput(
                plan.rows.list_batch_tokens(), plan.batch_flops, sum_peak_flops(plan.dtype)
            ),
            num_sources=len(plan.manifest["sources"]),
            distillation=distillation,
            callbacks=callbacks,
        )
    except (ValueError, RuntimeError) as error:
        if not any(tracker in str(error) for tracker in recipe.train.report_to):
            raise
        raise UserError(f"train.report_to cannot be used: {first_line(error)}") from error
    run_callback.trainer = trainer
    return trainer, run_callback


def _build_sample_answers(
    recipe: Recipe, plan: RunPlan, tokenizer: PreTrainedTokenizerBase
) -> SampleAnswers | None:
    """Return the held-out prompts that are answered while the run trains, if there are any."""
    settings = recipe.train
    if settings.sample_steps is None or not plan.eval_rows:
        return None
    rows = next(iter(plan.eval_rows.values()))
    return SampleAnswers(
        [SamplePrompt.of_example(*chosen) for chosen in rows.choose_examples(settings.num_sample_prompts)],
        list(plan.eval_rows),
        tokenizer,
        Encoder(tokenizer).end_token_ids,
        steps=settings.sample_steps,
        max_new_tokens=settings.sample_max_new_tokens,
        row_len=recipe.data.row_len,
        pad_id=choose_pad_id(tokenizer),
        reencoded=recipe.data.positions is Positions.reencoded,
    )


def _load_model(recipe: Recipe, plan: RunPlan, checkpointing: str) -> PreTrainedModel | PeftModel:
    """Return the model to train, compiled, checkpointed and with an adapter as the run needs it."""
    is_quantized = recipe.model.quantization is not None
    model = load_model(
        recipe.model.path,
        revision=recipe.model.revision,
        backend=plan.backend,
        dtype=plan.dtype,
        random_seed=recipe.train.seed if recipe.model.init is WeightInit.random else None,
        device=_choose_device(plan, is_quantized=is_quantized),
        quantize=is_quantized,
    )
    if plan.compiles:
        compile_layers(model)
    checkpoint_layers(model, checkpointing)
    if recipe.train.lora is None:
        return model
    adapted = add_adapter(
        model,
        recipe.train.lora,
        seed=recipe.train.seed,
        revision=recipe.model.revision,
        is_quantized=is_quantized,
    )
    if plan.shares_products:
        share_products(model)
    return adapted


def _choose_device(plan: RunPlan, *, is_quantized: bool) -> torch.device | None:
    """Return the device on which weights are read or drawn; None leaves it to transformers.

    transformers shards weights under ZeRO-3. On a CPU it reads and draws them.
    """
    if plan.zero_stage == 3 or (use_cpu() and not is_quantized):
        return None
    return torch.device("cpu" if use_cpu() else "cuda")


def _load_distillation(recipe: Recipe, plan: RunPlan) -> tuple[Distillation | None, dict[str, str]]:
    """Return the teacher of a run, if it has one, and the teacher's entry of the run signature."""
    settings = recipe.train
    if settings.objective is Objective.sft:
        return None, {}
    if settings.teacher is None:
        return Distillation(None, settings.teacher_weight), {}
    teacher = load_model(settings.teacher, backend=plan.backend, dtype=plan.dtype).requires_grad_(False)
    signature = {TEACHER_FINGERPRINT: model_fingerprint(teacher)}
    if plan.compiles:
        compile_layers(teacher)
    return Distillation(teacher, settings.teacher_weight), signature


def _digest_base_weights(recipe: Recipe) -> dict[str, str]:
    """Return the entry of the run signature for the base model of a LoRA run."""
    if recipe.train.lora is None or recipe.model.init is WeightInit.random:
        return {}
    return {BASE_WEIGHTS: digest_base_weights(recipe.model.path, recipe.model.revision)}


def _build_arguments(
    recipe: Recipe, plan: RunPlan, marker: dict[str, Any] | None, run_name: str
) -> "TrainingArguments":
    """Return the arguments of transformers.Trainer.

    Raises:
        UserError: transformers refuses a setting.
    """
    from transformers import TrainingArguments

    settings = recipe.train
    try:
        return TrainingArguments(
            output_dir=settings.output_dir,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings.batch_rows // plan.num_processes,
            max_steps=plan.num_steps,
            optim=_OPTIMIZERS[settings.optimizer],
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler_type,
            lr_scheduler_kwargs=settings.lr_scheduler_kwargs,
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            max_grad_norm=settings.max_grad_norm,
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            save_steps=settings.save_steps,
            seed=settings.seed,
            bf16=plan.dtype is torch.bfloat16,
            deepspeed=plan.deepspeed,
            use_cpu=use_cpu(),
            report_to=settings.report_to,
            run_name=run_name,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            eval_on_start=bool(plan.eval_rows) and (not marker or marker["eval_due"]),
            # True would silently drop the block ids, and training would use plain causal attention
            remove_unused_columns=False,
            average_tokens_across_devices=True,
            # a blocking copy to the GPU would wait for all of its work
            accelerator_config={"even_batches": False, "non_blocking": not use_cpu()},
            dataloader_pin_memory=not use_cpu(),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"the settings of train cannot be used: {first_line(error)}") from error


def _start_run_folder(run: Path, recipe: Recipe, plan: RunPlan, checkpoint: Path | None) -> None:
    """Write the recipe and the manifest of a run, and remove what was written after the checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    start = f"resumes from {checkpoint.name}" if checkpoint else "starts again at step 0"
    for name in remove_incomplete(run):
        notify(f"{name} is incomplete, because its save was interrupted: it is removed, and the run {start}")
    write_recipe(run, dump_recipe(recipe))
    write_data(run, plan.manifest)
    # an evaluation that is due is not counted, because it is logged again
    truncate_metrics(run, read_marker(checkpoint)["metrics"] if checkpoint else None)


def last_checkpoint(run: Path) -> Path | None:
    """Return the last complete checkpoint of a run, or None if it has none."""
    return next(reversed(complete_checkpoints(run)), None)
