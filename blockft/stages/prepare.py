"""`blockft prepare`: text -> samples -> examples, in a folder that appears whole or not at all."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from blockft.config.choices import BadRecordPolicy, TooLongPolicy
from blockft.config.settings import DataSettings, Recipe, Source
from blockft.data.encoder import IGNORE_INDEX, Encoder, Example
from blockft.data.fit import EncodedSample, encode_samples, share_contexts
from blockft.data.packing import fill_ratio, list_example_modes, plan_rows
from blockft.data.parallel import map_in_order
from blockft.data.prepared import MANIFEST, PreparedWriter, is_incomplete
from blockft.data.sample import Sample
from blockft.data.sources import RecordCounts
from blockft.data.split import SPLIT_FORMATS, split_sample
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.errors import UserError
from blockft.evaluation.report import histogram
from blockft.model.load import load_tokenizer
from blockft.outputs import atomic_folder, check_absent
from blockft.progress import is_enabled
from blockft.stages.source_settings import check_effect, check_wording, read_source

TASK_SAMPLES = 64
"""Samples that a worker encodes at a time."""

NOT_IN_MANIFEST = ("output_dir", "num_workers", "positions")
"""Settings that do not change what is written (law 12)."""


@dataclass
class ExampleStatistics:
    """What the examples look like."""

    lengths: list[int] = field(default_factory=list)
    splits: list[bool] = field(default_factory=list)
    num_blocks: list[int] = field(default_factory=list)
    num_labels: int = 0

    def add(self, example: Example) -> None:
        self.lengths.append(len(example))
        self.splits.append(example.has_local_blocks)
        self.num_blocks.append(len(example.block_lengths))
        self.num_labels += int((example.labels != IGNORE_INDEX).sum())


@dataclass
class SourceStatistics(RecordCounts):
    """A source's tally, and what is known only once its samples are encoded."""

    templated: int = 0
    tokens: int = 0
    shortest_dropped: int | None = None
    # apart from `bad_records`: how far reading is ahead of encoding depends on the workers (law 12)
    unfit_samples: list[str] = field(default_factory=list)

    def add(self, outcome: EncodedSample) -> None:
        if not outcome.dropped:
            self.kept += 1
            self.templated += bool(outcome.sample.templated)
            self.tokens += len(outcome.example or ())
            return
        self.drop(outcome.dropped)
        if outcome.is_unfit:
            self.unfit_samples.append(f"sample {outcome.sample.id}: {outcome.dropped}")
        if outcome.example:
            self.shortest_dropped = min(len(outcome.example), self.shortest_dropped or len(outcome.example))


def prepare(recipe: Recipe, overwrite: bool = False) -> Path:
    """Write the prepared folder `data.output_dir` and print a summary.

    Raises:
        UserError: the folder exists, a source or the tokenizer is missing or unfit, no example is left.
    """
    start = time.monotonic()
    data, out = recipe.data, Path(recipe.data.output_dir)
    _check_out(out, overwrite)
    check_wording(data.prompt)
    check_effect(data)
    # workers are forked, and the tokenizer's threads would not survive that
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    counts = [SourceStatistics() for _ in data.sources]
    sources = [_read_copies(s, data, count) for s, count in zip(data.sources, counts, strict=True)]
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    encoder = Encoder(tokenizer)
    statistics = ExampleStatistics()
    with atomic_folder(out, replace=True) as draft, PreparedWriter(draft) as writer:
        kept = _write_examples(_encode(encoder, data, sources), counts, writer)
        if data.shared_context:
            kept = share_contexts(kept, data.row_len, data.max_questions_per_context)
        for example in kept:
            writer.add_example(example)
            statistics.add(example)
        if not statistics.lengths:
            raise UserError(_nothing_left(data, counts))
        writer.finish(_manifest(recipe, tokenizer_fingerprint(tokenizer), counts, statistics))
    _log(out, time.monotonic() - start, data.num_workers)
    _print_summary(out, recipe, counts, statistics)
    return out


def _read_copies(source: Source, data: DataSettings, count: SourceStatistics) -> Iterator[Sample]:
    """The samples of a source as often as there are copies, each time by another seed; see `read_source`."""
    tallies = [RecordCounts() for _ in range(data.num_copies)]
    copies = [
        read_source(source, data.model_copy(update={"seed": data.seed + number}), tally)
        for number, tally in enumerate(tallies)
    ]

    def samples() -> Iterator[Sample]:
        for copy, tally in zip(copies, tallies, strict=True):
            yield from copy
            count.merge(tally)

    return samples()


def _check_out(out: Path, overwrite: bool) -> None:
    if (out / MANIFEST).is_file():
        if not overwrite:
            check_absent(out, "set data.output_dir to another folder, or add --overwrite")
    elif out.exists() and not (out.is_dir() and is_incomplete(out)):
        raise UserError(f"{out} exists and was not written by prepare: set data.output_dir to another folder")


def _encode(
    encoder: Encoder, data: DataSettings, sources: list[Iterator[Sample]]
) -> Iterator[tuple[int, EncodedSample]]:
    """Every sample of every source, encoded: (source, outcome), in order."""
    work = partial(_encode_task, encoder=encoder, data=data)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.completed:,.0f} samples"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not is_enabled(),
        # no refresh thread: the workers are forked while the bar is shown
        auto_refresh=False,
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=None)
        for source, outcomes in map_in_order(work, _tasks(sources), data.num_workers):
            yield from ((source, outcome) for outcome in outcomes)
            progress.update(bar, advance=len(outcomes), refresh=True)


