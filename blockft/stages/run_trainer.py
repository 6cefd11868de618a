"""Load the models of a run and build its trainer with all callbacks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from peft import PeftModel
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from blockft.config.choices import Objective, Optimizer, Positions, WeightInit
from blockft.config.recipe import dump_recipe
from blockft.config.settings import Recipe
from blockft.data.encoder import Encoder
from blockft.errors import UserError, first_line
from blockft.model.checkpoint import read_marker
from blockft.model.decoder_layers import compile_layers, list_layers
from blockft.model.fingerprint import model_fingerprint
from blockft.model.gradient_checkpointing import checkpoint_layers
from blockft.model.load import digest_base_weights, load_model, load_tokenizer
from blockft.model.lora import add_adapter
from blockft.model.shared_input import share_products
from blockft.stages.block_attention import build_block_attention
from blockft.stages.run_plan import choose_pad_id
from blockft.training.distributed import check_ranks, use_cpu
from blockft.training.objectives import Distillation
from blockft.training.plan import BASE_WEIGHTS, TEACHER_FINGERPRINT, RunPlan, check_run_signature
from blockft.training.sample_answers import SampleAnswers, SamplePrompt

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from blockft.training.progress_line import ProgressLineCallback
    from blockft.training.run_callback import RunCallback
    from blockft.training.trainer import BlockTrainer

_OPTIMIZERS = {Optimizer.adamw: "adamw_torch_fused", Optimizer.adamw_8bit: "adamw_bnb_8bit"}
"""Names of transformers for the choices of `train.optimizer`."""

REFERENCE_LEN = 256
"""Number of tokens of the reference text, on which exports are compared: the start of the run's first row."""


def build_trainer(
    recipe: Recipe, plan: RunPlan, checkpoint: Path | None, *, checkpointing: str, title: str
) -> tuple["BlockTrainer", "RunCallback"]:
    """Load the models of a run and build its trainer with its callbacks; all ranks call it.

    `checkpoint` is the one that the run resumes from, `checkpointing` the kind of gradient checkpointing.
    `title` names the run for trackers.

    Raises:
        UserError: a model or a setting cannot be used; the checkpoint belongs to another run; the ranks have
            different recipes.
    """
    marker = read_marker(checkpoint) if checkpoint else None
    # TrainingArguments enable ZeRO-3, which would shard the weights of a teacher loaded after them
    distillation, teacher_signature = _load_distillation(recipe, plan)
    run_signature = plan.run_signature | teacher_signature | _digest_base_weights(recipe)
    arguments = _build_arguments(recipe, plan, marker, title)
    agreed = {"recipe": dump_recipe(recipe), "checkpoint": str(checkpoint), **run_signature}
    check_ranks(Path(recipe.train.output_dir), agreed)
    if checkpoint:
        check_run_signature(checkpoint, run_signature)
    model = _load_model(recipe, plan, checkpointing)
    # otherwise the Trainer turns the cache off in the config, and so in every export
    arguments.use_cache = model.config.use_cache
    run_callback, callbacks = _build_callbacks(recipe, plan, marker, run_signature)
    trainer = _create_trainer(recipe, plan, model, arguments, distillation, callbacks)
    run_callback.trainer = trainer
    return trainer, run_callback


