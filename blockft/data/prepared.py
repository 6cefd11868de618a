"""Prepared data: write and read the folder of `prepare`.

::

    samples-00000.jsonl ...      the samples of a shard
    examples/00000.arrow ...     the examples of the same shard, and the columns that a plan reads
    manifest.json                content, options and the digests of all files; written last, so a folder
                                 without it is incomplete

A shard holds samples of one source, and ends with the first frame (see `sample_frames`) after which it has
`SHARD_SAMPLES` of them. The shards of a source follow each other, and `sources[i]["shards"]` in the manifest
says how many shards source i has: a shard does not depend on the other sources. The same samples and examples
give the same bytes.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch.utils.data import Dataset

from blockft.attention.pairs import LayoutArrays
from blockft.data.encoder import Example
from blockft.data.sample import Sample, parse_sample, sample_to_record
from blockft.digest import (
    AddedFile,
    DamagedFile,
    FileDigest,
    check_no_other_files,
    digest_files,
    digest_names,
    dump_with_digest,
    files_to_record,
    list_files,
    parse_files,
    read_with_digest,
    verify_files,
)
from blockft.errors import UserError
from blockft.folder_lock import reading_folder
from blockft.inputs import missing_path

MANIFEST = "manifest.json"
EXAMPLES = "examples"
"""Folder of the files of examples."""

VERSION = 4
"""Version of the format of the folder. Other versions are never read."""

FILES = "files"
"""Key of the manifest: size and digest of every other file of the folder."""

SHARD_SAMPLES = 4_096
"""Number of samples after which a shard ends."""

_OWN_FILE = re.compile(rf"{MANIFEST}|samples-\d{{5,}}\.jsonl|{EXAMPLES}/(\d{{5,}}|examples)\.arrow")
"""Names of the files of a prepared folder. Version 2 had one file `examples/examples.arrow`."""

_SCHEMA = pa.schema(
    {
        # the columns of `ExampleColumns`, which are read without the token ids
        "length": pa.int32(),
        "num_labels": pa.int32(),
        "num_blocks": pa.int32(),
        "has_local_blocks": pa.bool_(),
        "copy_len": pa.int32(),
        "max_token_id": pa.int32(),
        # the example
        "input_ids": pa.list_(pa.int32()),
        "label_spans": pa.list_(pa.int32()),  # start, end, start, end, ...
        "block_lengths": pa.list_(pa.int32()),
        "num_final": pa.int32(),
        "sample_ids": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleColumns:
    """What a plan needs to know of examples, an entry per example in each array.

    lengths           number of tokens
    num_labels        number of label tokens
    num_blocks        number of blocks
    has_local_blocks  whether block mode differs from full mode
    copy_lens         tokens that copies of the first block add in block mode, if local blocks see it
    max_token_ids     largest token id
    sources           index of the source
    """

    lengths: NDArray[np.int64]
    num_labels: NDArray[np.int64]
    num_blocks: NDArray[np.int64]
    has_local_blocks: NDArray[np.bool_]
    copy_lens: NDArray[np.int64]
    max_token_ids: NDArray[np.int64]
    sources: NDArray[np.int64]

    @classmethod
    def of_examples(cls, examples: Sequence[Example]) -> "ExampleColumns":
        """Return the columns of examples of one source."""
        return cls._of_batches([examples_to_batch(examples)], np.zeros(len(examples), np.int64))

    @classmethod
    def _of_batches(cls, batches: Sequence[pa.RecordBatch], sources: NDArray[np.int64]) -> "ExampleColumns":
        def column(name: str) -> NDArray[Any]:
            parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in batches]
            dtype = np.bool_ if pa.types.is_boolean(_SCHEMA.field(name).type) else np.int64
            return np.concatenate(parts or [[]]).astype(dtype)

        return cls(
            lengths=column("length"),
            num_labels=column("num_labels"),
            num_blocks=column("num_blocks"),
            has_local_blocks=column("has_local_blocks"),
            copy_lens=column("copy_len"),
            max_token_ids=column("max_token_id"),
            sources=sources,
        )

    def row_lengths(
        self, examples: NDArray[np.int64], is_block: NDArray[np.bool_], *, local_sees_first: bool
    ) -> NDArray[np.int64]:
        """Return the number of tokens that items take in a row, copies of the first block included.

        An item is an example in block mode or in full mode. `local_sees_first` is an option of `Layout`.
        """
        lengths = self.lengths[examples]
        return lengths + np.where(is_block, self.copy_lens[examples], 0) if local_sees_first else lengths


class Examples(Sequence[Example], Dataset[Example]):
    """The examples of a prepared folder, in memory-mapped files.

    Opening them reads the columns and no token ids.

    num_shards: the number of shards of each source.

    Raises:
        UserError: a file has become shorter since it was opened: a read beyond its end would be fatal.
    """

    def __init__(self, folder: Path, num_shards: Sequence[int]) -> None:
        self._files: list[tuple[Path, os.stat_result]] = []
        self._batches: list[pa.RecordBatch] = []
        self._batch_files: list[int] = []
        batch_sources: list[int] = []
        for number, source in enumerate(np.repeat(np.arange(len(num_shards)), num_shards).tolist()):
            # the batches keep the memory map; the file itself is closed, so that their number has no limit
            path = folder / _examples_name(number)
            with pa.memory_map(str(path)) as file:
                self._files.append((path, path.stat()))
                reader = pa.ipc.open_file(file)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self._batches += batches
            self._batch_files += [number] * len(batches)
            batch_sources += [source] * len(batches)
        num_rows = [batch.num_rows for batch in self._batches]
        self._ends = np.cumsum(num_rows, dtype=np.int64)
        self.columns = ExampleColumns._of_batches(
            self._batches, np.repeat(np.array(batch_sources, np.int64), num_rows)
        )

    def __len__(self) -> int:
        return len(self.columns.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        self._check_size(self._batch_files[number])
        batch = self._batches[number]
        row = int(index - self._ends[number] + batch.num_rows)
        spans = batch.column("label_spans")[row].as_py()
        return Example(
            input_ids=batch.column("input_ids")[row].values.to_numpy(),
            label_spans=tuple(zip(spans[::2], spans[1::2], strict=True)),
            block_lengths=tuple(batch.column("block_lengths")[row].as_py()),
            num_final=batch.column("num_final")[row].as_py(),
            sample_ids=tuple(batch.column("sample_ids")[row].as_py()),
        )

    def _check_size(self, number: int) -> None:
        path, opened = self._files[number]
        try:
            found = path.stat()
        except OSError:
            return  # a file that was removed stays mapped
        if (found.st_dev, found.st_ino) != (opened.st_dev, opened.st_ino):
            return  # so does a file that was replaced
        if found.st_size < opened.st_size:
            raise UserError(
                f"{path} was cut to {found.st_size} bytes instead of {opened.st_size} while it was read: run "
                "blockft prepare again with --overwrite, and continue a run with --resume"
            )

    def layouts(self) -> LayoutArrays:
        """Return the layouts of all examples, without the token ids."""
        lengths = [batch.column("block_lengths").flatten().to_numpy() for batch in self._batches]
        num_final = [batch.column("num_final").to_numpy() for batch in self._batches]
        return LayoutArrays(
            np.concatenate([[], *lengths]).astype(np.int64),
            self.columns.num_blocks,
            np.concatenate([[], *num_final]).astype(np.int64),
        )

    def locate_samples(self, index: int) -> tuple[int, int, int]:
        """Return where the samples of an example are: the shard, its first line, the number of lines."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._batch_files[number]
        first = self._batch_files.index(shard)
        counts = [
            len(ids) for batch in self._batches[first : number + 1] for ids in batch.column("sample_ids")
        ]
        start = int(self._ends[first]) - self._batches[first].num_rows
        return shard, sum(counts[: index - start]), counts[index - start]


