"""Plan a run: check that its recipe, prepared data, model and earlier checkpoints fit together."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from blockft.config.choices import Mode, Objective, Optimizer, Positions, WeightInit
from blockft.config.recipe import RECIPES_FOLDER
from blockft.config.settings import Recipe, TrainSettings
from blockft.data.mixture import Mixture
from blockft.data.prepared import PreparedData, load_prepared
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.errors import UserError, warn
from blockft.model.checkpoint import (
    check_markers,
    complete_checkpoints,
    find_checkpoint,
    read_marker,
    verify_checkpoint,
)
from blockft.model.decoder_layers import list_layers
from blockft.model.load import (
    adapter_base_model,
    build_meta_model,
    load_config,
    load_tokenizer,
    parse_dtype,
    verify_model,
)
from blockft.model.lora import add_adapter
from blockft.model.nf4_linear import check_bitsandbytes
from blockft.model.supported import check_token_ids, head_size, local_sees_first
from blockft.outputs import check_absent
from blockft.run_folder import RECIPE, verify_metrics
from blockft.stages.mixture_settings import read_mixture
from blockft.stages.source_settings import sees_first_block
from blockft.training.deepspeed_config import (
    check_deepspeed_config,
    find_own_optimizer,
    is_shipped,
    load_deepspeed_config,
    with_prefetched_layers,
    without_overlap,
    zero_stage,
)
from blockft.training.distributed import use_cpu
from blockft.training.flops import ModelFlops
from blockft.training.library_internals import check_pickles, read_tag
from blockft.training.lr_schedule import check_schedule
from blockft.training.plan import (
    BASE_WEIGHTS,
    NUM_PROCESSES,
    OPTIMIZER,
    QUANTIZATION,
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


def check_run(
    recipe: Recipe, *, resume: bool, num_processes: int, on_gpu: bool | None = None, verify: bool = True
) -> tuple[RunPlan, Path | None]:
    """Return the plan of a run and the checkpoint that it resumes from, or None if it starts at step 0.

    `on_gpu` is for `build_plan`. Without `verify` weights and checkpoint are not verified.

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
    check_markers(run)
    plan = build_plan(recipe, num_processes, on_gpu=on_gpu)
    if verify:
        verify_inputs(recipe, checkpoint)
    if checkpoint is None:
        return plan, None
    known_later = (TEACHER_FINGERPRINT, BASE_WEIGHTS)
    check_run_signature(checkpoint, plan.run_signature, ignore=(NUM_PROCESSES, *known_later))
    check_resharding(plan, checkpoint)
    return plan, checkpoint


