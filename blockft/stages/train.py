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
from rich.table import Table
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockft.config.choices import Mode, Objective, Positions, WeightInit
from blockft.config.recipe import RECIPES_FOLDER, dump_recipe
from blockft.config.settings import Recipe
from blockft.console import PlainConsole
from blockft.data.prepared import PreparedData, load_prepared
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.errors import UserError, check_type, first_line, is_first_of_host, notify, warn
from blockft.folder_lock import FolderLock, reading_folder
from blockft.model.checkpoint import (
    check_incomplete,
    complete_checkpoints,
    find_checkpoint,
    read_marker,
    remove_incomplete,
    verify_checkpoint,
)
from blockft.model.decoder_layers import compile_layers
from blockft.model.fingerprint import model_fingerprint
from blockft.model.load import (
    build_meta_model,
    digest_base_weights,
    load_config,
    load_model,
    load_tokenizer,
    parse_dtype,
    verify_model,
)
from blockft.model.lora import add_adapter
from blockft.model.supported import check_token_ids
from blockft.outputs import check_absent, write_errors
from blockft.run_folder import (
    RECIPE,
    truncate_metrics,
    verify_metrics,
    write_data,
    write_recipe,
)
from blockft.stages.output_folder import own_output
from blockft.training.deepspeed_config import (
    check_deepspeed_config,
    is_shipped,
    load_deepspeed_config,
    zero_stage,
)
from blockft.training.distributed import (
    check_ranks,
    init_distributed,
    reported_connection_errors,
    run_on_each_host,
    set_worker_environment,
    shutdown_distributed,
    use_cpu,
)
from blockft.training.library_internals import (
    LOAD_UNIVERSAL,
    check_pickles,
    only_weights_loaded,
    read_tag,
)
from blockft.training.library_warnings import silence_known_warnings
from blockft.training.loss_plot import save_loss_plot
from blockft.training.lr_schedule import check_schedule
from blockft.training.objectives import Distillation
from blockft.training.plan import (
    BASE_WEIGHTS,
    NUM_PROCESSES,
    TEACHER_FINGERPRINT,
    WEIGHT_DTYPE,
    ZERO_STAGE,
    RunPlan,
    check_run_signature,
    choose_backend,
    default_dtype,
    describe_architecture,
    hold_out_examples,
)
from blockft.training.row_dataset import RowDataset
from blockft.training.trackers import check_trackers
from blockft.units import format_count

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from blockft.training.run_callback import RunCallback
    from blockft.training.trainer import BlockTrainer

ACTION = "blockft train"
"""Name of this command in the message for another process that wants to use the folder."""

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

    The folder holds checkpoints, `recipe.yaml`, `data.json`, `metrics.jsonl` and `loss.png`; `export` turns a
    checkpoint into a model folder. The call trains in this process: as one of WORLD_SIZE ranks if a launcher
    started it, otherwise alone. A run that is already finished is not changed.

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
    set_worker_environment()
    silence_known_warnings()
    # the other ranks share the lock of the first one as soon as all are connected
    with own_run(recipe) if os.environ["RANK"] == "0" else nullcontext() as lock:
        return _train(recipe, lock, resume=resume, name=name)


@contextmanager
def own_run(recipe: Recipe) -> Iterator[FolderLock]:
    """Hold the lock of a run's folder as its only writer, and keep writers away from its prepared data.

    Raises:
        UserError: another process uses the run's folder or writes the data; the folder's place is not
            allowed, or it cannot be written.
    """
    run, data = Path(recipe.train.output_dir), Path(recipe.data.output_dir)
    models = {"model.path": recipe.model.path, "train.teacher": recipe.train.teacher or recipe.model.path}
    with (
        own_output(run, ACTION, models, other_outputs={"data.output_dir": data}) as owned,
        reading_folder(data, ACTION),
    ):
        yield owned.lock


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
def _reported_write_errors(run: Path, num_processes: int) -> Iterator[None]:
    """Turn a full disk into a message that says how to resume; remove what is incomplete."""

    def remedy() -> str:
        if num_processes == 1:  # other ranks may still be writing: the resumed run removes it then
            from blockft.training.universal_checkpoint import remove_universal

            remove_incomplete(run)
            remove_universal(run)
        last = last_checkpoint(run)
        found = f"its last complete checkpoint is {last.name}" if last else "it has no complete checkpoint"
        return f"free some space, then resume {run} with --resume ({found})"

    with write_errors(run, name=run, remedy=remedy):
        yield