@dataclass(frozen=True)
class PreparedData:
    """An open prepared folder."""

    folder: Path
    manifest: dict[str, Any]
    examples: Examples

    def read_samples(self, index: int) -> list[Sample]:
        """Return the samples of which example `index` is the encoding."""
        shard, start, number = self.examples.locate_samples(index)
        with (self.folder / _samples_name(shard)).open(encoding="utf-8") as lines:
            return [parse_sample(json.loads(line)) for line in islice(lines, start, start + number)]


def load_prepared(folder: Path, action: str = "blockft") -> PreparedData:
    """Open a prepared folder after checking that its files are what `prepare` wrote.

    Every rank of a run checks all files: a rank that fails alone would leave the others waiting. If the
    folder is replaced later, the examples are still the old ones, but the samples are not. Who reads samples
    holds `reading_folder`.

    action: what this process does, for the message of a writer that is refused meanwhile.

    Raises:
        UserError: the folder does not exist, is incomplete or damaged, or has another version; another
            process writes it.
    """
    with reading_folder(folder, action):
        return open_verified(folder, verify_prepared(folder))


def verify_prepared(folder: Path) -> dict[str, Any]:
    """Return the manifest of a prepared folder after checking all files of the folder.

    Raises:
        UserError: the folder does not exist, is incomplete or damaged, or has another version.
    """
    if not folder.is_dir():
        message = f"{folder} is no folder of prepared examples: write it with blockft prepare RECIPE"
        raise UserError(missing_path(folder, message))
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder} is no prepared folder, or an incomplete one (it has no {MANIFEST}): write it with "
            "blockft prepare RECIPE --overwrite"
        )
    try:
        manifest = read_with_digest(folder / MANIFEST)
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{folder} has version {manifest.get('version')} of the format, this blockft reads version "
                f"{VERSION}: run blockft prepare again with --overwrite"
            )
        files = parse_files(manifest[FILES])
        check_no_other_files(list_files(folder), [MANIFEST, *files])
        verify_files(folder, files)
    except AddedFile as error:
        raise UserError(
            f"prepared data {folder} cannot be used ({error}): move that file elsewhere"
        ) from error
    except DamagedFile as error:
        raise UserError(
            f"prepared data {folder} is damaged ({error}): run blockft prepare again with --overwrite"
        ) from error
    return manifest


