"""`blockft inspect`: show an example of a prepared folder, its mask, and the folder's statistics."""

import json
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from blockft.attention.layout import Layout
from blockft.attention.mask import example_mask
from blockft.console import PlainConsole
from blockft.data.encoder import IGNORE_INDEX, Example
from blockft.data.prepared import PreparedData, load_prepared
from blockft.errors import UserError
from blockft.folder_lock import reading_folder
from blockft.model.load import load_tokenizer
from blockft.outputs import check_writable, plain_label, save_figure, write_atomic
from blockft.printable import print_text, printable
from blockft.units import format_count

ACTION = "blockft inspect"
"""Name of this command in the message for another process that wants to write the folder."""

NUM_SAMPLES = 8
"""Number of examples of the page."""

BLOCK_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")
"""Terminal colours of consecutive blocks."""

LOCAL_COLOUR, FINAL_COLOUR, COPY_COLOUR = "tab:blue", "tab:orange", "tab:green"
"""Colours of the mask picture: pairs whose query is in a local block or in a final block, and pairs with a
copy of the first block."""

COPY_NAME = "copy of block 1"
"""Name of the copies of the first block in the mask picture."""

MAX_NAMED_BLOCKS = 40
"""With more blocks their names would overlap in the picture; only every n-th block is named."""


def inspect(
    folder: Path,
    index: int | None = None,
    as_json: bool = False,
    png: Path | None = None,
    html: Path | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
) -> None:
    """Print an example in colour or as JSON, draw its mask, or write a page with statistics and samples.

    In colour each block has its own colour, final blocks are bold and labels are underlined; the statistics
    of the folder follow.

    Args:
        index: the example that is shown; None is the first one. The page shows it before the others.
        html: write the page to this file, and print no example in colour.
        num_samples: number of examples of the page, chosen at random by `seed` from all sources; None is
            `NUM_SAMPLES`. The default seed is 0.

    Raises:
        UserError: `folder` is not a prepared folder; it has no example `index`; a file cannot be written;
            options contradict each other; another process writes the folder.
    """
    if html is None and (num_samples is not None or seed is not None):
        raise UserError("--num-samples and --seed choose the examples of a page: add --html FILE")
    if html is not None and png is not None and os.path.realpath(html) == os.path.realpath(png):
        raise UserError(f"--html and --png name the same file {html}: name two files")
    for path in (png, html):
        if path is not None:
            _check_outside(path, folder)
    if html is not None:
        _check_page_path(html)
    with reading_folder(folder, ACTION):
        _inspect(folder, index, as_json, png, html, num_samples, seed)


def _inspect(
    folder: Path,
    index: int | None,
    as_json: bool,
    png: Path | None,
    html: Path | None,
    num_samples: int | None,
    seed: int | None,
) -> None:
    """Show an example of a folder that no other process writes."""
    prepared = load_prepared(folder, ACTION)
    if index is not None and not 0 <= index < len(prepared.examples):
        raise UserError(
            f"{folder} has no example {index}: its examples are 0 to {len(prepared.examples) - 1}"
        )
    model = prepared.manifest["model"]
    tokenizer = load_tokenizer(model["path"], model["revision"])
    example, has_copies = prepared.examples[index or 0], _has_copies(prepared)
    if png is not None:
        save_figure(draw_mask(example, local_sees_first=has_copies), png)
    if html is not None:
        num_samples = NUM_SAMPLES if num_samples is None else num_samples
        _write_page(html, prepared, tokenizer, index, num_samples, seed or 0)
    if as_json:
        print_text(json.dumps(_describe(example, tokenizer, has_copies), ensure_ascii=False))
    elif html is None:
        console = PlainConsole()
        console.print(_coloured_text(example, tokenizer, has_copies), soft_wrap=True)
        console.print()
        console.print(_statistics_table(prepared.manifest))


def _has_copies(prepared: PreparedData) -> bool:
    """Return whether rows of the examples in block mode hold copies of the first block, see `Layout`."""
    return bool(prepared.manifest["options"]["local_sees_first"])


def _check_outside(path: Path, folder: Path) -> None:
    """Refuse to write into a prepared folder, which can hold no other files."""
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path} lies inside {folder}, which can hold no other files: write it elsewhere")


def _check_page_path(html: Path) -> None:
    """Check that the page can be written, and that it replaces nothing but an earlier page.

    Raises:
        UserError: it does not, or the file cannot be written.
    """
    check_writable(html)
    if html.is_file():
        with html.open("rb") as file:
            start = file.read(64)
        if start.strip() and not start.lstrip().lower().startswith(b"<!doctype html"):
            raise UserError(f"{html} exists and is not an HTML page: choose another name for the page")