def _train(recipe: Recipe, lock: FolderLock | None, *, resume: bool, name: str | None) -> Path:
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # every rank checks, and no rank writes before all ranks are connected
    plan, checkpoint = check_run(recipe, resume=resume, num_processes=num_processes, verify=False)
    if rank == 0:
        _warn_if_epochs_end_first(recipe, plan)
    run = Path(recipe.train.output_dir)
    marker = read_marker(checkpoint) if checkpoint else None
    if marker and marker["step"] >= plan.num_steps and not marker["eval_due"]:
        if rank == 0:
            message = f"{run} is at step {marker['step']} of {plan.num_steps}: nothing is left to do"
            PlainConsole(stderr=True).print(message, soft_wrap=True)
        return run
    title = run.name if name is None or name == run.name else f"{name}/{run.name}"
    with ExitStack() as stack:
        stack.enter_context(_restored_process_state())
        stack.enter_context(_reported_write_errors(run, num_processes))
        wait_until_verified = stack.enter_context(_in_thread(partial(_verify_inputs, recipe, checkpoint)))
        init_distributed()
        stack.enter_context(reported_connection_errors())
        stack.enter_context(_shared_by_ranks(lock, run))
        run_on_each_host(wait_until_verified)
        # DeepSpeed, which this module imports, needs the worker's environment
        from blockft.training.universal_checkpoint import UNIVERSAL, convert_to_universal, remove_universal

        is_resharded = (
            marker is not None
            and marker["run_signature"][NUM_PROCESSES] != num_processes
            and plan.zero_stage > 0  # ZeRO-0 has no shards
        )
        if is_resharded:
            plan = replace(plan, deepspeed=plan.deepspeed | LOAD_UNIVERSAL)
        trainer, run_callback = _build_trainer(
            recipe, plan, checkpoint, is_resharded=is_resharded, name=name or run.name, title=title
        )
        source = run / UNIVERSAL if is_resharded else checkpoint
        if rank == 0:
            _start_run_folder(run, recipe, plan, checkpoint)
            if checkpoint and is_resharded:
                convert_to_universal(checkpoint)
        torch.distributed.barrier()
        with only_weights_loaded():
            trainer.train(resume_from_checkpoint=str(source) if source else None)
        if rank == 0:
            remove_universal(run)
            loss_plot = save_loss_plot(run, title)
            if "wandb" in recipe.train.report_to:
                from blockft.training.wandb_tracking import finish_wandb_run

                finish_wandb_run(loss_plot, trainer.state.global_step)
        shutdown_distributed()
    if run_callback.stop_requested:
        raise RunStopped(run / f"checkpoint-{trainer.state.global_step}")
    return run


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


# --- the plan of a run


def check_run(
    recipe: Recipe, *, resume: bool, num_processes: int, verify: bool = True
) -> tuple[RunPlan, Path | None]:
    """Return the plan of a run and the checkpoint that it resumes from, or None if it starts at step 0.

    Without `verify` weights and checkpoint are not verified.

    Raises:
        UserError: see `build_plan`; the run exists and `resume` is not set, or it cannot be resumed, for
            example because its last checkpoint is damaged.
    """
    run = Path(recipe.train.output_dir)
    # a run that was killed before its first checkpoint starts again
    starts_again = _is_run(run) and not complete_checkpoints(run)
    if not resume:
        action = (
            "start it again (it has no complete checkpoint)" if starts_again else "resume its last checkpoint"
        )
        check_absent(run, f"{action} with --resume, or choose another train.output_dir")
    checkpoint = None if not resume or starts_again else find_checkpoint(run)
    check_incomplete(run)
    plan = build_plan(recipe, num_processes)
    if verify:
        _verify_inputs(recipe, checkpoint)
    if checkpoint is None:
        return plan, None
    known_later = (TEACHER_FINGERPRINT, BASE_WEIGHTS)
    check_run_signature(checkpoint, plan.run_signature, ignore=(NUM_PROCESSES, *known_later))
    return plan, checkpoint


