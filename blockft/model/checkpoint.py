"""Checkpoints of a run: mark and find complete ones, choose the best one, and store reference logits.

Tensor suffixes: T tokens of the reference text, V vocabulary.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from blockft.attention.layout import Layout
from blockft.errors import UserError
from blockft.model.masked_forward import masked_logits
from blockft.outputs import apply_umask, write_atomic

MARKER = "complete.json"
"""Completion marker of a checkpoint, written last: a checkpoint without it is incomplete and is ignored."""

REFERENCE_LOGITS = "reference_logits.safetensors"
"""The token ids of a fixed text and the run's logits on them; an export is compared with these."""


def mark_complete(
    checkpoint: Path,
    *,
    step: int,
    run_signature: dict[str, Any],
    eval_losses: dict[str, float],
    eval_due: bool,
    unlogged: dict[str, Any],
) -> None:
    """Write the completion marker of a checkpoint, or replace it; the files get the umask's permissions.

    `run_signature` is what a resumed run must match. `eval_losses` holds the evaluation loss by mode;
    `eval_due` says that the run stopped before the evaluation of this step. `unlogged` describes the steps
    since the last logged one: their number (`num_steps`) and the sum of their losses on each rank
    (`loss_sums`); it is empty if there are none.
    """
    marker = {"step": step, "eval_losses": eval_losses, "eval_due": eval_due, "unlogged": unlogged}
    text = json.dumps({**marker, "run_signature": run_signature}, indent=2)
    apply_umask(checkpoint)
    write_atomic(checkpoint / MARKER, text + "\n")


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """Return the arguments of `mark_complete` that the marker of a complete checkpoint holds, by name."""
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))


def _list_checkpoints(run: Path) -> list[Path]:
    """Return all checkpoints of a run, complete and incomplete, oldest first."""
    numbered = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [path for path in _list_checkpoints(run) if (path / MARKER).is_file()]


def remove_incomplete(run: Path) -> None:
    """Delete the incomplete checkpoints of a run, so that no later save mixes its shards with old ones."""
    for checkpoint in _list_checkpoints(run):
        if not (checkpoint / MARKER).is_file():
            shutil.rmtree(checkpoint)


def best_checkpoint(run: Path) -> Path | None:
    """Return the complete checkpoint with the lowest evaluation loss, or None if none was evaluated.

    The loss is that of the block mode, if the run evaluates it.
    """
    losses_by_mode = {path: read_marker(path)["eval_losses"] for path in complete_checkpoints(run)}
    losses = {
        path: by_mode["block"] if "block" in by_mode else by_mode["full"]
        for path, by_mode in losses_by_mode.items()
        if by_mode
    }
    return min(losses, key=lambda path: losses[path], default=None)


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """Return `path` if it is a complete checkpoint, otherwise the last (or best) one of the run `path`.

    Raises:
        UserError: `path` is neither a checkpoint nor a run with such a checkpoint.
    """
    if (path / MARKER).is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: name a run or one of its checkpoints")
    if not (complete := complete_checkpoints(path)):
        raise UserError(f"{path} holds no complete checkpoint (a folder checkpoint-N with {MARKER})")
    if not best:
        return complete[-1]
    if found := best_checkpoint(path):
        return found
    raise UserError(
        f"no checkpoint of {path} was evaluated, so there is no best one: set train.num_eval_examples"
    )


def remove_old_checkpoints(run: Path, num_kept: int, *, keep_best: bool) -> None:
    """Delete all but the newest `num_kept` complete checkpoints, and the best one if `keep_best`.

    A marker is deleted before its checkpoint, so that a partly deleted checkpoint counts as incomplete.
    """
    best = best_checkpoint(run) if keep_best else None
    for checkpoint in complete_checkpoints(run)[:-num_kept]:
        if checkpoint != best:
            (checkpoint / MARKER).unlink()
            shutil.rmtree(checkpoint)


@torch.no_grad()
def compute_reference_logits(model: PreTrainedModel, ids_T: torch.Tensor) -> torch.Tensor:
    """Return the float32 logits (T, V) of a causal forward pass over `ids_T`. All ranks call it.

    The computation is in float32 whatever the dtype of the weights: in bfloat16 the logits of a small model
    differ by 3 % of their norm, which would hide a wrong export.
    """
    was_training, attention = model.training, model.config._attn_implementation
    model.set_attn_implementation("block_sdpa")
    # peft would cast the inputs of an adapter to the dtype that its weights have outside of the hooks
    with (
        _float32_weights(model),
        disable_input_dtype_casting(model),
        torch.compiler.set_stance("force_eager"),
    ):
        logits_TV = masked_logits(model.eval(), ids_T, [Layout((len(ids_T),))])
    model.set_attn_implementation(attention)
    model.train(was_training)
    return logits_TV.cpu()


@contextmanager
def _float32_weights(model: torch.nn.Module) -> Iterator[None]:
    """Convert each module's weights to float32 while the module computes, one module at a time."""
    original: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            original[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = original.pop(parameter)

    # ZeRO-3's hooks gather a module's weights before these hooks run and free them afterwards
    hooks = [module.register_forward_pre_hook(widen) for module in model.modules()]
    hooks += [module.register_forward_hook(restore, prepend=True) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save_reference_logits(checkpoint: Path, ids_T: torch.Tensor, logits_TV: torch.Tensor) -> None:
    """Write the ids of the reference text and the run's logits on them into a checkpoint."""
    tensors = {"input_ids": ids_T.contiguous(), "logits": logits_TV.contiguous()}
    save_file(tensors, checkpoint / REFERENCE_LOGITS)


def load_reference_logits(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids (T,) of the reference text and the run's logits (T, V) on them."""
    tensors = load_file(checkpoint / REFERENCE_LOGITS)
    return tensors["input_ids"], tensors["logits"]
