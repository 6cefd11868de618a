"""`blockft inspect`: an example of a prepared folder, block by block, and the set's statistics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from blockft.attention.mask import example_mask
from blockft.data.encoder import IGNORE_INDEX, Example
from blockft.data.prepared import load_prepared
from blockft.errors import UserError
from blockft.model.load import load_tokenizer
from blockft.outputs import save_figure

COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")


def inspect(folder: Path, index: int = 0, as_json: bool = False, png: Path | None = None) -> None:
    """Print an example in colour (final blocks bold, labels underlined) or as JSON; draw its mask into `png`.

    Raises:
        UserError: no prepared folder, no such example, or the picture cannot be written.
    """
    prepared = load_prepared(folder)
    if not 0 <= index < len(prepared.examples):
        raise UserError(f"{folder} has no example {index}: it holds 0 to {len(prepared.examples) - 1}")
    model = prepared.manifest["model"]
    tokenizer = load_tokenizer(model["path"], model["revision"])
    example = prepared.examples[index]
    if png is not None:
        _draw(example, png)
    if as_json:
        print(json.dumps(_describe(example, tokenizer), ensure_ascii=False))
    else:
        console = Console()
        console.print(_colour(example, tokenizer), soft_wrap=True)
        console.print()
        console.print(_statistics(prepared.manifest))


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _describe(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "id": example.sample_ids[0] if len(example.sample_ids) == 1 else list(example.sample_ids),
        "view": "block" if example.has_local_blocks else "full",
        "blocks": [_decode(block, tokenizer) for block in example.blocks],
        "block_lengths": list(example.block_lengths),
        "num_final": example.num_final,
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
    }


def _colour(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    text = Text(
        f"{', '.join(example.sample_ids)}: {len(example):,} tokens in {len(example.block_lengths)} blocks\n\n"
    )
    first_final = len(example.block_lengths) - example.num_final
    labelled = np.split(example.labels != IGNORE_INDEX, np.cumsum(example.block_lengths)[:-1])
    for number, (block, is_label) in enumerate(zip(example.blocks, labelled, strict=True)):
        style = Style(color=COLOURS[number % len(COLOURS)], bold=number >= first_final)
        text.append(f"[{number}: {len(block)}]", Style(dim=True))
        # labels end a final block, so one cut is enough
        end = len(block) - int(is_label.sum())
        text.append(_decode(block[:end], tokenizer), style)
        text.append(_decode(block[end:], tokenizer), style + Style(underline=True))
    return text


def _statistics(manifest: dict[str, Any]) -> Table:
    table = Table(Column(overflow="fold"), show_header=False, box=None)
    for name in ("num_samples", "num_examples", "num_tokens", "num_labels"):
        table.add_row(name.removeprefix("num_"), f"{manifest[name]:,}")
    for name, label in {"blocks_per_example": "{} blocks", "tokens_per_example": "up to {} tokens"}.items():
        for number, times in manifest[name].items():
            table.add_row(label.format(number), f"{times:,}")
    for source in manifest["sources"]:
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in source["dropped"].items()) or "none"
        table.add_row(source["path"], f"{source['read']:,} read, {source['kept']:,} kept, dropped: {dropped}")
    return table


def _draw(example: Example, png: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(example_mask(example.block_lengths, example.num_final), cmap="Greys", interpolation="nearest")
    axes.set(xlabel="key token", ylabel="query token", title=f"{len(example.block_lengths)} blocks")
    save_figure(figure, png)
