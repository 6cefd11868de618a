"""Checkpoints of a run: which are whole, what the model answered there, and their weights in one piece."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from blockft.attention.backends import BlockMasks
from blockft.attention.layout import Layout, lay_out
from blockft.errors import UserError
from blockft.rundir import write_whole

MARKER = "whole.json"
"""Written last: a checkpoint without it was cut short and does not count."""

PROBE = "probe.safetensors"
"""What the run's model made of a fixed text, for exports to be compared with."""


def mark_whole(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Declare a checkpoint whole, with facts about the run that a resume compares."""
    write_whole(checkpoint / MARKER, json.dumps(facts, indent=2) + "\n")


def read_facts(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))


def whole_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    numbered = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*"))
    return [
        path
        for _, path in sorted((int(match[1]), path) for match, path in numbered if match)
        if (path / MARKER).is_file()
    ]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the last whole one of a run.

    Raises:
        UserError: neither.
    """
    if (path / MARKER).is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is no folder: name a run or one of its checkpoints")
    if not (whole := whole_checkpoints(path)):
        raise UserError(f"{path} holds no whole checkpoint (a folder checkpoint-N with {MARKER})")
    return whole[-1]


def remove_old(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints; markers go first, so none is ever half there."""
    for checkpoint in whole_checkpoints(run)[:-keep]:
        (checkpoint / MARKER).unlink()
        shutil.rmtree(checkpoint)


@torch.no_grad()
def probe_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits (T, vocabulary) of a causal pass over `ids` (T,), computed in float32. All ranks call it.

    Whatever type the weights have: a pass of a small model in bfloat16 differs from one in float32 by 3 % of
    the logits' norm, which would hide a wrong export.
    """
    vectors = lay_out([Layout((len(ids),))]).to(model.device)
    training, attention = model.training, model.config._attn_implementation
    model.set_attn_implementation("block_sdpa")
    with _float32_weights(model):
        logits = model.eval()(
            input_ids=ids[None].to(model.device),
            position_ids=vectors.position_ids,
            block_masks=BlockMasks(vectors),
            use_cache=False,
        ).logits
    model.set_attn_implementation(attention)
    model.train(training)
    return logits[0].cpu()


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


def write_probe(checkpoint: Path, ids: torch.Tensor, logits: torch.Tensor) -> None:
    save_file({"input_ids": ids.contiguous(), "logits": logits.contiguous()}, checkpoint / PROBE)


def read_probe(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe's ids (T,) and the run's logits (T, vocabulary)."""
    tensors = load_file(checkpoint / PROBE)
    return tensors["input_ids"], tensors["logits"]


def consolidate(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's weights in float32, gathered from the shards of all ranks; needs no GPU and one process."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))