def _is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, also of one that was killed before it wrote its recipe."""
    if (folder / RECIPE).is_file():
        return True
    return folder.is_dir() and all(path.name.startswith(f".{RECIPE}") for path in folder.iterdir())


def verify_inputs(recipe: Recipe, checkpoint: Path | None) -> None:
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


def build_plan(recipe: Recipe, num_processes: int, *, on_gpu: bool | None = None) -> RunPlan:
    """Return the plan of a run with `num_processes` processes, without loading weights.

    `on_gpu` plans for GPUs or for CPUs; by default for what this machine has.

    Raises:
        UserError: recipe, prepared data, model and number of processes do not fit together, or a setting
            cannot be used.
    """
    _check_settings(recipe, num_processes)
    config = _load_base_config(recipe)
    model, num_parameters = build_training_model(recipe)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision, recipe.model.chat_template)
    prepared = load_prepared(Path(recipe.data.output_dir), "blockft train")
    _check_prepared(recipe, prepared, tokenizer, config.vocab_size)
    _warn_of_long_examples(recipe, prepared, config.max_position_embeddings)
    mixture = read_mixture(recipe, prepared.manifest)
    rows, eval_rows = _build_rows(recipe, prepared, mixture, tokenizer, num_processes)
    num_steps = _count_steps(recipe.train, rows)
    on_gpu = not use_cpu() if on_gpu is None else on_gpu
    dtype = parse_dtype(recipe.model.dtype, default_dtype(on_gpu=on_gpu))
    backend = choose_backend(recipe.model.attention.value, on_gpu=on_gpu, head_size=head_size(config))
    deepspeed = _load_deepspeed(recipe, dtype, num_steps, num_processes)
    if zero_stage(deepspeed) == 3:
        deepspeed = with_prefetched_layers(deepspeed, _largest_layer(model))
    return RunPlan(
        model=model,
        num_parameters=num_parameters,
        rows=rows,
        eval_rows=eval_rows,
        batch_flops=_count_batch_flops(recipe, prepared, rows, model),
        num_steps=num_steps,
        manifest=prepared.manifest,
        mixture=mixture,
        on_gpu=on_gpu,
        backend=backend,
        compiles=on_gpu if recipe.train.torch_compile is None else recipe.train.torch_compile,
        dtype=dtype,
        deepspeed=deepspeed,
        run_signature={
            "model": {
                "path": recipe.model.path,
                "revision": recipe.model.revision,
                **describe_architecture(config),
            },
            "data": prepared.manifest["content_hash"],
            "weights of data.sources": [*mixture.weights],
            "data.mixture": {
                "temperature": mixture.temperature,
                "max_examples": mixture.max_examples,
            },
            **_list_signature_settings(recipe),
            ZERO_STAGE: zero_stage(deepspeed),
            WEIGHT_DTYPE: str(dtype).removeprefix("torch."),
            NUM_PROCESSES: num_processes,
        },
    )


def _check_settings(recipe: Recipe, num_processes: int) -> None:
    """Check what needs neither the model nor the data."""
    batch_rows = recipe.train.batch_rows
    if batch_rows % num_processes:
        raise UserError(
            f"train.batch_rows is {batch_rows}, which {num_processes} processes cannot share: "
            f"make it a multiple of {num_processes}"
        )
    _check_objective(recipe)
    check_trackers(recipe.train.report_to)


def _load_base_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the configuration of `model.path`, which must not be an adapter."""
    config = load_config(recipe.model.path, recipe.model.revision)
    if adapter_base_model(recipe.model.path):
        raise UserError(
            f"model.path {recipe.model.path} is an adapter, on which a run cannot be trained and exported: "
            "merge it into its base model (blockft export without --adapter-only), and train that model"
        )
    return config


def _count_steps(settings: TrainSettings, rows: RowDataset) -> int:
    """Return the number of steps, for which the schedule of the learning rate is checked."""
    num_steps = len(rows) // settings.batch_rows
    num_steps = min(num_steps, settings.max_steps or num_steps)
    check_schedule(
        settings.lr_scheduler_type,
        settings.lr_scheduler_kwargs,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        num_steps=num_steps,
    )
    return num_steps


def _load_deepspeed(recipe: Recipe, dtype: torch.dtype, num_steps: int, num_processes: int) -> dict[str, Any]:
    """Return the DeepSpeed config of a run. A file of the user must agree with the recipe."""
    settings, shipped = recipe.train, RECIPES_FOLDER / "deepspeed"
    deepspeed = load_deepspeed_config(settings.deepspeed, shipped)
    _check_quantization(recipe, deepspeed)
    _check_optimizer(recipe, deepspeed)
    if is_shipped(settings.deepspeed, shipped):
        return without_overlap(deepspeed) if num_processes == 1 else deepspeed
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
    return deepspeed


def build_training_model(recipe: Recipe) -> tuple[PreTrainedModel | PeftModel, int]:
    """Return the model of a run on the meta device with its adapter, and its parameters without the adapter.

    Raises:
        UserError: the adapter could not be exported; see `add_adapter`.
    """
    model = build_meta_model(load_config(recipe.model.path, recipe.model.revision))
    num_parameters = sum(p.numel() for p in model.parameters())
    if recipe.train.lora is None:
        return model, num_parameters
    is_quantized = recipe.model.quantization is not None
    adapted = add_adapter(model, recipe.train.lora, seed=recipe.train.seed, is_quantized=is_quantized)
    return adapted, num_parameters


