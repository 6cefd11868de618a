"""`blockft prepare`: read the sources, build samples and examples, and write the prepared folder."""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.table import Column, Table

from blockft.config.choices import BadRecordPolicy, TooLongPolicy
from blockft.config.settings import DataSettings, Recipe, Source
from blockft.console import PlainConsole
from blockft.data.advice import RowFill, list_warnings
from blockft.data.encoder import Encoder, Example
from blockft.data.fit import EncodedSample, encode_samples
from blockft.data.packing import list_example_modes, plan_rows
from blockft.data.parallel import map_in_order
from blockft.data.prepared import (
    SHARD_SAMPLES,
    Examples,
    ShardBatch,
    build_shard_batch,
    find_foreign_file,
    finish_folder,
    load_prepared,
    write_shard,
)
from blockft.data.sample import Sample
from blockft.data.shared_context import merge_shared_contexts
from blockft.data.sources import SOURCE_FORMATS, RecordCounts
from blockft.data.split import SPLIT_FORMATS, split_sample
from blockft.data.statistics import ExampleStatistics, SourceStatistics, histogram
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.digest import list_files
from blockft.errors import UserError, check_type, warn
from blockft.model.load import load_tokenizer
from blockft.outputs import LockedFolder, atomic_folder, check_absent
from blockft.progress import progress
from blockft.stages.leak_check import LeakCheck
from blockft.stages.mixture_settings import describe_mixture, mixture_of, read_mixture
from blockft.stages.output_folder import lock_output
from blockft.stages.source_settings import (
    check_copies,
    check_wording,
    read_source,
    settings_without_effect,
    unknown_fields_warning,
)
from blockft.stages.teacher_answers import ask_teacher
from blockft.stages.teacher_settings import check_teacher, teacher_options
from blockft.units import format_count

T = TypeVar("T")

BATCH_EXAMPLES = 1_024
"""Examples in an Arrow record batch."""

TASK_SAMPLES = 64
"""Samples that a worker encodes at a time."""

NOT_IN_MANIFEST = ("output_dir", "num_workers", "positions")
"""Settings of `data` that change nothing in the prepared folder, so that its bytes do not depend on them."""


