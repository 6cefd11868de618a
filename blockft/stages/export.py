"""`blockft export`: an ordinary Hugging Face checkpoint, checked against the run before it appears."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from blockft.config.choices import DType
from blockft.config.recipe import load_recipe
from blockft.config.settings import Recipe
from blockft.errors import UserError
from blockft.model.checkpoint import consolidate, find_checkpoint, load_reference_logits, read_marker
from blockft.model.load import (
    BLOCK_ATTENTION,
    DTYPES,
    adapter_base_model,
    load_full_attention_model,
    parse_dtype,
)
from blockft.model.lora import load_adapter
from blockft.model.model_card import build_model_card
from blockft.outputs import DATA, RECIPE, atomic_folder, check_absent, read_metrics
from blockft.units import parse_bytes
from blockft.version import __version__

EXACT, ROUNDED = 1e-5, 2e-2
"""The largest difference (its norm over the norm) allowed between an export's logits and the run's, with the
run's own weights, and with weights rounded to 16 bits that were not so in the run."""


def export(
    path: Path,
    out: Path,
    dtype: str = "auto",
    *,
    best: bool = False,
    adapter_only: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a checkpoint, or a run's last (or best) whole one, as a plain model folder; adapters are merged.

    Raises:
        UserError: no whole checkpoint; `out` exists; an unknown type or size; no adapter where only that is
            wanted; a full disk. Nothing is left behind.
    """
    check_absent(out, "choose another folder")
    shard_bytes = parse_bytes(max_shard_size)
    checkpoint = find_checkpoint(path, best=best)
    facts = read_marker(checkpoint)["facts"]
    has_adapter = facts["train.lora"] is not None
    if adapter_only and not has_adapter:
        raise UserError(f"{path} trained all weights, so there is no adapter: leave out --adapter-only")
    trained_in = DTYPES[facts["type of weights"]]
    kind = _dtype(dtype, trained_in)
    recipe = load_recipe(str(checkpoint.parent / RECIPE))
    console = Console(stderr=True)
    console.print(f"gathering the weights of {checkpoint}")
    with atomic_folder(out) as draft:
        if adapter_only:
            adapted = load_adapter(
                _empty(checkpoint, recipe, kind), checkpoint, consolidate(checkpoint, kind)
            )
            adapted.save_pretrained(str(draft))
            entry = json.dumps(_block_attention(recipe), indent=2)
            (draft / BLOCK_ATTENTION).write_text(entry + "\n", encoding="utf-8")
        else:
            model = _merged(checkpoint, recipe, kind) if has_adapter else _whole(checkpoint, recipe, kind)
            model.config.block_attention = _block_attention(recipe)
            if (checkpoint / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(checkpoint)
            model.save_pretrained(draft, max_shard_size=shard_bytes)
            del model
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(draft)
        (draft / "README.md").write_text(_card(checkpoint, recipe), encoding="utf-8")
        exact = kind is trained_in and (kind is torch.float32 or not has_adapter)
        difference, limit = _compare(draft, checkpoint), EXACT if exact else ROUNDED
        if not difference <= limit:
            raise RuntimeError(
                f"the export's logits differ from the run's by {difference:.1e}, which is more than "
                f"{limit:.0e}: nothing was written to {out}"
            )
    console.print(f"wrote {out}; its logits differ from the run's by {difference:.1e}")
    return out


def _dtype(name: str, trained_in: torch.dtype) -> torch.dtype:
    """The type asked for; `auto` is the one that the run computed in."""
    if name not in DType.__members__:
        raise UserError(f"--dtype is {name!r}, allowed are {', '.join(DType.__members__)}")
    return parse_dtype(name, trained_in)


def _block_attention(recipe: Recipe) -> dict[str, Any]:
    """How prompts were cut into blocks."""
    return {
        "version": 1,
        "position_scheme": recipe.data.positions.value,
        "sink_tokens": 0,
        "local_sees_first": False,
        "documents_in": recipe.data.prompt.documents_in.value,
        "order": recipe.data.order.value,
        "prompt": {
            name: getattr(recipe.data.prompt, name) for name in ("instruction", "document", "question")
        },
    }


def _whole(checkpoint: Path, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a run that trained all its weights."""
    model = _empty(checkpoint, recipe, dtype)
    tied = set(model.all_tied_weights_keys)
    model.load_state_dict(consolidate(checkpoint, dtype), assign=True, strict=not tied)
    model.tie_weights()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise RuntimeError(f"the checkpoint holds no weights for {', '.join(missing[:3])}")
    return model


def _merged(checkpoint: Path, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """The base model of a run with the run's adapter merged into its weights, in float32 before rounding."""
    base = load_full_attention_model(recipe.model.path, recipe.model.revision, torch.float32)
    adapted = load_adapter(base, checkpoint, consolidate(checkpoint, torch.float32))
    return adapted.merge_and_unload().to(dtype)


def _empty(checkpoint: Path, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """The run's model without weights, under the name of its base."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.name_or_path = recipe.model.path
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _card(checkpoint: Path, recipe: Recipe) -> str:
    return build_model_card(
        base=recipe.model.path,
        version=__version__,
        step=read_marker(checkpoint)["step"],
        recipe=(checkpoint.parent / RECIPE).read_text(encoding="utf-8"),
        manifest=json.loads((checkpoint.parent / DATA).read_text(encoding="utf-8")),
        metrics=read_metrics(checkpoint.parent),
    )


@torch.no_grad()
def _compare(draft: Path, checkpoint: Path) -> float:
    """The relative difference of the logits of the folder, opened by plain transformers, from the run's.

    Both are computed in float32 from weights of whatever type.
    """
    ids, expected = load_reference_logits(checkpoint)
    if base := adapter_base_model(str(draft)):
        # transformers' own reader of adapters does not know all kinds (DoRA)
        model: torch.nn.Module = PeftModel.from_pretrained(
            load_full_attention_model(*base, torch.float32), draft
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return float((logits - expected).norm() / expected.norm())
