"""The last output of `blockft prepare`: what the prepared folder holds, source by source."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from blockft.config.settings import Recipe
from blockft.console import PlainConsole
from blockft.data.advice import RowFill, list_item_lengths, list_warnings
from blockft.data.mixture import Mixture
from blockft.data.packing import plan_rows
from blockft.data.prepared import load_prepared
from blockft.errors import warn
from blockft.inputs import shorten_paths
from blockft.stages.mixture_settings import read_mixture
from blockft.units import format_count


def print_summary(recipe: Recipe) -> None:
    """Print what the recipe's prepared folder holds: counts per source, and the rows of an epoch.

    Warnings say what to change if the rows have much padding or many records were dropped.

    Raises:
        UserError: the folder is missing or incomplete, or another process writes it.
    """
    data = recipe.data
    prepared = load_prepared(Path(data.output_dir), "blockft prepare")
    mixture = read_mixture(recipe, prepared.manifest)
    columns = prepared.examples.columns
    item_lengths, num_copied = list_item_lengths(
        columns, mixture, data.modes, recipe.train.seed, local_sees_first=data.local_sees_first
    )
    rows = plan_rows(item_lengths, data.row_len, recipe.train.seed, epoch=0)
    batch_rows = recipe.train.batch_rows
    num_padded = len(rows.complete_last_batch(batch_rows))
    padding = (
        f", padded to {num_padded:,} (train.batch_rows is {batch_rows})" if num_padded > len(rows) else ""
    )
    fill = RowFill.of_rows(rows, item_lengths, data.row_len)
    share = num_copied / max(1, int(item_lengths.sum()))
    copies = f" ({share:.1%} of the tokens are copies of first blocks)" if num_copied else ""
    num_examples, num_split = len(columns.lengths), int(columns.has_local_blocks.sum())
    console = PlainConsole()
    sources = prepared.manifest["sources"]
    names = shorten_paths([source["path"] for source in sources])
    console.print(_table_of_counts(names, sources))
    for name, source in zip(names, sources, strict=True):
        if source["dropped"]:
            console.print(f" dropped from {name}: {_format_dropped(source['dropped'])}", soft_wrap=True)
    if not mixture.is_default:
        console.print()
        console.print(_table_of_mixture(names, sources, mixture))
    console.print(
        f"{data.output_dir}: {format_count(num_examples, 'example')}, {num_split:,} of them "
        f"split into blocks; an epoch has {format_count(len(rows), 'row')} of {data.row_len:,} tokens, "
        f"{fill.fill:.1%} filled{copies}{padding}",
        soft_wrap=True,
    )
    for warning in list_warnings(prepared.manifest, item_lengths, fill):
        warn(warning)


def _table_of_counts(names: Sequence[str], sources: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("read", "samples", "kept", "dropped", "examples", "tokens")
    for name, source in zip(names, sources, strict=True):
        numbers = [source[key] for key in ("read", "samples", "kept")]
        numbers += [sum(source["dropped"].values()), source["examples"], source["tokens"]]
        table.add_row(name, *(f"{number:,}" for number in numbers))
    return table


def _table_of_mixture(names: Sequence[str], sources: Sequence[Mapping[str, Any]], mixture: Mixture) -> Table:
    table = _table("weight", "examples", "per epoch", "tokens per epoch", "share")
    num_tokens = sum(source["epoch_tokens"] for source in sources)
    for name, source, weight in zip(names, sources, mixture.weights, strict=True):
        numbers = (source[key] for key in ("examples", "epoch_examples", "epoch_tokens"))
        share = f"{source['epoch_tokens'] / max(1, num_tokens):.0%}"
        table.add_row(name, f"{weight:g}", *(f"{number:,}" for number in numbers), share)
    return table


def _table(*names: str) -> Table:
    """Return an empty table with a column of sources and columns of numbers."""
    numbers = (Column(name, justify="right", no_wrap=True) for name in names)
    return Table(Column("source", overflow="fold"), *numbers, box=None)


def _format_dropped(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())