def _tasks(sources: list[Iterator[Sample]]) -> Iterator[tuple[int, list[Sample]]]:
    for index, samples in enumerate(sources):
        while task := list(islice(samples, TASK_SAMPLES)):
            yield index, task


def _encode_task(
    task: tuple[int, list[Sample]], *, encoder: Encoder, data: DataSettings
) -> tuple[int, list[EncodedSample]]:
    source, samples = task
    cut = partial(
        split_sample,
        count_tokens=encoder.count_tokens,
        max_blocks=data.splitting.max_blocks,
        min_block_tokens=data.splitting.min_block_tokens,
    )
    return source, encode_samples(
        samples,
        encoder,
        data.row_len,
        trim=data.too_long is TooLongPolicy.trim,
        skip_bad=data.on_bad_record is BadRecordPolicy.skip,
        cut=cut if data.sources[source].format in SPLIT_FORMATS else None,
    )


def _write_examples(
    outcomes: Iterator[tuple[int, EncodedSample]], counts: list[SourceStatistics], writer: PreparedWriter
) -> Iterator[Example]:
    """Count the outcomes, write the samples that stay, and pass on their examples."""
    for source, outcome in outcomes:
        counts[source].add(outcome)
        if not outcome.dropped:
            assert outcome.example
            writer.add_sample(outcome.sample)
            yield outcome.example


def _nothing_left(data: DataSettings, counts: list[SourceStatistics]) -> str:
    lengths = [count.shortest_dropped for count in counts if count.shortest_dropped]
    if lengths:
        return (
            f"data.row_len is {data.row_len}, shorter than every example: the shortest has "
            f"{min(lengths)} tokens; raise data.row_len, or lower data.num_documents"
        )
    dropped = sum((count.dropped for count in counts), Counter[str]())
    reasons = ", ".join(f"{reason}: {number}" for reason, number in dropped.items()) or "no records"
    return f"nothing to train on in {', '.join(source.path for source in data.sources)} ({reasons})"


def _manifest(
    recipe: Recipe, tokenizer: str, counts: list[SourceStatistics], statistics: ExampleStatistics
) -> dict[str, Any]:
    options = recipe.data.model_dump(mode="json")
    for name in NOT_IN_MANIFEST:
        del options[name]
    return {
        "version": 1,
        "model": {"path": recipe.model.path, "revision": recipe.model.revision},
        "tokenizer": tokenizer,
        "options": options,
        "sources": [_describe(s, c) for s, c in zip(recipe.data.sources, counts, strict=True)],
        "num_samples": sum(count.kept for count in counts),
        "num_examples": len(statistics.lengths),
        "num_tokens": sum(statistics.lengths),
        "num_labels": statistics.num_labels,
        "blocks_per_example": histogram(statistics.num_blocks),
        "tokens_per_example": histogram([1 << (length - 1).bit_length() for length in statistics.lengths]),
    }


def _describe(source: Source, count: SourceStatistics) -> dict[str, Any]:
    return {
        "path": source.path,
        "format": source.format.value,
        "read": count.read,
        "samples": count.samples,
        "kept": count.kept,
        # the markup of these came with the data (law 7)
        "templated": count.templated,
        "tokens": count.tokens,
        "dropped": dict(sorted(count.dropped.items())),
        "bad_records": [*dict.fromkeys(count.bad_records + count.unfit_samples)],
    }


def _log(out: Path, seconds: float, num_workers: int) -> None:
    """What differs from one `prepare` to the next goes beside the folder, not into it."""
    entry = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(out.absolute()),
        "seconds": round(seconds, 1),
        "num_workers": num_workers,
    }
    with out.with_name(f"{out.name}.log").open("a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")


def _print_summary(
    out: Path, recipe: Recipe, counts: list[SourceStatistics], statistics: ExampleStatistics
) -> None:
    table = Table(Column("source", overflow="fold"), box=None)
    for name in ("read", "samples", "kept", "dropped", "tokens"):
        table.add_column(name, justify="right")
    for source, count in zip(recipe.data.sources, counts, strict=True):
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in sorted(count.dropped.items()))
        table.add_row(
            source.path,
            f"{count.read:,}",
            f"{count.samples:,}",
            f"{count.kept:,}",
            dropped or "0",
            f"{count.tokens:,}",
        )
    items = list_example_modes(statistics.splits, recipe.data.modes)
    lengths = [statistics.lengths[index] for index, _ in items]
    rows = plan_rows(lengths, recipe.data.row_len, recipe.train.seed, epoch=0)
    console = Console()
    console.print(table)
    console.print(
        f"{out}: {len(statistics.lengths):,} examples, {sum(statistics.splits):,} of them split into blocks; "
        f"an epoch is {len(rows):,} rows of {recipe.data.row_len:,} tokens, "
        f"{fill_ratio(rows, lengths, recipe.data.row_len):.1%} full",
        highlight=False,
        soft_wrap=True,
    )
