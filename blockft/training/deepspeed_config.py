"""The DeepSpeed config of a run: read the JSON file, and check it before any process starts."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from blockft.errors import UserError, did_you_mean, list_allowed
from blockft.inputs import read_json, shorten
from blockft.training.distributed import use_cpu
from blockft.training.library_warnings import library_output_on_stderr
from blockft.validation import describe_value

SECTIONS = {
    "optimizer",
    "scheduler",
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "compile",
    "csv_monitor",
    "data_types",
    "flops_profiler",
    "tensorboard",
    "wandb",
}
"""Keys of a DeepSpeed config that hold an object."""

NUMBERS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "steps_per_print",
}
"""Keys that hold a number."""

SWITCHES = {
    "disable_allgather",
    "dump_state",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
"""Keys that hold true or false."""

TEXTS = {"communication_data_type", "gradient_allreduce_op", "log_level"}
"""Keys that hold a text."""

ADAM_PARAMS = {
    *("lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode", "torch_adam", "amsgrad"),
    *("fused", "foreach", "fp32_optimizer_states"),
}
"""Arguments of the optimizers Adam and AdamW."""

ADAM_EPSILON = 1e-8
"""The epsilon of AdamW, of which a recipe has no setting."""

MAX_STAGE = 3

_FILLED = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "bf16.enabled", "fp16.enabled", "zero_optimization.reduce_bucket_size"),
    *(f"optimizer.params.{name}" for name in ("lr", "betas", "eps", "weight_decay")),
    *(f"scheduler.params.warmup_{name}" for name in ("min_lr", "max_lr", "num_steps")),
    "scheduler.params.total_num_steps",
}
"""Keys for which transformers sets a value if a config says "auto"."""

_FILLED_STAGE_3 = {
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
}
"""The same under ZeRO-3."""

_FROM_RECIPE = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 0},
    # DeepSpeed's own measurement of speed waits for the GPU twice in every micro-batch
    "timers": {"throughput": {"enabled": False}},
}
"""Values of a config that the recipe or blockft decides."""


def load_deepspeed_config(name: str, shipped: Path) -> dict[str, Any]:
    """Return the DeepSpeed config of a JSON file, or of a name in the folder of `shipped` configs.

    Raises:
        UserError: there is no such file, or it holds no DeepSpeed config.
    """
    path = shipped / f"{name}.json" if is_shipped(name, shipped) else Path(name)
    if not path.is_file():
        names = sorted(p.stem for p in shipped.glob("*.json"))
        raise UserError(
            f"train.deepspeed {shorten(name)!r} is neither a file nor the name of a shipped one "
            f"({list_allowed(name, names)})"
        )
    config = read_json(path, "train.deepspeed")
    if not isinstance(config, dict):
        raise UserError(f"train.deepspeed {path} should hold a JSON object")
    if problem := next(_problems(config), None):
        raise UserError(f"train.deepspeed {path}: {problem}")
    # what a config leaves out would otherwise have DeepSpeed's default, not the value of the recipe
    return {**_FROM_RECIPE, **config, "bf16": {"enabled": "auto", **config.get("bf16", {})}}


def is_shipped(name: str, shipped: Path) -> bool:
    """Return whether a name is one of the folder of `shipped` configs."""
    return name in {path.stem for path in shipped.glob("*.json")}


def without_overlap(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config for one process, which has no communication to overlap with.

    With `overlap_comm`, ZeRO-1 and ZeRO-2 wait for the GPU after every micro-batch, and reserve a second
    buffer for gradients. Configs with offload, where the option also concerns copies, stay as they are.
    """
    zero = deepspeed["zero_optimization"]
    if zero_stage(deepspeed) not in (1, 2) or is_offloaded(deepspeed, "offload_optimizer"):
        return dict(deepspeed)
    return {**deepspeed, "zero_optimization": {**zero, "overlap_comm": False}}


def with_prefetched_layers(deepspeed: Mapping[str, Any], layer_numel: int) -> dict[str, Any]:
    """Return the config of ZeRO-3 for layers that are gathered whole, if it leaves the choice to us.

    While a layer computes, the weights of the next one are gathered. The usual size of this prefetch is that
    of one matrix, so that each layer would wait for most of its weights. `layer_numel` counts the weights of
    the largest layer.
    """
    zero = deepspeed["zero_optimization"]
    if zero.get("stage3_prefetch_bucket_size", "auto") != "auto":
        return dict(deepspeed)
    return {**deepspeed, "zero_optimization": {**zero, "stage3_prefetch_bucket_size": layer_numel}}