def _create_trainer(
    recipe: Recipe,
    plan: RunPlan,
    model: PreTrainedModel | PeftModel,
    arguments: "TrainingArguments",
    distillation: Distillation | None,
    callbacks: list[TrainerCallback],
) -> "BlockTrainer":
    """Return the trainer.

    Raises:
        UserError: a tracker of the recipe cannot be used.
    """
    from blockft.training.peak_flops import sum_peak_flops
    from blockft.training.prefetch import PrefetchedRows
    from blockft.training.throughput import Throughput
    from blockft.training.trainer import BlockTrainer

    try:
        return BlockTrainer(
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


def _build_callbacks(
    recipe: Recipe, plan: RunPlan, marker: dict[str, Any] | None, run_signature: dict[str, Any]
) -> tuple["RunCallback", list[TrainerCallback]]:
    """Return the callback that writes the run's folder, and all callbacks of the run with it."""
    from blockft.training.lr_schedule import RecipeScheduleCallback
    from blockft.training.progress_line import ProgressLineCallback
    from blockft.training.wandb_tracking import WandbConfigCallback, log_sample_answers

    progress_line = ProgressLineCallback()
    run_callback = _build_run_callback(recipe, plan, marker, run_signature, progress_line)
    callbacks: list[TrainerCallback] = [run_callback, progress_line, RecipeScheduleCallback()]
    if "wandb" in recipe.train.report_to:
        run_callback.show_answers = log_sample_answers
        config = {"recipe": yaml.safe_load(dump_recipe(recipe)), "data": plan.manifest}
        callbacks.append(WandbConfigCallback(config))
    return run_callback, callbacks


def _build_run_callback(
    recipe: Recipe,
    plan: RunPlan,
    marker: dict[str, Any] | None,
    run_signature: dict[str, Any],
    progress_line: "ProgressLineCallback",
) -> "RunCallback":
    from blockft.training.run_callback import RunCallback

    settings = recipe.train
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision, recipe.model.chat_template)
    return RunCallback(
        Path(settings.output_dir),
        tokenizer=tokenizer,
        run_signature=run_signature,
        block_attention=build_block_attention(recipe.data, plan.manifest),
        reference_ids_T=plan.rows[0]["input_ids"][0, :REFERENCE_LEN].clone(),
        save_total_limit=settings.save_total_limit,
        keep_best=settings.keep_best,
        has_eval_rows=bool(plan.eval_rows),
        eval_steps=settings.eval_steps,
        unlogged=marker["unlogged"] if marker else {},
        eval_due=bool(marker and marker["eval_due"]),
        sample_answers=_build_sample_answers(recipe, plan, tokenizer),
        answers_due=bool(marker and marker["answers_due"]),
        progress_line=progress_line,
    )


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
        local_sees_first=recipe.data.local_sees_first,
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
    if plan.zero_stage == 3:
        _gather_whole_layers(model)
    if plan.compiles:
        compile_layers(model, without_hooks=plan.zero_stage == 3)
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
    if plan.zero_stage == 3:
        _cast_adapter(adapted, plan.dtype)
    if plan.shares_products:
        share_products(model)
    return adapted


def _gather_whole_layers(model: PreTrainedModel) -> None:
    """Let ZeRO-3 gather all weights of a decoder layer before it, instead of each weight before its module.

    DeepSpeed calls Python code before and after each module that it gathers, which may take longer than the
    GPU computes. The compiler would stop at each gathered weight inside of a layer.
    """
    from deepspeed.utils import set_z3_leaf_modules

    layers = list_layers(model)
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    for layer in layers:
        layer.register_forward_pre_hook(_require_input_gradient)


def _require_input_gradient(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    """Let the input of a trained layer require a gradient, which it has if a weight before it is trained.

    DeepSpeed frees the weights of a layer when the gradient of its input is known. Of an input without a
    gradient it believes that before the backward pass of the layer.
    """
    hidden: torch.Tensor = inputs[0]
    is_trained = any(weight.requires_grad for weight in layer.parameters())
    if torch.is_grad_enabled() and is_trained and not hidden.requires_grad:
        hidden.requires_grad_()


def _cast_adapter(adapted: PeftModel, dtype: torch.dtype) -> None:
    """Give the new weights of an adapter the type of the model, as DeepSpeed does for the other stages.

    Under ZeRO-3 DeepSpeed casts no weights, and refuses trained weights of two types: those that peft makes
    are in float32, and the modules that it copies (`modules_to_save`) have the type of the model.
    """
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)


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
    teacher = load_model(
        settings.teacher,
        backend=plan.backend,
        dtype=plan.dtype,
        # ZeRO-3 is not enabled yet, so that the teacher is never sharded
        device=None if use_cpu() else torch.device("cuda"),
    ).requires_grad_(False)
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