def _write_page(
    html: Path,
    prepared: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    index: int | None,
    num_samples: int,
    seed: int,
) -> None:
    """Write the page of a prepared folder, atomically."""
    from blockft.page.example_view import view_example
    from blockft.page.render import build_page, render_page

    num_chosen = num_samples - (index is not None)
    chosen = choose_examples(prepared.examples.columns.sources, num_chosen, seed, leave_out=index)
    indices = [*([] if index is None else [index]), *chosen]
    paths = [source["path"] for source in prepared.manifest["sources"]]
    views = [
        view_example(
            prepared.examples[i],
            prepared.read_samples(i),
            tokenizer,
            index=i,
            source=paths[prepared.examples.columns.sources[i]],
            local_sees_first=_has_copies(prepared),
        )
        for i in indices
    ]
    parts = [f"Example {index}"] if index is not None else []
    if chosen:
        parts.append(f"{format_count(len(chosen), 'example')} chosen at random from all sources, seed {seed}")
    choice = f"{', and '.join(parts) or 'No example is shown'}."
    write_atomic(html, render_page(build_page(prepared, views, name=str(prepared.folder), choice=choice)))


def choose_examples(
    sources: NDArray[np.int64], num_examples: int, seed: int, leave_out: int | None = None
) -> list[int]:
    """Return the indices of random examples, one of each source in turn, in the order of the folder.

    sources: the index of the source of each example.
    """
    rng = np.random.default_rng(seed)
    candidates = np.flatnonzero(np.arange(len(sources)) != leave_out)
    order = rng.permutation(candidates)
    # the place of each example among those of its source
    turns = np.empty(len(order), np.int64)
    by_source = np.argsort(sources[order], kind="stable")
    starts = np.unique(sources[order][by_source], return_index=True)[1]
    lengths = np.diff([*starts, len(order)])
    turns[by_source] = np.arange(len(order)) - np.repeat(starts, lengths)
    chosen = order[np.argsort(turns, kind="stable")][: max(0, num_examples)]
    return sorted(int(i) for i in chosen)