def zero_stage(deepspeed: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config."""
    return deepspeed.get("zero_optimization", {}).get("stage", 0)


def is_offloaded(deepspeed: Mapping[str, Any], section: str) -> bool:
    """Return whether a section (offload_optimizer or offload_param) keeps states outside of the GPU."""
    offload = deepspeed.get("zero_optimization", {}).get(section) or {}
    return bool(offload.get("device", "none") != "none")


def find_own_optimizer(deepspeed: Mapping[str, Any]) -> str | None:
    """Return the name of a section that names DeepSpeed's optimizer or places its states on the host."""
    if deepspeed.get("optimizer") is not None:
        return "a section optimizer"
    return "zero_optimization.offload_optimizer" if is_offloaded(deepspeed, "offload_optimizer") else None


def check_deepspeed_config(
    deepspeed: Mapping[str, Any],
    name: str,
    *,
    num_processes: int,
    batch_rows: int,
    dtype: torch.dtype,
    max_grad_norm: float,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    num_steps: int,
    warmup_steps: int,
) -> None:
    """Check that a config agrees with the recipe, and that DeepSpeed takes it.

    The values of the recipe are written into the config where it says "auto", as transformers does later.

    Raises:
        UserError: a value of the config differs from the recipe's setting, or DeepSpeed refuses the config.
    """
    accumulation = batch_rows // num_processes
    # value in the config -> (name in messages, value of the recipe)
    expected: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": ("a micro-batch", 1),
        "gradient_accumulation_steps": ("train.batch_rows divided by the processes", accumulation),
        "train_batch_size": ("train.batch_rows", batch_rows),
        "gradient_clipping": ("train.max_grad_norm", max_grad_norm),
        "bf16.enabled": ("model.dtype=bfloat16", dtype is torch.bfloat16),
        "fp16.enabled": ("model.dtype=float16", False),
        "optimizer.params.lr": ("train.learning_rate", learning_rate),
        "optimizer.params.betas": ("[train.adam_beta1, train.adam_beta2]", list(betas)),
        "optimizer.params.eps": ("the epsilon of AdamW", ADAM_EPSILON),
        "optimizer.params.weight_decay": ("train.weight_decay", weight_decay),
        "scheduler.params.warmup_min_lr": ("", None),
        "scheduler.params.warmup_max_lr": ("train.learning_rate", learning_rate),
        "scheduler.params.total_num_steps": ("the number of steps", num_steps),
        "scheduler.params.warmup_num_steps": ("train.warmup_steps, or 1", max(1, warmup_steps)),
    }
    filled = copy.deepcopy(dict(deepspeed))
    for key, (setting, value) in expected.items():
        *sections, last = key.split(".")
        section: Any = filled
        for inner in sections:
            section = section.get(inner, {})
        found = section.get(last)
        if found == "auto":
            section[last] = 0 if value is None else value
        elif found is not None and value is not None and found != value:
            raise UserError(
                f'train.deepspeed {name}: {key} is {found}, but {setting} is {value}: write "auto", '
                "or the same value in the recipe"
            )
    _check_accumulation_dtype(deepspeed, name, dtype)
    if "optimizer" in deepspeed and zero_stage(deepspeed) == 0 and dtype is torch.bfloat16:
        raise UserError(
            f"train.deepspeed {name}: with the section optimizer under ZeRO-0 in bfloat16 DeepSpeed begins "
            "with a step of gradients of 0, after which Adam's first steps are too short: leave the section "
            "out, or set zero_optimization.stage to 1"
        )
    # DeepSpeed computes it from the others and from the processes that are connected, of which there is one
    del filled["train_batch_size"]
    _check_by_deepspeed(_without_auto(filled), name)


def _check_accumulation_dtype(deepspeed: Mapping[str, Any], name: str, dtype: torch.dtype) -> None:
    """Refuse the optimizer whose checkpoints DeepSpeed cannot gather, so that they could not be exported."""
    found = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    if found not in (None, "bf16", "bfloat16") and dtype is torch.bfloat16 and zero_stage(deepspeed) == 1:
        raise UserError(
            f"train.deepspeed {name}: data_types.grad_accum_dtype is {shorten(repr(found))}, which cannot be "
            "exported under ZeRO-1: leave it out, or set zero_optimization.stage to 2"
        )


def _check_by_deepspeed(config: dict[str, Any], name: str) -> None:
    if use_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with library_output_on_stderr():
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig(config)
        # DeepSpeed's own check raises errors of many classes, from pydantic's to AssertionError
        except Exception as error:
            if isinstance(error, ValidationError):
                reason = "; ".join(
                    describe_value(".".join(map(str, fault["loc"])), fault)
                    for fault in error.errors(include_url=False)
                )
            else:
                reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"train.deepspeed {name} is refused by DeepSpeed: {shorten(reason, 500)}"
            ) from error


