"""What a run will do, known and checked before any process starts or weight is loaded."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from blockft.config.choices import AttentionBackend, Mode, Objective, Positions
from blockft.config.recipe import RECIPES_FOLDER
from blockft.config.settings import Recipe
from blockft.data.encoder import Example
from blockft.data.prepared import Examples, load_prepared
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.errors import UserError
from blockft.model.checkpoint import complete_checkpoints, find_checkpoint, read_marker
from blockft.model.load import load_config, load_tokenizer, parse_dtype
from blockft.outputs import RECIPE, check_absent
from blockft.training.launch import use_cpu
from blockft.training.lr_schedule import check_schedule
from blockft.training.row_dataset import RowDataset

OF_DISTILL = ("train.teacher", "train.teacher_weight")
"""Facts of runs with a teacher."""

TEACHER = "model as train.teacher"
"""The fact that is known when the teacher has been loaded: its fingerprint."""

NUM_PROCESSES = "number of processes"
"""The one fact in which a resumed run may differ."""


@dataclass(frozen=True)
class RunPlan:
    """Rows and steps, how they are computed, and the facts in which a resumed run must agree."""

    rows: RowDataset
    eval_rows: dict[str, RowDataset]
    num_steps: int
    manifest: dict[str, Any]
    backend: str
    dtype: torch.dtype
    deepspeed: dict[str, Any]
    facts: dict[str, Any]


def build_plan(recipe: Recipe, num_processes: int) -> RunPlan:
    """The plan of a run on so many processes.

    Raises:
        UserError: recipe, prepared data, model and processes do not fit together, or a setting is unfit.
    """
    data, settings = recipe.data, recipe.train
    if settings.batch_rows % num_processes:
        raise UserError(
            f"train.batch_rows is {settings.batch_rows}, which {num_processes} processes cannot share: "
            f"make it a multiple of {num_processes}"
        )
    _check_objective(recipe)
    _check_trackers(settings.report_to)
    config = load_config(recipe.model.path, recipe.model.revision)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    prepared = load_prepared(Path(data.output_dir))
    if prepared.manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{data.output_dir} was prepared with the tokenizer of {prepared.manifest['model']['path']}, "
            f"not with that of {recipe.model.path}: run blockft prepare for this model, "
            "with another data.output_dir"
        )
    if settings.teacher is not None:
        load_config(settings.teacher)
        if prepared.manifest["tokenizer"] != tokenizer_fingerprint(load_tokenizer(settings.teacher)):
            raise UserError(
                f"train.teacher {settings.teacher} has another tokenizer than {recipe.model.path}"
            )
    if (longest := max(map(len, prepared.examples))) > data.row_len:
        raise UserError(
            f"data.row_len is {data.row_len}, and {data.output_dir} holds an example of {longest} tokens: "
            "raise data.row_len, or prepare again"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if (copies := prepared.manifest["options"].get("num_copies", 1)) > 1 and settings.num_eval_examples:
        raise UserError(
            f"{data.output_dir} asks every question {copies} times (data.num_copies), so what "
            "train.num_eval_examples holds out would be learnt from another copy: "
            "set train.num_eval_examples=0, or prepare one copy"
        )
    training, held_out = _hold_out_examples(prepared.examples, settings.num_eval_examples, settings.seed)
    reencoded = data.positions is Positions.reencoded
    packed = partial(RowDataset, row_len=data.row_len, seed=settings.seed, pad_id=pad_id, reencoded=reencoded)
    modes = [mode.value for mode in data.modes]
    distils = settings.objective is Objective.distill
    rows = packed(
        training,
        modes,
        batch_rows=settings.batch_rows,
        epochs=settings.num_train_epochs,
        with_full=distils,
    )
    if distils and settings.teacher is None and all(mode == Mode.full for _, mode in rows.items):
        raise UserError(
            f"no example of {data.output_dir} splits into blocks: the full view has nothing to teach"
        )
    eval_views = modes if held_out else []
    num_steps = len(rows) // settings.batch_rows
    num_steps = min(num_steps, settings.max_steps or num_steps)
    check_schedule(
        settings.lr_scheduler_type,
        settings.lr_scheduler_kwargs,
        warmup_steps=settings.warmup_steps,
        num_steps=num_steps,
    )
    auto_backend, auto_dtype = ("sdpa", torch.float32) if use_cpu() else ("flex", torch.bfloat16)
    backend, precision = recipe.model.attention, recipe.model.dtype
    dtype = parse_dtype(precision, auto_dtype)
    if backend is AttentionBackend.flex and use_cpu():
        raise UserError("model.attention=flex needs a GPU: FlexAttention has no backward pass on a CPU")
    deepspeed = _load_deepspeed_config(settings.deepspeed)
    return RunPlan(
        rows=rows,
        eval_rows={v: packed(held_out, [v], batch_rows=num_processes, epochs=1) for v in eval_views},
        num_steps=num_steps,
        manifest=prepared.manifest,
        backend=auto_backend if backend is AttentionBackend.auto else backend.value,
        dtype=dtype,
        deepspeed=deepspeed,
        facts={
            "model": {"path": recipe.model.path, "revision": recipe.model.revision, **_architecture(config)},
            "data": prepared.manifest["content_hash"],
            "data.row_len": data.row_len,
            "data.modes": modes,
            "data.positions": data.positions.value,
            "train.batch_rows": settings.batch_rows,
            "train.seed": settings.seed,
            "train.objective": settings.objective.value,
            "train.num_eval_examples": settings.num_eval_examples,
            "train.lora": settings.lora,
            "train.weight_decay": settings.weight_decay,
            "train.adam_beta1": settings.adam_beta1,
            "train.adam_beta2": settings.adam_beta2,
            "ZeRO stage": deepspeed.get("zero_optimization", {}).get("stage", 0),
            "type of weights": str(dtype).removeprefix("torch."),
            NUM_PROCESSES: num_processes,
            **({name: getattr(settings, name.split(".")[1]) for name in OF_DISTILL} if distils else {}),
        },
    )


def check_run(recipe: Recipe, *, resume: bool, num_processes: int) -> tuple[RunPlan, Path | None]:
    """The plan, and the checkpoint that the run goes on from.

    Raises:
        UserError: see `build_plan`; the run exists and is not to be resumed, or cannot be.
    """
    run = Path(recipe.train.output_dir)
    if not resume:
        is_begun = (run / RECIPE).is_file() and not complete_checkpoints(run)
        start = "begin it anew (it has no checkpoint yet)" if is_begun else "go on from its last checkpoint"
        check_absent(run, f"{start} with --resume, or choose another train.output_dir")
        return build_plan(recipe, num_processes), None
    plan = build_plan(recipe, num_processes)
    if (run / RECIPE).is_file() and not complete_checkpoints(run):
        return plan, None  # killed before its first checkpoint, it begins anew
    checkpoint = find_checkpoint(run)
    check_run_signature(checkpoint, plan.facts, but=(NUM_PROCESSES, TEACHER))
    return plan, checkpoint


def check_run_signature(
    checkpoint: Path, asked: Mapping[str, Any], but: Sequence[str] = (NUM_PROCESSES,)
) -> None:
    """See that the run of a checkpoint is the one that is to go on, in all facts `but` some.

    Raises:
        UserError: it is another one.
    """
    found = read_marker(checkpoint)["facts"]
    for name in dict.fromkeys((*found, *asked)):
        if found.get(name) != asked.get(name) and name not in but:
            raise UserError(
                f"{checkpoint} belongs to another {name} ({found.get(name)}) than is asked for "
                f"({asked.get(name)}): resume with what the run began with, or start a new one"
            )


def _check_objective(recipe: Recipe) -> None:
    settings, modes = recipe.train, recipe.data.modes
    if settings.objective is Objective.sft:
        if settings.teacher is not None or settings.teacher_weight != 1:
            raise UserError(
                "train.teacher and train.teacher_weight do nothing where train.objective is sft: set distill"
            )
    elif not 0 < settings.teacher_weight <= 1:
        raise UserError(f"train.teacher_weight is {settings.teacher_weight}: it is above 0 and at most 1")
    elif settings.teacher is None and set(modes) != set(Mode):
        raise UserError(
            f"train.objective=distill teaches the block view by the full view, and data.modes is "
            f"[{', '.join(modes)}]: train on both, or name a train.teacher"
        )


def _check_trackers(names: list[str]) -> None:
    try:
        get_reporting_integration_callbacks([name for name in names if name not in ("none", "all")])
    except ValueError as error:
        raise UserError(f"train.report_to cannot be used: {error}") from error


def _hold_out_examples(
    examples: Examples, num_eval: int, seed: int
) -> tuple[Examples | Subset[Example], Sequence[Example] | Subset[Example]]:
    """Examples to train on, and those held out: `num_eval` of the ones that split, whose views differ."""
    if not num_eval:
        return examples, []
    candidates = [index for index, example in enumerate(examples) if example.has_local_blocks]
    if num_eval >= len(candidates):
        raise UserError(
            f"train.num_eval_examples is {num_eval}, and only {len(candidates)} examples split into blocks: "
            "hold out fewer"
        )
    chosen = set(random.Random(f"{seed}:held out").sample(candidates, num_eval))
    return (
        Subset(examples, [index for index in range(len(examples)) if index not in chosen]),
        Subset(examples, sorted(chosen)),
    )


def _architecture(config: Any) -> dict[str, Any]:
    """What of a model's configuration decides which weights fit it."""
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {name: getattr(config, name) for name in (*names, "num_attention_heads", "num_key_value_heads")}


def _load_deepspeed_config(name: str) -> dict[str, Any]:
    """DeepSpeed's settings from a JSON file or by the name of one that ships."""
    shipped = RECIPES_FOLDER / "deepspeed" / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in (RECIPES_FOLDER / "deepspeed").glob("*.json")))
        raise UserError(f"train.deepspeed {name!r} is neither a file nor one that ships ({names})")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise UserError(f"{path} should hold a JSON object, and its zero_optimization another one")
    return settings
