"""Render the page of a prepared folder: what it holds, what was dropped, distributions, samples."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from blockft.data.advice import (
    MAX_DROPPED,
    Drop,
    RowFill,
    list_drops,
    list_item_lengths,
    list_leak_warnings,
    list_warnings,
    try_row_lengths,
)
from blockft.data.mixture import Mixture
from blockft.data.packing import plan_rows
from blockft.data.prepared import PreparedData
from blockft.inputs import shorten_paths
from blockft.page.example_view import ExampleView
from blockft.page.histogram import Histogram, build_histogram
from blockft.page.visible_text import split_text
from blockft.printable import printable
from blockft.units import format_count
from blockft.version import __version__

TEMPLATE, STYLE = "inspect.html.jinja", "inspect.css"

_SHOWN_OPTIONS = (
    "row_len",
    "modes",
    "local_sees_first",
    "too_long",
    "num_documents",
    "order",
    "shared_context",
    "max_questions_per_context",
    "num_copies",
    "on_bad_record",
    "seed",
)
"""Settings of `data` that the page shows in its first part; all of them follow in its last part."""


@dataclass(frozen=True, kw_only=True)
class SourceView:
    """What the page shows of a source.

    name: the end of its path.
    entry: its entry of the manifest.
    num_tokens: the tokens of its examples, each counted once.
    split_share: the share of its examples that split into blocks.
    token_share: its share of the tokens of an epoch.
    """

    name: str
    entry: Mapping[str, Any]
    weight: str
    num_tokens: int
    split_share: float
    token_share: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A histogram with its title; `noun` is what the numbers count, `unit` what each of them belongs to."""

    title: str
    noun: str
    unit: str
    histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that the page shows."""

    name: str
    manifest: Mapping[str, Any]
    sources: list[SourceView]
    drops: list[Drop]
    warnings: list[str]
    mixture: Mixture
    charts: list[Chart]
    fill: RowFill
    other_fills: list[RowFill]
    num_items: int
    num_copied: int
    copied_share: float
    num_split: int
    examples: Sequence[ExampleView]
    choice: str

    @cached_property
    def options(self) -> dict[str, str]:
        """The most important settings as texts; settings without a value are left out."""
        options = self.manifest["options"]
        shown = {name: options[name] for name in _SHOWN_OPTIONS if options.get(name) not in (None, False)}
        return {f"data.{name}": _format_setting(value) for name, value in shown.items()}

    @cached_property
    def wording(self) -> dict[str, str]:
        """The wording of RAG prompts, if a source has questions."""
        has_questions = any(source.entry["has_questions"] for source in self.sources)
        prompt = self.manifest["options"]["prompt"]
        return {name: str(text) for name, text in prompt.items()} if has_questions else {}

    @property
    def all_options(self) -> str:
        """All settings of `data` that decide what the folder holds, as YAML."""
        return yaml.safe_dump(
            {"data": self.manifest["options"]}, allow_unicode=True, sort_keys=False, width=100
        )


def build_page(prepared: PreparedData, examples: Sequence[ExampleView], *, name: str, choice: str) -> Page:
    """Return the content of the page.

    name: the folder as the user gave it.
    choice: a sentence that says which examples are shown.
    """
    manifest, columns = prepared.manifest, prepared.examples.columns
    options = manifest["options"]
    mixture = Mixture.of_options(options)
    lengths, num_copied = list_item_lengths(
        columns, mixture, options["modes"], seed=0, local_sees_first=options["local_sees_first"]
    )
    row_len = options["row_len"]
    rows = plan_rows(lengths, row_len, seed=0, epoch=0)
    fill = RowFill.of_rows(rows, lengths, row_len)
    return Page(
        name=name,
        manifest=manifest,
        sources=_view_sources(prepared),
        drops=sorted(list_drops(manifest), key=lambda drop: not drop.is_large),
        warnings=[*list_warnings(manifest, lengths, fill), *list_leak_warnings(manifest["leaks"])],
        mixture=mixture,
        charts=_build_charts(prepared, rows.count_tokens(lengths)),
        fill=fill,
        other_fills=sorted(_choose_fills(lengths, fill), key=lambda other: other.row_len),
        num_items=len(lengths),
        num_copied=num_copied,
        copied_share=num_copied / max(1, int(lengths.sum())),
        num_split=int(columns.has_local_blocks.sum()),
        examples=examples,
        choice=choice,
    )


def _view_sources(prepared: PreparedData) -> list[SourceView]:
    columns, manifest = prepared.examples.columns, prepared.manifest
    num_sources = len(manifest["sources"])
    num_tokens = np.bincount(columns.sources, columns.lengths, minlength=num_sources)
    num_split = np.bincount(columns.sources, columns.has_local_blocks, minlength=num_sources)
    names = shorten_paths([entry["path"] for entry in manifest["sources"]])
    epoch_tokens = sum(entry["epoch_tokens"] for entry in manifest["sources"])
    return [
        SourceView(
            name=names[i],
            entry=entry,
            weight=f"{options['weight']:g}",
            num_tokens=int(num_tokens[i]),
            split_share=int(num_split[i]) / max(1, entry["examples"]),
            token_share=entry["epoch_tokens"] / max(1, epoch_tokens),
        )
        for i, (entry, options) in enumerate(
            zip(manifest["sources"], manifest["options"]["sources"], strict=True)
        )
    ]


def _build_charts(prepared: PreparedData, row_tokens: NDArray[np.int64]) -> list[Chart]:
    columns = prepared.examples.columns
    layouts = prepared.examples.layouts()
    charts = (
        ("Length of an example", "token", "example", columns.lengths),
        ("Blocks of an example", "block", "example", columns.num_blocks),
        ("Length of a local block", "token", "local block", layouts.local_lengths),
        ("Length of a final block", "token", "final block", layouts.final_lengths),
        ("Labels of an example", "label token", "example", columns.num_labels),
        ("Tokens of a row, without padding", "token", "row", row_tokens),
    )
    return [
        Chart(title=title, noun=noun, unit=unit, histogram=build_histogram(numbers))
        for title, noun, unit, numbers in charts
        if len(numbers)
    ]


def _choose_fills(lengths: NDArray[np.int64], fill: RowFill) -> list[RowFill]:
    """Return the fill of the rows, and that of some other row lengths to compare with."""
    tried = try_row_lengths(lengths, fill.row_len)
    shorter = [other for other in tried if other.row_len < fill.row_len][-2:]
    longer = [other for other in tried if other.row_len in (fill.row_len * n // 2 for n in (3, 4, 8))]
    return [*shorter, fill, *longer]


def render_page(page: Page) -> str:
    """Return the page as HTML that needs no other file and runs no script.

    Text of users is escaped. Its control characters are written as in JSON, or as code points in samples.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_make_printable,
    )
    environment.filters |= {
        "count": format_count,
        "percent": _format_percent,
        "visible": split_text,
        "rounded": lambda number: f"{number:.2f}",
        "path_parts": lambda path: re.split(r"(?<=[/_])(?=[^/_])", path),
    }
    style = (folder / STYLE).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(TEMPLATE).render(
        page=page, style=Markup(style), style_digest=digest, version=__version__, max_dropped=MAX_DROPPED
    )


def _make_printable(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _format_percent(share: float) -> str:
    """Return a share in percent, with a decimal below 10 % and above 90 %."""
    return f"{share:.0%}" if 0.1 <= share <= 0.9 else f"{share:.1%}".replace(".0%", "%")


def _format_setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_format_setting, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).lower() if isinstance(value, bool) else str(value)