def open_verified(folder: Path, manifest: dict[str, Any]) -> PreparedData:
    """Open a prepared folder whose files were checked."""
    examples = Examples(folder, [source["shards"] for source in manifest["sources"]])
    return PreparedData(folder, manifest, examples)


def find_foreign_file(folder: Path) -> str | None:
    """Return the name of a file in a folder that `prepare` does not write, or None.

    Hidden files, which systems leave in every folder, do not count. The files of a hidden folder such as .git
    do.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_own = _OWN_FILE.fullmatch(name)
        if not (is_own or path.name.startswith(".")) and (path.is_symlink() or not path.is_dir()):
            return name
    return None


@dataclass(frozen=True)
class ShardBatch:
    """A part of a shard: consecutive samples as JSON lines, and their examples as an Arrow record batch."""

    lines: bytes
    examples: pa.RecordBatch


def build_shard_batch(samples: Iterable[Sample], examples: Sequence[Example]) -> ShardBatch:
    """Return samples and their examples as a part of a shard, which can be sent between processes."""
    return ShardBatch(b"".join(map(sample_line, samples)), examples_to_batch(examples))


def sample_line(sample: Sample) -> bytes:
    """Return a sample as a line of JSON."""
    return (json.dumps(sample_to_record(sample), ensure_ascii=False) + "\n").encode()


def write_shard(folder: Path, number: int, batches: Iterable[ShardBatch]) -> None:
    """Write the two files of shard `number`: the samples and the examples of `batches`, in order.

    The bytes depend on how the examples are divided into batches.
    """
    (folder / EXAMPLES).mkdir(exist_ok=True)
    with (
        (folder / _samples_name(number)).open("wb") as samples,
        pa.OSFile(str(folder / _examples_name(number)), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as examples,
    ):
        for batch in batches:
            samples.write(batch.lines)
            examples.write_batch(batch.examples)


def shard_files(number: int) -> tuple[str, str]:
    """Return the names of the files of a shard: its samples and its examples."""
    return _samples_name(number), _examples_name(number)


def finish_folder(
    folder: Path, manifest: dict[str, Any], files: Mapping[str, FileDigest] | None = None
) -> None:
    """Complete a folder of shards 0, 1, ...: write the manifest with the digests of all files.

    `manifest["sources"][i]["shards"]` is the number of shards of source i. The manifest gets one hash of the
    whole content. `files` are the digests of all files, if they are known.
    """
    (folder / EXAMPLES).mkdir(exist_ok=True)
    files = digest_files(folder, list_files(folder)) if files is None else files
    num_shards = sum(source["shards"] for source in manifest["sources"])
    assert set(files) == {name for number in range(num_shards) for name in shard_files(number)}
    content_hash = digest_names(files, sorted(files))
    complete = {"version": VERSION, **manifest, "content_hash": content_hash}
    complete[FILES] = files_to_record(files)
    (folder / MANIFEST).write_text(dump_with_digest(complete), encoding="utf-8")


def examples_to_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Return examples as an Arrow record batch."""
    spans = [np.array(example.label_spans, np.int32).reshape(-1) for example in examples]
    columns = [
        pa.array([len(example) for example in examples], pa.int32()),
        pa.array([example.num_labels for example in examples], pa.int32()),
        pa.array([len(example.block_lengths) for example in examples], pa.int32()),
        pa.array([example.has_local_blocks for example in examples], pa.bool_()),
        pa.array([example.copy_len for example in examples], pa.int32()),
        pa.array([int(example.input_ids.max()) for example in examples], pa.int32()),
        _list_array([example.input_ids for example in examples]),
        _list_array(spans),
        _list_array([np.array(example.block_lengths, np.int32) for example in examples]),
        pa.array([example.num_final for example in examples], pa.int32()),
        pa.array([example.sample_ids for example in examples], pa.list_(pa.string())),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _samples_name(number: int) -> str:
    return f"samples-{number:05}.jsonl"


def _examples_name(number: int) -> str:
    return f"{EXAMPLES}/{number:05}.arrow"


def _list_array(arrays: Sequence[NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([*arrays, np.zeros(0, np.int32)]))
