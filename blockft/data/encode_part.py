"""Encode parts: the samples of a source that are kept, their examples, hashes and counts, in shards.

A worker encodes a frame of samples. Shard i of an encode part holds what is kept of shard i of the read part.
Its files have the names and the content of a shard of a prepared folder, and `NNNNN.hashes` holds the ids and
hashes of all samples that were read, for the check of leaks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from blockft.data.encoder import Encoder
from blockft.data.fit import EncodedSample, encode_samples
from blockft.data.leaks import Hashes, hash_sample, to_hashes
from blockft.data.part_cache import Part
from blockft.data.prepared import ShardBatch, examples_to_batch, sample_line, shard_files, write_shard
from blockft.data.sample import Sample
from blockft.data.sample_frames import Frame, unpack_frame
from blockft.data.shared_context import merge_shared_contexts
from blockft.data.split import split_sample
from blockft.data.statistics import ExampleStatistics, SourceStatistics

BATCH_SAMPLES = 16
"""Number of samples that are tokenized together: few, so that their texts stay in the caches of the CPU."""

Respond = Callable[[Iterable[Sample], SourceStatistics], Iterable[Sample]]
"""Gives samples the responses to learn; counts those that it drops."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How the samples of a source are encoded.

    row_len: the number of tokens that an example may take in a row.
    local_sees_first: rows hold copies of the first block, see `Layout` and `Encoder`.
    trim: a sample that is too long loses its least relevant documents; otherwise it is dropped.
    skip_bad: drop a sample that the template or the tokenizer changes, instead of raising.
    splitting: (max_blocks, min_block_tokens) for formats that mark no blocks.
    drop_unsplit: drop samples whose prompt is one block after splitting.
    shared_context: merge questions about the same documents, at most `max_questions` of them.
    question_template: the wording of questions, which the check of leaks ignores.
    """

    row_len: int
    local_sees_first: bool
    trim: bool
    skip_bad: bool
    splitting: tuple[int, int] | None
    drop_unsplit: bool
    shared_context: bool
    max_questions: int | None
    question_template: str


@dataclass(frozen=True, kw_only=True)
class EncodedFrame:
    """What is kept of a frame; `batch` is None if nothing is. `ids` and `hashes` are those of all samples."""

    batch: ShardBatch | None
    ids: list[str]
    hashes: Hashes
    statistics: SourceStatistics
    examples: ExampleStatistics


def encode_frame(frame: Frame, encoder: Encoder, options: EncodeOptions, respond: Respond) -> EncodedFrame:
    """Encode the samples of a frame.

    Raises:
        TemplateMismatch: the template or the tokenizer changes a text, unless `options.skip_bad`.
    """
    lines, samples = unpack_frame(frame)
    # the line of a sample that does not change is copied as it is
    line_of = {id(sample): line for sample, line in zip(samples, lines, strict=True)}
    statistics, example_statistics = SourceStatistics(), ExampleStatistics()
    kept: list[EncodedSample] = []
    for encoded in _encode([*respond(samples, statistics)], encoder, options):
        statistics.add_encoded(encoded)
        if not encoded.drop_reason:
            kept.append(encoded)
    examples = [encoded.example for encoded in kept if encoded.example]
    if options.shared_context:
        examples = [
            *merge_shared_contexts(
                iter(examples),
                options.row_len,
                options.max_questions,
                local_sees_first=options.local_sees_first,
            )
        ]
    for example in examples:
        example_statistics.add(example)
    kept_lines = (
        line + b"\n" if (line := line_of.get(id(encoded.sample))) is not None else sample_line(encoded.sample)
        for encoded in kept
    )
    hashes = (hash_sample(sample, options.question_template) for sample in samples)
    return EncodedFrame(
        batch=ShardBatch(b"".join(kept_lines), examples_to_batch(examples)) if examples else None,
        ids=[sample.id for sample in samples],
        hashes=to_hashes(hashes),
        statistics=statistics,
        examples=example_statistics,
    )


def write_encoded_shard(part: Part, frames: Iterable[EncodedFrame]) -> None:
    """Write the next shard of an encode part from its frames, one after the other."""
    part.start()
    number = len(part.shards)
    statistics, examples = SourceStatistics(), ExampleStatistics()
    ids: list[str] = []
    hashes: list[Hashes] = []

    def batches() -> Iterator[ShardBatch]:
        for frame in frames:
            statistics.merge(frame.statistics)
            examples.merge(frame.examples)
            ids.extend(frame.ids)
            hashes.append(frame.hashes)
            if frame.batch:
                yield frame.batch

    write_shard(part.folder, number, batches())
    _write_hashes(part.folder / _hashes_name(number), ids, np.concatenate(hashes))
    state = {"statistics": statistics.to_record(), "examples": examples.to_record()}
    part.add_shard([*shard_files(number), _hashes_name(number)], state)


def read_hashes(part: Part, number: int) -> tuple[list[str], Hashes]:
    """Return the ids and hashes of the samples of a shard."""
    with pa.ipc.open_file(part.folder / _hashes_name(number)) as reader:
        table = reader.read_all()
    hashes = np.stack([table["question"].to_numpy(), table["documents"].to_numpy()], axis=1)
    return table["id"].to_pylist(), hashes


def shards_with_examples(part: Part) -> list[int]:
    """Return the numbers of the shards of which anything is kept."""
    return [n for n, shard in enumerate(part.shards) if shard.state["examples"]["num_examples"]]


def merge_statistics(part: Part) -> tuple[SourceStatistics, ExampleStatistics]:
    """Return the statistics of a whole encode part."""
    statistics, examples = SourceStatistics(), ExampleStatistics()
    for shard in part.shards:
        statistics.merge(SourceStatistics.from_record(shard.state["statistics"]))
        examples.merge(ExampleStatistics.from_record(shard.state["examples"]))
    return statistics, examples


def _encode(samples: Sequence[Sample], encoder: Encoder, options: EncodeOptions) -> Iterator[EncodedSample]:
    split = None
    if options.splitting:
        max_blocks, min_block_tokens = options.splitting
        split = partial(
            split_sample,
            count_tokens=encoder.count_tokens,
            max_blocks=max_blocks,
            min_block_tokens=min_block_tokens,
        )
    for start in range(0, len(samples), BATCH_SAMPLES):
        yield from encode_samples(
            samples[start : start + BATCH_SAMPLES],
            encoder,
            options.row_len,
            trim=options.trim,
            skip_bad=options.skip_bad,
            split=split,
            drop_unsplit=options.drop_unsplit,
            local_sees_first=options.local_sees_first,
        )


def _write_hashes(path: Path, ids: Sequence[str], hashes: Hashes) -> None:
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    columns |= {"question": hashes[:, 0], "documents": hashes[:, 1]}
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _hashes_name(number: int) -> str:
    return f"{number:05}.hashes"