def _is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, also of one that was killed before it wrote its recipe."""
    if (folder / RECIPE).is_file():
        return True
    return folder.is_dir() and all(path.name.startswith(f".{RECIPE}") for path in folder.iterdir())


def _verify_inputs(recipe: Recipe, checkpoint: Path | None) -> None:
    """Check the large files that a run is about to read: its checkpoint, the model and the teacher.

    Raises:
        UserError: one of them is damaged, or the checkpoint could run code.
    """
    if checkpoint:
        verify_checkpoint(checkpoint)
        check_pickles(checkpoint)
        read_tag(checkpoint)  # checks it
        verify_metrics(checkpoint.parent, read_marker(checkpoint)["metrics"])
    if recipe.model.init is not WeightInit.random:
        verify_model(recipe.model.path, recipe.model.revision)
    if recipe.train.teacher is not None:
        verify_model(recipe.train.teacher)


def build_plan(recipe: Recipe, num_processes: int) -> RunPlan:
    """Return the plan of a run with `num_processes` processes, without loading weights.

    Raises:
        UserError: recipe, prepared data, model and number of processes do not fit together, or a setting
            cannot be used.
    """
    data, settings = recipe.data, recipe.train
    if settings.batch_rows % num_processes:
        raise UserError(
            f"train.batch_rows is {settings.batch_rows}, which {num_processes} processes cannot share: "
            f"make it a multiple of {num_processes}"
        )
    _check_objective(recipe)
    check_trackers(settings.report_to)
    config = load_config(recipe.model.path, recipe.model.revision)
    if settings.lora is not None:
        # refuse an adapter that cannot be exported before any weight is loaded
        add_adapter(build_meta_model(config), settings.lora, seed=settings.seed)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision, recipe.model.chat_template)
    prepared = load_prepared(Path(data.output_dir))
    _check_prepared(recipe, prepared, tokenizer, config.vocab_size)
    rows, eval_rows = _build_rows(recipe, prepared, tokenizer, num_processes)
    num_steps = len(rows) // settings.batch_rows
    num_steps = min(num_steps, settings.max_steps or num_steps)
    check_schedule(
        settings.lr_scheduler_type,
        settings.lr_scheduler_kwargs,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        num_steps=num_steps,
    )
    dtype = parse_dtype(recipe.model.dtype, default_dtype())
    backend = choose_backend(recipe.model.attention.value)
    deepspeed = load_deepspeed_config(settings.deepspeed, RECIPES_FOLDER / "deepspeed")
    if not is_shipped(settings.deepspeed, RECIPES_FOLDER / "deepspeed"):
        check_deepspeed_config(
            deepspeed,
            settings.deepspeed,
            num_processes=num_processes,
            batch_rows=settings.batch_rows,
            dtype=dtype,
            max_grad_norm=settings.max_grad_norm,
            learning_rate=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            num_steps=num_steps,
            warmup_steps=settings.warmup_steps,
        )
    return RunPlan(
        rows=rows,
        eval_rows=eval_rows,
        num_steps=num_steps,
        manifest=prepared.manifest,
        backend=backend,
        dtype=dtype,
        deepspeed=deepspeed,
        run_signature={
            "model": {
                "path": recipe.model.path,
                "revision": recipe.model.revision,
                **describe_architecture(config),
            },
            "data": prepared.manifest["content_hash"],
            **_list_signature_settings(recipe),
            ZERO_STAGE: zero_stage(deepspeed),
            WEIGHT_DTYPE: str(dtype).removeprefix("torch."),
            NUM_PROCESSES: num_processes,
        },
    )


def _warn_if_epochs_end_first(recipe: Recipe, plan: RunPlan) -> None:
    """Warn that a run has fewer steps than `train.max_steps`."""
    max_steps, num_epochs = recipe.train.max_steps, recipe.train.num_train_epochs
    if max_steps is not None and max_steps > plan.num_steps:
        warn(
            f"train.max_steps is {max_steps:,}, but {format_count(num_epochs, 'epoch')} of the data "
            f"{'has' if num_epochs == 1 else 'have'} only {format_count(plan.num_steps, 'step')}: raise "
            "train.num_train_epochs to train longer"
        )


def _check_objective(recipe: Recipe) -> None:
    settings, modes = recipe.train, recipe.data.modes
    if settings.objective is Objective.sft:
        if settings.teacher is not None or settings.teacher_weight != 1:
            raise UserError(
                "train.teacher and train.teacher_weight have no effect with train.objective=sft: set distill"
            )
    elif settings.teacher is None and set(modes) != set(Mode):
        raise UserError(
            f"train.objective=distill teaches the block mode by the full mode, but data.modes is "
            f"[{', '.join(modes)}]: train on both modes, or name a train.teacher"
        )


def _check_prepared(
    recipe: Recipe, prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Check that the prepared data fits tokenizers, model, row length and held-out examples."""
    data, settings = recipe.data, recipe.train
    if prepared.manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{data.output_dir} was prepared with the tokenizer of {prepared.manifest['model']['path']}, "
            f"not with that of {recipe.model.path}, or with another model.chat_template: run blockft prepare "
            "for this model, with another data.output_dir"
        )
    if settings.teacher is not None:
        load_config(settings.teacher)
        teacher_tokenizer = load_tokenizer(settings.teacher, chat_template=recipe.model.chat_template)
        if prepared.manifest["tokenizer"] != tokenizer_fingerprint(teacher_tokenizer):
            raise UserError(
                f"train.teacher {settings.teacher} and {recipe.model.path} have different tokenizers"
            )
    longest = 0
    for example in prepared.examples:
        longest = max(longest, len(example))
        bounds = (int(example.input_ids.min()), int(example.input_ids.max()))
        check_token_ids(bounds, vocab_size, f"an example of {data.output_dir}")
    if longest > data.row_len:
        raise UserError(
            f"data.row_len is {data.row_len}, but {data.output_dir} holds an example of {longest} tokens: "
            "raise data.row_len, or prepare again"
        )
    if (copies := prepared.manifest["options"].get("num_copies", 1)) > 1 and settings.num_eval_examples:
        raise UserError(
            f"{data.output_dir} asks every question {copies} times (data.num_copies), so the model would "
            "learn the examples that train.num_eval_examples holds out from another copy: "
            "set train.num_eval_examples=0, or prepare one copy"
        )


