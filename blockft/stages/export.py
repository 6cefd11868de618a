"""`blockft export`: an ordinary Hugging Face checkpoint, checked against the run before it appears."""

import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from blockft import __version__
from blockft.config import Precision, Recipe
from blockft.errors import UserError
from blockft.model.card import model_card
from blockft.model.checkpoint import consolidate, find_checkpoint, read_facts, read_probe
from blockft.recipe import load_recipe
from blockft.rundir import DATA, RECIPE, read_metrics, refuse_existing, whole_folder

EXACT, ROUNDED = 1e-5, 2e-2
"""The largest difference (its norm over the norm) allowed between an export's logits and the run's, with the
run's own weights and with weights rounded from another type."""


def export(path: Path, out: Path, dtype: str = "auto") -> Path:
    """Write the weights of a checkpoint, or of a run's last whole one, as a plain model folder.

    Raises:
        UserError: no whole checkpoint; `out` exists; an unknown type; a full disk. Nothing is left behind.
    """
    refuse_existing(out, "choose another folder")
    checkpoint = find_checkpoint(path)
    recipe = load_recipe(str(checkpoint.parent / RECIPE))
    kind = _dtype(dtype, checkpoint)
    console = Console(stderr=True)
    console.print(f"gathering the weights of {checkpoint}")
    weights = consolidate(checkpoint)
    with whole_folder(out) as draft:
        _write(draft, checkpoint, recipe, weights, kind)
        difference = _compare(draft, checkpoint)
        limit = EXACT if kind is _trained_in(checkpoint) else ROUNDED
        if not difference <= limit:
            raise RuntimeError(
                f"the export's logits differ from the run's by {difference:.1e}, which is more than "
                f"{limit:.0e}: nothing was written to {out}"
            )
    console.print(f"wrote {out}; its logits differ from the run's by {difference:.1e}")
    return out


def _dtype(name: str, checkpoint: Path) -> torch.dtype:
    """The type asked for; `auto` is the one that the run computed in."""
    if name not in Precision.__members__:
        raise UserError(f"--dtype is {name!r}, allowed are {', '.join(Precision.__members__)}")
    return _trained_in(checkpoint) if name == "auto" else getattr(torch, name)


def _trained_in(checkpoint: Path) -> torch.dtype:
    trained: torch.dtype = AutoConfig.from_pretrained(checkpoint).dtype
    return trained


def _write(
    draft: Path, checkpoint: Path, recipe: Recipe, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    config.block_attention = {
        "version": 1,
        "position_scheme": "reencoded",
        "sink_tokens": 0,
        "local_sees_first": False,
        "documents_in": recipe.data.prompt.documents_in.value,
        "order": recipe.data.order.value,
        "prompt": {
            name: getattr(recipe.data.prompt, name) for name in ("instruction", "document", "question")
        },
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tied = set(model.all_tied_weights_keys)
    model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True, strict=not tied)
    model.tie_weights()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise RuntimeError(f"the checkpoint holds no weights for {', '.join(missing[:3])}")
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    model.save_pretrained(draft)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(draft)
    card = model_card(
        base=recipe.model.path,
        version=__version__,
        step=read_facts(checkpoint)["step"],
        recipe=(checkpoint.parent / RECIPE).read_text(encoding="utf-8"),
        manifest=json.loads((checkpoint.parent / DATA).read_text(encoding="utf-8")),
        metrics=read_metrics(checkpoint.parent),
    )
    (draft / "README.md").write_text(card, encoding="utf-8")


@torch.no_grad()
def _compare(draft: Path, checkpoint: Path) -> float:
    """The relative difference of the logits of the folder, opened by plain transformers, from the run's.

    Both are computed in float32 from weights of whatever type.
    """
    ids, expected = read_probe(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return float((logits - expected).norm() / expected.norm())