def draw_mask(example: Example, *, local_sees_first: bool = False) -> Any:
    """Return a figure of the example's mask: which query token (row) attends to which key token (column).

    Lines separate the blocks, and their names stand at both axes. With `local_sees_first` the tokens are
    those of a row, with copies of the first block.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layout = example.layout_in_mode("block", local_sees_first=local_sees_first)
    lengths, names = _name_parts(layout)
    bounds = [0, *accumulate(lengths)]
    allowed = example_mask(layout.block_lengths, layout.num_final, local_sees_first=local_sees_first)
    mask = np.asarray(allowed, dtype=int)
    # 0: no attention, 1: query in a local block, 2: in a final block, 3: query or key in a copy
    mask[bounds[-1 - example.num_final] :] *= 2
    is_copy = np.repeat(np.array(names) == COPY_NAME, lengths)
    mask[(is_copy[:, None] | is_copy) & (mask > 0)] = 3
    figure = Figure(figsize=(7.5, 7.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        mask,
        cmap=ListedColormap(["white", LOCAL_COLOUR, FINAL_COLOUR, COPY_COLOUR]),
        vmin=0,
        vmax=3,
        interpolation="nearest",
        extent=(0, bounds[-1], bounds[-1], 0),
    )
    line_width = 0.8 if len(names) <= MAX_NAMED_BLOCKS else 0.2
    for bound in bounds[1:-1]:
        axes.axhline(bound, color="lightgrey", linewidth=line_width)
        axes.axvline(bound, color="lightgrey", linewidth=line_width)
    middles = [(start + end) / 2 for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    step = 1 + len(names) // MAX_NAMED_BLOCKS
    # count back from the end, so that the final block is always named
    shown = range(len(names) - 1, -1, -step)
    ticks, labels = [middles[i] for i in shown], [names[i] for i in shown]
    axes.set_xticks(ticks, labels, rotation=90, fontsize=8)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.tick_params(length=0)
    size, *copies = _describe_size(example, layout).split("; ")
    title = "\n".join([plain_label(f"{example.sample_ids[0]}: {size}"), *copies])
    axes.set(xlabel="key tokens", ylabel="query tokens", title=title)
    if example.num_final == 1:
        final_label = "the final block attends to all blocks"
    else:
        final_label = "a final block attends to all local blocks and to itself"
    legend = [Patch(color=FINAL_COLOUR, label=final_label)]
    if layout.num_first_copies:
        legend.insert(0, Patch(color=COPY_COLOUR, label="a copy of block 1, seen by the block after it"))
    if len(names) > example.num_final:
        legend.insert(0, Patch(color=LOCAL_COLOUR, label="a block attends to itself"))
    num_columns = len(legend) if len(legend) < 3 else 1
    figure.legend(handles=legend, loc="outside lower center", ncols=num_columns, frameon=False)
    return figure


def _name_parts(layout: Layout) -> tuple[list[int], list[str]]:
    """Return the lengths and the names of the blocks of a row, and of the copies between them."""
    lengths, names = [], []
    block_names = _block_names(len(layout.block_lengths), layout.num_final)
    for index, (length, name) in enumerate(zip(layout.block_lengths, block_names, strict=True)):
        if layout.has_copy(index):
            lengths.append(layout.block_lengths[0])
            names.append(COPY_NAME)
        lengths.append(length)
        names.append(name)
    return lengths, names


def _describe_size(example: Example, layout: Layout) -> str:
    """Return the number of tokens and blocks, and what copies add in block mode."""
    size = f"{format_count(len(example), 'token')} in {format_count(len(layout.block_lengths), 'block')}"
    if not layout.num_first_copies:
        return size
    copies = format_count(layout.num_first_copies, "copy of block 1", "copies of block 1")
    return f"{size}; {copies} add {format_count(example.copy_len, 'token')} to a row"


def _block_names(num_blocks: int, num_final: int) -> list[str]:
    names = [f"block {i}" for i in range(1, num_blocks - num_final + 1)]
    if num_final == 1:
        return [*names, "final block"]
    return [*names, *(f"final block {i}" for i in range(1, num_final + 1))]


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _describe(example: Example, tokenizer: PreTrainedTokenizerBase, local_sees_first: bool) -> dict[str, Any]:
    layout = example.layout_in_mode("block", local_sees_first=local_sees_first)
    return {
        "id": example.sample_ids[0] if len(example.sample_ids) == 1 else list(example.sample_ids),
        "mode": "block" if example.has_local_blocks else "full",
        "blocks": [_decode(block, tokenizer) for block in example.blocks],
        "block_lengths": list(example.block_lengths),
        "num_final": example.num_final,
        "num_first_copies": layout.num_first_copies,
        "num_row_tokens": layout.num_row_tokens,
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
    }


def _coloured_text(example: Example, tokenizer: PreTrainedTokenizerBase, local_sees_first: bool) -> Text:
    num_blocks = len(example.block_lengths)
    layout = example.layout_in_mode("block", local_sees_first=local_sees_first)
    size = _describe_size(example, layout)
    text = Text(printable(f"{', '.join(example.sample_ids)}: {size}\n\n"))
    names = _block_names(num_blocks, example.num_final)
    is_label = np.split(example.labels != IGNORE_INDEX, np.cumsum(example.block_lengths)[:-1])
    for i, (block, block_is_label) in enumerate(zip(example.blocks, is_label, strict=True)):
        is_final = i >= num_blocks - example.num_final
        style = Style(color=BLOCK_COLOURS[i % len(BLOCK_COLOURS)], bold=is_final)
        after = " after a copy of block 1" if layout.has_copy(i) else ""
        text.append(f"[{names[i]}: {format_count(len(block), 'token')}{after}]", Style(dim=True))
        # the labels of a block are its last tokens
        labels_start = len(block) - int(block_is_label.sum())
        text.append(printable(_decode(block[:labels_start], tokenizer)), style)
        text.append(printable(_decode(block[labels_start:], tokenizer)), style + Style(underline=True))
    return text


def _statistics_table(manifest: dict[str, Any]) -> Table:
    table = Table(Column(overflow="fold"), show_header=False, box=None)
    for name in ("num_samples", "num_examples", "num_tokens", "num_labels"):
        table.add_row(name.removeprefix("num_"), f"{manifest[name]:,}")
    histograms = {
        "blocks_per_example": ("examples of", "block"),
        "tokens_per_example": ("examples of up to", "token"),
    }
    for name, (label, noun) in histograms.items():
        for number, count in manifest[name].items():
            table.add_row(f"{label} {format_count(int(number), noun)}", f"{count:,}")
    for source in manifest["sources"]:
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in source["dropped"].items()) or "none"
        counts = f"{source['read']:,} read, {source['kept']:,} kept, dropped: {dropped}"
        epoch = f"{format_count(source['epoch_examples'], 'example')} per epoch"
        table.add_row(source["path"], f"{counts}; {epoch}")
    return table