def _largest_layer(model: PreTrainedModel | PeftModel) -> int:
    """Return the number of weights of the largest decoder layer."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return max(sum(weight.numel() for weight in layer.parameters()) for layer in list_layers(base))


def _warn_of_long_examples(recipe: Recipe, prepared: PreparedData, num_positions: int) -> None:
    """Warn that an example has more positions than the model."""
    examples = prepared.examples
    for index in np.flatnonzero(examples.columns.lengths > num_positions):
        layout = examples[int(index)].layout
        needed = layout.context_len + max(layout.final_lengths)
        if needed > num_positions:
            warn(
                f"example {index} of {recipe.data.output_dir} has {needed:,} positions, but "
                f"{recipe.model.path} has {num_positions:,} (max_position_embeddings): blockft generate and "
                "eval refuse such prompts; prepare shorter ones with data.row_len, or take a model for "
                "longer texts"
            )
            return


def list_settings_without_effect(recipe: Recipe) -> list[str]:
    """Return one sentence for every changed setting that has no effect on a run of this recipe."""
    settings, fields = recipe.train, TrainSettings.model_fields
    found = []
    if recipe.data.local_sees_first and not sees_first_block(recipe.data):
        found.append("data.local_sees_first has no effect: data.modes lacks block")
    names = ("sample_steps", "num_sample_prompts", "sample_max_new_tokens")
    changed = [name for name in names if getattr(settings, name) != fields[name].default]
    if settings.num_eval_examples == 0:
        reason = "no examples are held out (train.num_eval_examples is 0)"
        changed = [name for name in changed if getattr(settings, name) is not None]
    elif settings.sample_steps is None:
        reason = "train.sample_steps is null"
        changed.remove("sample_steps")
    else:
        changed, reason = [], ""
    return found + [f"train.{name} has no effect: {reason}" for name in changed]


def warn_of_settings(recipe: Recipe, plan: RunPlan) -> None:
    """Warn of settings that have no effect, of a model that was trained otherwise, and of missing steps.

    Steps are missing if they are fewer than `train.max_steps`.
    """
    for sentence in list_settings_without_effect(recipe):
        warn(sentence)
    has_block_mode = Mode.block in recipe.data.modes
    if has_block_mode and local_sees_first(plan.model.config) and not recipe.data.local_sees_first:
        warn(
            f"{recipe.model.path} was trained with local_sees_first true, and this run trains block mode "
            "without it: set data.local_sees_first=true to keep what the model has learned"
        )
    _warn_if_epochs_end_first(recipe, plan)


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


def _check_quantization(recipe: Recipe, deepspeed: dict[str, Any]) -> None:
    if recipe.model.quantization is None:
        return
    name = f"model.quantization={recipe.model.quantization.value}"
    if recipe.train.lora is None:
        raise UserError(
            f"{name} trains only an adapter, because quantised weights cannot be trained: set train.lora"
        )
    if zero_stage(deepspeed) == 3:
        raise UserError(
            f"{name} does not work under ZeRO-3, which cannot shard quantised weights, but "
            f"train.deepspeed is {recipe.train.deepspeed}: take zero2"
        )
    check_bitsandbytes(name)


def _check_optimizer(recipe: Recipe, deepspeed: dict[str, Any]) -> None:
    if recipe.train.optimizer is Optimizer.adamw:
        return
    name = f"train.optimizer={recipe.train.optimizer.value}"
    contradicting = find_own_optimizer(deepspeed)
    if contradicting is not None:
        raise UserError(
            f"{name} is not the optimizer of train.deepspeed {recipe.train.deepspeed}, which has "
            f"{contradicting}: take zero0 to zero3, or train.optimizer=adamw"
        )
    check_bitsandbytes(name)


def check_resharding(plan: RunPlan, checkpoint: Path | None) -> bool:
    """Return whether a checkpoint was written by another number of processes, so that its shards do not fit.

    Raises:
        UserError: the shards cannot be converted.
    """
    if checkpoint is None or plan.zero_stage == 0:  # ZeRO-0 has no shards
        return False
    found = read_marker(checkpoint)["run_signature"][NUM_PROCESSES]
    if found == plan.num_processes:
        return False
    if plan.run_signature[OPTIMIZER] != Optimizer.adamw:
        raise UserError(
            f"{checkpoint} was written with {NUM_PROCESSES} = {found}, but now it is {plan.num_processes}: "
            f"the moments of train.optimizer={plan.run_signature[OPTIMIZER]} cannot be divided anew, so "
            f"resume with {found} processes, or export the checkpoint and start a new run from that model"
        )
    return True


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
                f"train.teacher {settings.teacher} and {recipe.model.path} have different tokenizers: "
                "take a teacher with the tokenizer of the model"
            )
    found = prepared.manifest["options"]["local_sees_first"]
    if Mode.block in data.modes and found != data.local_sees_first:
        raise UserError(
            f"{data.output_dir} was prepared with data.local_sees_first {str(found).lower()}, which decides "
            f"the first block, but this recipe has {str(data.local_sees_first).lower()}: prepare again with "
            "another data.output_dir"
        )
    columns = prepared.examples.columns
    check_token_ids([int(columns.max_token_ids.max())], vocab_size, f"an example of {data.output_dir}")
    has_copies = sees_first_block(data)
    lengths = columns.lengths + columns.copy_lens if has_copies else columns.lengths
    longest = int(lengths.max())
    if longest > data.row_len:
        copies = ", copies of its first block included (data.local_sees_first)" if has_copies else ""
        raise UserError(
            f"data.row_len is {data.row_len}, but {data.output_dir} holds an example of {longest} tokens"
            f"{copies}: raise data.row_len, or prepare again"
        )
    if (copies := prepared.manifest["options"].get("num_copies", 1)) > 1 and settings.num_eval_examples:
        raise UserError(
            f"{data.output_dir} asks every question {copies} times (data.num_copies), so the model would "
            "learn the examples that train.num_eval_examples holds out from another copy: "
            "set train.num_eval_examples=0, or prepare one copy"
        )


def _build_rows(
    recipe: Recipe,
    prepared: PreparedData,
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    num_processes: int,
) -> tuple[RowDataset, dict[str, RowDataset]]:
    """Return the rows to train on, and the held-out rows by mode."""
    data, settings = recipe.data, recipe.train
    columns = prepared.examples.columns
    training, held_out = hold_out_examples(columns, settings.num_eval_examples, settings.seed)
    build_rows = partial(
        RowDataset,
        prepared.examples,
        columns,
        row_len=data.row_len,
        seed=settings.seed,
        pad_id=choose_pad_id(tokenizer),
        reencoded=data.positions is Positions.reencoded,
        local_sees_first=data.local_sees_first,
    )
    modes = [mode.value for mode in data.modes]
    is_distillation = settings.objective is Objective.distill
    rows = build_rows(
        training,
        modes,
        batch_rows=settings.batch_rows,
        epochs=settings.num_train_epochs,
        mixture=mixture,
        with_full=is_distillation,
    )
    if is_distillation and settings.teacher is None and not rows.epochs[0].is_block.any():
        raise UserError(
            f"no example of {data.output_dir} splits into blocks, so the full mode has nothing to teach: "
            "prepare sources with several blocks, or set train.objective=sft"
        )
    eval_modes = modes if len(held_out) else []
    return rows, {
        mode: build_rows(held_out, [mode], batch_rows=num_processes, epochs=1) for mode in eval_modes
    }


def _count_batch_flops(
    recipe: Recipe, prepared: PreparedData, rows: RowDataset, model: PreTrainedModel | PeftModel
) -> NDArray[np.float64]:
    """Return the model arithmetic of each batch; `model` is on the meta device."""
    block, full = ModelFlops.of_model(model).count(
        prepared.examples.layouts(),
        prepared.examples.columns.num_labels,
        reencoded=recipe.data.positions is Positions.reencoded,
        local_sees_first=recipe.data.local_sees_first,
    )
    return rows.sum_by_batch(block, full)


def choose_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id that fills rows; no example attends to it."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _list_signature_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a resumed run must not change."""
    data, settings = recipe.data, recipe.train
    signature: dict[str, Any] = {
        "data.row_len": data.row_len,
        "data.modes": [mode.value for mode in data.modes],
        "data.positions": data.positions.value,
        "data.local_sees_first": data.local_sees_first,
        "train.batch_rows": settings.batch_rows,
        "train.seed": settings.seed,
        "train.objective": settings.objective.value,
        "train.num_eval_examples": settings.num_eval_examples,
        "train.lora": settings.lora,
        QUANTIZATION: None if recipe.model.quantization is None else recipe.model.quantization.value,
        OPTIMIZER: settings.optimizer.value,
        "train.weight_decay": settings.weight_decay,
        "train.adam_beta1": settings.adam_beta1,
        "train.adam_beta2": settings.adam_beta2,
    }
    if settings.objective is Objective.distill:
        signature |= {"train.teacher": settings.teacher, "train.teacher_weight": settings.teacher_weight}
    return signature