def _build_rows(
    recipe: Recipe, prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, num_processes: int
) -> tuple[RowDataset, dict[str, RowDataset]]:
    """Return the rows to train on, and the held-out rows by mode."""
    data, settings = recipe.data, recipe.train
    training, held_out = hold_out_examples(prepared.examples, settings.num_eval_examples, settings.seed)
    build_rows = partial(
        RowDataset,
        row_len=data.row_len,
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        reencoded=data.positions is Positions.reencoded,
    )
    modes = [mode.value for mode in data.modes]
    is_distillation = settings.objective is Objective.distill
    rows = build_rows(
        training,
        modes,
        batch_rows=settings.batch_rows,
        epochs=settings.num_train_epochs,
        with_full=is_distillation,
    )
    if is_distillation and settings.teacher is None and all(mode == Mode.full for _, mode in rows.items):
        raise UserError(
            f"no example of {data.output_dir} splits into blocks: the full mode has nothing to teach"
        )
    eval_modes = modes if held_out else []
    return rows, {
        mode: build_rows(held_out, [mode], batch_rows=num_processes, epochs=1) for mode in eval_modes
    }


def _list_signature_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a resumed run must not change."""
    data, settings = recipe.data, recipe.train
    signature: dict[str, Any] = {
        "data.row_len": data.row_len,
        "data.modes": [mode.value for mode in data.modes],
        "data.positions": data.positions.value,
        "train.batch_rows": settings.batch_rows,
        "train.seed": settings.seed,
        "train.objective": settings.objective.value,
        "train.num_eval_examples": settings.num_eval_examples,
        "train.lora": settings.lora,
        "train.weight_decay": settings.weight_decay,
        "train.adam_beta1": settings.adam_beta1,
        "train.adam_beta2": settings.adam_beta2,
    }
    if settings.objective is Objective.distill:
        signature |= {"train.teacher": settings.teacher, "train.teacher_weight": settings.teacher_weight}
    return signature


# --- the trainer of a run


def _build_trainer(
    recipe: Recipe,
    plan: RunPlan,
    checkpoint: Path | None,
    *,
    is_resharded: bool,
    name: str,
    title: str,
) -> tuple["BlockTrainer", "RunCallback"]:
    """Load the models and build the trainer with its callbacks; all ranks call it.

    `is_resharded` says that the checkpoint was written by another number of processes.
    """
    from blockft.training.lr_schedule import RecipeScheduleCallback
    from blockft.training.progress_line import ProgressLineCallback
    from blockft.training.run_callback import RunCallback
    from blockft.training.throughput import Throughput
    from blockft.training.trainer import BlockTrainer
    from blockft.training.universal_checkpoint import SeparateAdamStepsCallback
    from blockft.training.wandb_tracking import WandbConfigCallback, set_default_project

    run = Path(recipe.train.output_dir)
    marker = read_marker(checkpoint) if checkpoint else None
    # TrainingArguments enable ZeRO-3, which would shard the weights of a teacher loaded after them
    distillation, teacher_signature = _load_distillation(recipe, plan)
    run_signature = plan.run_signature | teacher_signature | _digest_base_weights(recipe)
    arguments = _build_arguments(recipe, plan, marker, title)
    check_ranks(run, {"recipe": dump_recipe(recipe), "checkpoint": str(checkpoint), **run_signature})
    if checkpoint:
        check_run_signature(checkpoint, run_signature)
    model = _load_model(recipe, plan)
    # otherwise the Trainer turns the cache off in the config, and so in every export
    arguments.use_cache = model.config.use_cache
    run_callback = RunCallback(
        run,
        tokenizer=load_tokenizer(recipe.model.path, recipe.model.revision, recipe.model.chat_template),
        run_signature=run_signature,
        reference_ids_T=plan.rows[0]["input_ids"][0, :REFERENCE_LEN].clone(),
        save_total_limit=recipe.train.save_total_limit,
        keep_best=recipe.train.keep_best,
        has_eval_rows=bool(plan.eval_rows),
        eval_steps=recipe.train.eval_steps,
        unlogged=marker["unlogged"] if marker else {},
        eval_due=bool(marker and marker["eval_due"]),
    )
    callbacks = [run_callback, ProgressLineCallback(), RecipeScheduleCallback()]
    if is_resharded:
        callbacks.append(SeparateAdamStepsCallback())
    if "wandb" in recipe.train.report_to:
        set_default_project(name)
        callbacks.append(
            WandbConfigCallback({"recipe": yaml.safe_load(dump_recipe(recipe)), "data": plan.manifest})
        )
    try:
        trainer = BlockTrainer(
            model=model,
            args=arguments,
            # exactly the rows of all steps: a run that only has to evaluate must not train another step
            train_dataset=Subset(plan.rows, range(plan.num_steps * recipe.train.batch_rows)),
            eval_rows=plan.eval_rows,
            throughput=Throughput(plan.rows.list_batch_tokens()),
            distillation=distillation,
            callbacks=callbacks,
        )
    except (ValueError, RuntimeError) as error:
        if not any(tracker in str(error) for tracker in recipe.train.report_to):
            raise
        raise UserError(f"train.report_to cannot be used: {first_line(error)}") from error
    run_callback.trainer = trainer
    return trainer, run_callback


def _load_model(recipe: Recipe, plan: RunPlan) -> PreTrainedModel | PeftModel:
    """Return the model to train, compiled and with an adapter if the recipe asks for them."""
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


def _load_distillation(recipe: Recipe, plan: RunPlan) -> tuple[Distillation | None, dict[str, str]]:
    """Return the teacher of a run, if it has one, and the teacher's entry of the run signature."""
    settings = recipe.train
    if settings.objective is Objective.sft:
        return None, {}
    if settings.teacher is None:
        return Distillation(None, settings.teacher_weight), {}
    teacher = load_model(settings.teacher, backend=plan.backend, dtype=plan.dtype).requires_grad_(False)
    signature = {TEACHER_FINGERPRINT: model_fingerprint(teacher)}
    if settings.torch_compile:
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
            gradient_accumulation_steps=settings.batch_rows // plan.run_signature[NUM_PROCESSES],
            max_steps=plan.num_steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler_type,
            lr_scheduler_kwargs=settings.lr_scheduler_kwargs,
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            max_grad_norm=settings.max_grad_norm,
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
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
            accelerator_config={"even_batches": False},
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
    truncate_metrics(run, read_marker(checkpoint)["metrics"]["bytes"] if checkpoint else 0)


