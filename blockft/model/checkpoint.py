"""Checkpoints of a run: which are whole, what the model answered there, and their weights in one piece."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from blockft.attention.layout import Layout
from blockft.errors import UserError
from blockft.model.masked_forward import masked_logits
from blockft.outputs import write_atomic

MARKER = "whole.json"
"""Written last: a checkpoint without it was cut short and does not count."""

REFERENCE_LOGITS = "probe.safetensors"
"""What the run's model made of a fixed text, for exports to be compared with."""


def mark_complete(
    checkpoint: Path,
    *,
    step: int,
    facts: dict[str, Any],
    eval_losses: dict[str, float],
    eval_due: bool,
    unlogged: dict[str, Any],
) -> None:
    """Declare a checkpoint whole, or say more of one that is.

    `facts` about the run are what a resume compares, `eval_losses` its losses by view; `eval_due` says that
    the run stopped before it had evaluated here; `unlogged` are the steps since the last logged one, if there
    are any: how many `steps`, and the sum of their losses on each rank (`losses`).
    """
    marker = {"step": step, "eval_losses": eval_losses, "eval_due": eval_due, "unlogged": unlogged}
    write_atomic(checkpoint / MARKER, json.dumps({**marker, "facts": facts}, indent=2) + "\n")


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """What `mark_complete` was told of a whole checkpoint: its step, facts and evaluation losses, whether an
    evaluation is due, and what was not logged yet."""
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))


def _checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, whole and torn, oldest first."""
    numbered = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def complete_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return [path for path in _checkpoints(run) if (path / MARKER).is_file()]


def remove_incomplete(run: Path) -> None:
    """Delete the checkpoints not whole: a run that saved into one would mix its shards with old ones."""
    for checkpoint in _checkpoints(run):
        if not (checkpoint / MARKER).is_file():
            shutil.rmtree(checkpoint)


def best_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint with the lowest evaluation loss: in the block view, if the run has it."""
    losses = {path: read_marker(path)["eval_losses"] for path in complete_checkpoints(run)}
    evaluated = {
        path: by_view["block"] if "block" in by_view else by_view["full"]
        for path, by_view in losses.items()
        if by_view
    }
    return min(evaluated, key=lambda path: evaluated[path], default=None)


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint itself, or the last whole one of a run, or its best.

    Raises:
        UserError: neither.
    """
    if (path / MARKER).is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is no folder: name a run or one of its checkpoints")
    if not (whole := complete_checkpoints(path)):
        raise UserError(f"{path} holds no whole checkpoint (a folder checkpoint-N with {MARKER})")
    if not best:
        return whole[-1]
    if found := best_checkpoint(path):
        return found
    raise UserError(f"{path} was not evaluated, so none is its best checkpoint: set train.num_eval_examples")


def remove_old_checkpoints(run: Path, keep: int, *, keep_best: bool) -> None:
    """Delete all but the newest `keep` whole checkpoints; markers go first, so none is ever half there."""
    best = best_checkpoint(run) if keep_best else None
    for checkpoint in complete_checkpoints(run)[:-keep]:
        if checkpoint != best:
            (checkpoint / MARKER).unlink()
            shutil.rmtree(checkpoint)


@torch.no_grad()
def compute_reference_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits (T, vocabulary) of a causal pass over `ids` (T,), computed in float32. All ranks call it.

    Whatever type the weights have: a pass of a small model in bfloat16 differs from one in float32 by 3 % of
    the logits' norm, which would hide a wrong export.
    """
    training, attention = model.training, model.config._attn_implementation
    model.set_attn_implementation("block_sdpa")
    # adapters must not round their inputs to the type that their weights have between the hooks
    with (
        _float32_weights(model),
        disable_input_dtype_casting(model),
        torch.compiler.set_stance("force_eager"),
    ):
        logits = masked_logits(model.eval(), ids, [Layout((len(ids),))])
    model.set_attn_implementation(attention)
    model.train(training)
    return logits.cpu()


@contextmanager
def _float32_weights(model: torch.nn.Module) -> Iterator[None]:
    """Each module's weights are float32 while it computes, one module at a time, and then as they were."""
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            kept[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept.pop(parameter)

    # inside the hooks with which ZeRO-3 gathers a module's weights before and frees them after
    hooks = [module.register_forward_pre_hook(widen) for module in model.modules()]
    hooks += [module.register_forward_hook(restore, prepend=True) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save_reference_logits(checkpoint: Path, ids: torch.Tensor, logits: torch.Tensor) -> None:
    save_file({"input_ids": ids.contiguous(), "logits": logits.contiguous()}, checkpoint / REFERENCE_LOGITS)


def load_reference_logits(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe's ids (T,) and the run's logits (T, vocabulary)."""
    tensors = load_file(checkpoint / REFERENCE_LOGITS)
    return tensors["input_ids"], tensors["logits"]


def consolidate(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights that were trained, gathered from the shards of all ranks; needs no GPU and one process.

    Of a run with an adapter that is the adapter. Weights are converted one by one: beside the result, memory
    holds the float32 shards once.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    shards = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    if any(shards.glob("*_optim_states.pt")):
        with redirect_stdout(sys.stderr):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
    else:  # ZeRO-0: no shards
        weights = torch.load(shards / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    return {name: weight.contiguous().to(dtype) for name, weight in weights.items()}