def _without_auto(value: Any) -> Any:
    """Return a config without the entries "auto", for which transformers needs the model."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the keys of a config and with the types of its values."""
    known = sorted(SECTIONS | NUMBERS | SWITCHES | TEXTS)
    for key, value in config.items():
        found = shorten(repr(value))
        if key not in known:
            allowed = did_you_mean(key, known) or f"allowed: {', '.join(known)}"
            yield f"unknown key {shorten(key)!r} ({allowed})"
        elif key in SECTIONS and not isinstance(value, dict):
            yield f"{key} is {found}, it should be an object"
        elif key in NUMBERS and value != "auto" and (isinstance(value, bool) or not _is_number(value)):
            auto = ' or "auto"' if key in _FILLED else ""
            yield f"{key} is {found}, it should be a number{auto}"
        elif key in SWITCHES and not isinstance(value, bool):
            yield f"{key} is {found}, it should be true or false"
        elif key in TEXTS and not isinstance(value, str):
            yield f"{key} is {found}, it should be a text"
    if config.get("compile"):
        yield "compile has no effect, because the recipe compiles (train.torch_compile): leave it out"
    yield from _checkpoint_problems(config.get("checkpoint", {}), config.get("zero_optimization", {}))
    yield from _auto_problems(config)
    yield from _zero_problems(config.get("zero_optimization", {}), config)
    yield from _optimizer_problems(config.get("optimizer"))
    yield from _scheduler_problems(config.get("scheduler"))


def _auto_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that say "auto" although nothing sets their values."""
    zero = config.get("zero_optimization")
    is_stage_3 = isinstance(zero, dict) and zero.get("stage") == MAX_STAGE
    filled = _FILLED | (_FILLED_STAGE_3 if is_stage_3 else set())
    for key in _list_auto(config):
        if key not in filled:
            yield f'{key} is "auto", which stands for no value here: write a value, or leave it out'


def _list_auto(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _list_auto(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"


def _zero_problems(zero: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= MAX_STAGE:
        yield f"zero_optimization.stage is {shorten(repr(stage))}, it should be 0 to {MAX_STAGE}"
        return
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        if section is not None and not isinstance(section, dict):
            yield f"zero_optimization.{name} is {shorten(repr(section))}, it should be an object"
            return
    if zero.get("stage3_gather_16bit_weights_on_model_save") is False:
        yield "zero_optimization.stage3_gather_16bit_weights_on_model_save is false: leave it out"
    forced = config.get("zero_force_ds_cpu_optimizer", True)
    if is_offloaded(config, "offload_optimizer") and "optimizer" not in config and forced:
        yield (
            "zero_optimization.offload_optimizer needs an optimizer of DeepSpeed: add the section optimizer "
            "with the type AdamW, as in zero2-offload"
        )


def _checkpoint_problems(checkpoint: Any, zero: Any) -> Iterator[str]:
    """Yield the options of checkpoints that a resumed run or an export could not read."""
    allowed = (
        ("checkpoint.checkpoint_serialization", checkpoint, True),
        ("checkpoint.load_universal", checkpoint, False),
        ("checkpoint.use_node_local_storage", checkpoint, False),
        ("checkpoint.writer", checkpoint, None),
        ("zero_optimization.elastic_checkpoint", zero, False),
        ("zero_optimization.load_from_fp32_weights", zero, True),
    )
    for key, section, value in allowed:
        found = section.get(key.rpartition(".")[2], value) if isinstance(section, dict) else value
        if found is not value:
            yield f"{key} is {shorten(json.dumps(found))}, it should be {json.dumps(value)}: leave it out"


def _optimizer_problems(optimizer: Any) -> Iterator[str]:
    if optimizer is None:
        return
    kind, params = optimizer.get("type"), optimizer.get("params", {})
    if not isinstance(kind, str) or kind.lower() not in ("adam", "adamw"):
        yield f"optimizer.type is {shorten(repr(kind))} ({list_allowed(kind, ('Adam', 'AdamW'))})"
    if not isinstance(params, dict):
        yield f"optimizer.params is {shorten(repr(params))}, it should be an object"
        return
    if unknown := sorted(set(params) - ADAM_PARAMS):
        allowed = list_allowed(unknown[0], sorted(ADAM_PARAMS))
        yield f"unknown key optimizer.params.{unknown[0]} ({allowed})"


def _scheduler_problems(scheduler: Any) -> Iterator[str]:
    if scheduler is None:
        return
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    schedules = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
    if kind not in schedules:
        yield f"scheduler.type is {shorten(repr(kind))} ({list_allowed(kind, schedules)})"
    if not isinstance(params, dict):
        yield f"scheduler.params is {shorten(repr(params))}, it should be an object"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -1e12 < value < 1e12