def last_checkpoint(run: Path) -> Path | None:
    """Return the last complete checkpoint of a run, or None if it has none."""
    return next(reversed(complete_checkpoints(run)), None)


# --- the dry run


def print_dry_run(recipe: Recipe, num_processes: int, *, resume: bool = False) -> None:
    """Print the rows, steps, share of labels, fill and memory of a run to stdout, without starting it.

    Raises:
        UserError: see `check_run`.
    """
    plan, _ = check_run(recipe, resume=resume, num_processes=num_processes)
    _warn_if_epochs_end_first(recipe, plan)
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
    batch_rows, num_rows = recipe.train.batch_rows, len(rows.epochs[0])
    padding = "" if all(rows.epochs[0]) else f", padded to a multiple of train.batch_rows {batch_rows}"
    table = Table("quantity", "value", title="dry run: nothing is written")
    for quantity, value in {
        "examples to train on, counted per mode, per epoch": f"{len(rows.items):,}",
        "tokens per epoch": f"{rows.num_tokens:,}",
        "label tokens per epoch": f"{rows.num_labels:,} ({rows.num_labels / rows.num_tokens:.1%})",
        f"rows of {recipe.data.row_len:,} tokens": f"{num_rows:,} per epoch{padding}, {rows.fill:.1%} filled",
        "optimizer steps": f"{plan.num_steps:,} of {format_count(batch_rows, 'row')}",
        "parameters": parameters,
        "attention backend": plan.backend,
        f"memory for model states, ZeRO-{plan.zero_stage}, per process of {num_processes}": (
            f"{state_bytes / 2**30:.2f} GiB without activations"
        ),
    }.items():
        table.add_row(quantity, value)
    PlainConsole().print(table)


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