def prepare(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Read `data.sources`, tokenize them and write the prepared folder `data.output_dir`.

    The folder appears only when it is complete. The time of the run is appended to the file FOLDER.log beside
    it. A source without a single kept sample gives a warning.

    overwrite: replace a prepared folder that exists.

    Returns:
        The path of the prepared folder; `load_prepared` reads it.

    Raises:
        UserError: the folder exists, or another process reads or writes it; a source or the tokenizer cannot
            be read; a record is bad and `data.on_bad_record` is error; no example is left.
    """
    check_type(recipe, Recipe, "recipe", "load_recipe reads one from a YAML file")
    inputs = {"model.path": recipe.model.path}
    inputs |= {f"data.sources.{index}.path": source.path for index, source in enumerate(recipe.data.sources)}
    run = {"train.output_dir": recipe.train.output_dir}
    with lock_output(Path(recipe.data.output_dir), "blockft prepare", inputs, other_outputs=run) as out:
        return _prepare(recipe, out, overwrite)


def _prepare(recipe: Recipe, out: LockedFolder, overwrite: bool) -> Path:
    start, data = time.monotonic(), recipe.data
    _check_output(out.name, overwrite)
    check_wording(data.prompt)
    check_copies(data)
    check_teacher(data)
    for warning in settings_without_effect(data):
        warn(warning)
    # workers are forked, which the threads of the tokenizer would not survive
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    counts = [SourceStatistics() for _ in data.sources]
    leak_check = LeakCheck(recipe)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision, recipe.model.chat_template)
    encoder = Encoder(tokenizer)
    responses = ask_teacher(recipe, lambda index, wording: _read_copies(index, wording, SourceStatistics()))
    sources = [
        responses.respond_all(index, _read_copies(index, data, count, leak_check), count)
        for index, count in enumerate(counts)
    ]
    statistics = ExampleStatistics()
    with atomic_folder(out) as folder:
        encoded_samples = _encode(encoder, data, sources)
        num_shards = [0] * len(sources)
        for source, encoded in groupby(encoded_samples, itemgetter(0)):
            batches = _build_batches((sample for _, sample in encoded), counts[source], data, statistics)
            for shard in _chunks(batches, SHARD_SAMPLES // BATCH_EXAMPLES):
                write_shard(folder, sum(num_shards), shard)
                num_shards[source] += 1
        if not statistics.lengths:
            raise UserError(f"no example to train on: {_nothing_kept_message(data, data.sources, counts)}")
        manifest = _manifest(recipe, tokenizer_fingerprint(tokenizer), counts, statistics)
        manifest |= leak_check.to_record()
        examples = Examples(folder, num_shards)
        counts_by_source = describe_mixture(mixture_of(data), examples.columns)
        for index, entry in enumerate(manifest["sources"]):
            entry |= {"shards": num_shards[index], **counts_by_source[index], **responses.describe(index)}
        finish_folder(folder, manifest)
        _check_output(out.name, overwrite)  # files may have appeared in a folder that was empty
    for source, count in zip(data.sources, counts, strict=True):
        if count.unknown_fields:
            warn(unknown_fields_warning(source, count))
        if not count.kept:
            warn(_nothing_kept_message(data, [source], [count]))
    leak_check.warn()
    _append_to_log(out.name, time.monotonic() - start, data.num_workers, responses.num_asked)
    return out.name


def print_summary(recipe: Recipe) -> None:
    """Print what the recipe's prepared folder holds: counts per source, and the rows of an epoch.

    Raises:
        UserError: the folder is missing or incomplete.
    """
    data = recipe.data
    prepared = load_prepared(Path(data.output_dir))
    mixture = read_mixture(recipe, prepared.manifest)
    epoch_names = () if mixture.is_default else ("examples per epoch", "tokens per epoch")
    names = ("read", "samples", "kept", "dropped", "tokens", *epoch_names)
    table = Table(
        Column("source", overflow="fold"), *(Column(name, justify="right") for name in names), box=None
    )
    for source in prepared.manifest["sources"]:
        table.add_row(
            source["path"],
            f"{source['read']:,}",
            f"{source['samples']:,}",
            f"{source['kept']:,}",
            _format_dropped(source["dropped"]) or "0",
            f"{source['tokens']:,}",
            *(f"{source[name]:,}" for name in ("epoch_examples", "epoch_tokens") if epoch_names),
        )
    columns = prepared.examples.columns
    drawn = mixture.draw(np.arange(len(columns.lengths)), columns.sources, recipe.train.seed, epoch=0)
    items, _ = list_example_modes(columns.has_local_blocks[drawn], data.modes)
    item_lengths = columns.lengths[drawn[items]]
    rows = plan_rows(item_lengths, data.row_len, recipe.train.seed, epoch=0)
    batch_rows = recipe.train.batch_rows
    num_padded = len(rows.complete_last_batch(batch_rows))
    padding = (
        f", padded to {num_padded:,} (train.batch_rows is {batch_rows})" if num_padded > len(rows) else ""
    )
    fill = RowFill.of_rows(rows, item_lengths, data.row_len)
    num_examples, num_split = len(columns.lengths), int(columns.has_local_blocks.sum())
    console = PlainConsole()
    console.print(table)
    console.print(
        f"{data.output_dir}: {format_count(num_examples, 'example')}, {num_split:,} of them "
        f"split into blocks; an epoch has {format_count(len(rows), 'row')} of {data.row_len:,} tokens, "
        f"{fill.fill:.1%} filled{padding}",
        soft_wrap=True,
    )
    for warning in list_warnings(prepared.manifest, item_lengths, fill):
        warn(warning)


def _check_output(out: Path, overwrite: bool) -> None:
    """Check that a prepared folder may be written to `out`, which loses no file that others wrote.

    Raises:
        UserError: `out` holds a file that `prepare` does not write, or any file if not `overwrite`.
    """
    if not os.path.lexists(out):
        return
    foreign = find_foreign_file(out) if out.is_dir() else None
    if foreign or not out.is_dir():
        found = f" (it holds {foreign})" if foreign else ""
        raise UserError(
            f"{out} exists and is not a prepared folder{found}: set data.output_dir to another folder"
        )
    if list_files(out) and not overwrite:
        check_absent(out, "set data.output_dir to another folder, or add --overwrite")


def _read_copies(
    index: int, data: DataSettings, count: SourceStatistics, leak_check: LeakCheck | None = None
) -> Iterator[Sample]:
    """Read the samples of a source `data.num_copies` times, each time with another seed."""
    counts = [RecordCounts() for _ in range(data.num_copies)]
    copies = [
        read_source(data.sources[index], data.model_copy(update={"seed": data.seed + number}), copy_count)
        for number, copy_count in enumerate(counts)
    ]

    def samples() -> Iterator[Sample]:
        for number, (copy, copy_count) in enumerate(zip(copies, counts, strict=True)):
            yield from leak_check.watch(index, copy, is_copy=number > 0) if leak_check else copy
            count.merge(copy_count)

    return samples()


def _encode(
    encoder: Encoder, data: DataSettings, sources: Sequence[Iterator[Sample]]
) -> Iterator[tuple[int, EncodedSample]]:
    """Encode the samples of all sources in order; yields (index of the source, encoded sample)."""
    encode = partial(_encode_task, encoder=encoder, data=data)
    with progress("encode", unit="sample") as advance:
        for source, encoded in map_in_order(encode, _tasks(sources), data.num_workers):
            yield from ((source, sample) for sample in encoded)
            advance(len(encoded))


def _tasks(sources: Sequence[Iterator[Sample]]) -> Iterator[tuple[int, list[Sample]]]:
    for index, samples in enumerate(sources):
        for task in _chunks(samples, TASK_SAMPLES):
            yield index, task


def _encode_task(
    task: tuple[int, list[Sample]], *, encoder: Encoder, data: DataSettings
) -> tuple[int, list[EncodedSample]]:
    source, samples = task
    split = partial(
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
        split=split if data.sources[source].format in SPLIT_FORMATS else None,
    )


def _build_batches(
    encoded_samples: Iterator[EncodedSample],
    count: SourceStatistics,
    data: DataSettings,
    statistics: ExampleStatistics,
) -> Iterator[ShardBatch]:
    """Count the samples of a source, and yield those that are kept with their examples."""
    kept: deque[Sample] = deque()

    def keep() -> Iterator[Example]:
        for encoded in encoded_samples:
            count.add_encoded(encoded)
            if not encoded.drop_reason:
                assert encoded.example
                kept.append(encoded.sample)
                yield encoded.example

    examples = keep()
    if data.shared_context:
        examples = merge_shared_contexts(examples, data.row_len, data.max_questions_per_context)
    for batch in _chunks(examples, BATCH_EXAMPLES):
        for example in batch:
            statistics.add(example)
        num_samples = sum(len(example.sample_ids) for example in batch)
        yield build_shard_batch([kept.popleft() for _ in range(num_samples)], batch)


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _nothing_kept_message(
    data: DataSettings, sources: Sequence[Source], counts: Sequence[SourceStatistics]
) -> str:
    """Return why none of the sources has a kept sample, with the remedy if all of them are too long."""
    paths = " and ".join(source.path for source in sources)
    dropped = sum((count.dropped for count in counts), Counter[str]())
    if not dropped:
        return f"{paths} holds no samples" if len(sources) == 1 else f"{paths} hold no samples"
    reasons = ", ".join(f"{reason}: {number:,}" for reason, number in dropped.items())
    lengths = [count.shortest_dropped for count in counts if count.shortest_dropped]
    if not lengths:
        return f"every sample of {paths} was dropped ({reasons})"
    has_documents = any(SOURCE_FORMATS[source.format].parse_question for source in sources)
    return (
        f"every sample of {paths} was dropped ({reasons}; the shortest has {min(lengths):,} tokens): raise "
        f"data.row_len, which is {data.row_len:,}{', or lower data.num_documents' if has_documents else ''}"
    )


def _manifest(
    recipe: Recipe,
    tokenizer: str,
    counts: Sequence[SourceStatistics],
    statistics: ExampleStatistics,
) -> dict[str, Any]:
    options = recipe.data.model_dump(mode="json")
    for name in NOT_IN_MANIFEST:
        del options[name]
    if recipe.data.teacher:
        options["teacher"] = teacher_options(recipe.data.teacher)
    sources = zip(recipe.data.sources, counts, strict=True)
    return {
        "model": {"path": recipe.model.path, "revision": recipe.model.revision},
        "tokenizer": tokenizer,
        "options": options,
        "sources": [_describe_source(source, count) for source, count in sources],
        "num_samples": sum(count.kept for count in counts),
        "num_examples": len(statistics.lengths),
        "num_tokens": sum(statistics.lengths),
        "num_labels": statistics.num_labels,
        "blocks_per_example": histogram(statistics.num_blocks),
        # each length is rounded up to a power of two
        "tokens_per_example": histogram(1 << (length - 1).bit_length() for length in statistics.lengths),
    }


def _describe_source(source: Source, count: SourceStatistics) -> dict[str, Any]:
    return {
        "path": source.path,
        "format": source.format.value,
        "read": count.read,
        "samples": count.samples,
        "kept": count.kept,
        # samples whose template markup came with the data, where texts may become added tokens
        "templated": count.templated,
        "tokens": count.tokens,
        "dropped": dict(sorted(count.dropped.items())),
        # the first records and samples that were dropped for each reason
        "drop_examples": dict(sorted(count.drop_examples.items())),
        # tokens of the samples that are longer than a row, rounded up, with their number
        "too_long_lengths": {str(length): n for length, n in sorted(count.too_long_lengths.items())},
        # fields that the format does not know, with the number of records that have them
        "unknown_fields": dict(sorted(count.unknown_fields.items())),
        "bad_records": [*dict.fromkeys(count.bad_records + count.mismatched_samples)],
    }


def _format_dropped(dropped: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())


def _append_to_log(out: Path, seconds: float, num_workers: int, num_asked: int) -> None:
    """Append values that differ between equal runs to a log outside the folder, whose bytes are compared."""
    entry = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(out.absolute()),
        "seconds": round(seconds, 1),
        "num_workers": num_workers,
        "teacher_questions_asked": num_asked,
    }
    file = out.with_name(f"{out.name}.log")
    try:
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
    except OSError as error:
        warn(f"the prepared folder is complete, but {file} cannot be written: {error.strerror}")
