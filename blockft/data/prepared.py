"""Prepared data: write and read the folder of `prepare`.

::

    samples-00000.jsonl ...    50,000 samples each
    examples/examples.arrow    one row per example
    manifest.json              content, options and the digests of all files; written last, so a folder
                               without it is incomplete

The same samples and examples give the same bytes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, overload

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from blockft.data.encoder import Example
from blockft.data.sample import Sample, sample_to_record
from blockft.digest import (
    AddedFile,
    DamagedFile,
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

MANIFEST = "manifest.json"
EXAMPLES = "examples/examples.arrow"

VERSION = 2
"""Version of the format of the folder. Other versions are never read."""

FILES = "files"
"""Key of the manifest: size and digest of every other file of the folder."""

SHARD_SAMPLES = 50_000
"""Number of samples in a file."""

_SHARD = re.compile(r"samples-\d{5,}\.jsonl")
"""Names of the files of samples."""

BATCH_EXAMPLES = 1_000
"""Number of examples in an Arrow record batch."""

_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "block_lengths": pa.list_(pa.int32()),
        "num_final": pa.int32(),
        "sample_ids": pa.list_(pa.string()),
    }
)


class Examples(Sequence[Example], Dataset[Example]):
    """The examples of a prepared folder, in a memory-mapped file."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._len: int = sum(batch.num_rows for batch in self._batches)

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._len))]
        if not -self._len <= index < self._len:
            raise IndexError(f"example {index} of {self._len}")
        batch, row = divmod(index % self._len, BATCH_EXAMPLES)
        columns = {name: self._batches[batch].column(name)[row] for name in _SCHEMA.names}
        return Example(
            input_ids=columns["input_ids"].values.to_numpy(),
            labels=columns["labels"].values.to_numpy(),
            block_lengths=tuple(columns["block_lengths"].as_py()),
            num_final=columns["num_final"].as_py(),
            sample_ids=tuple(columns["sample_ids"].as_py()),
        )


@dataclass(frozen=True)
class PreparedData:
    """An open prepared folder."""

    folder: Path
    manifest: dict[str, Any]
    examples: Examples


def load_prepared(folder: Path) -> PreparedData:
    """Open a prepared folder after checking that its files are what `prepare` wrote.

    Every rank of a run checks all files: a rank that fails alone would leave the others waiting.

    Raises:
        UserError: the folder does not exist, is incomplete or damaged, or has another version.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of prepared examples: write it with blockft prepare RECIPE")
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder} is incomplete (it has no {MANIFEST}): run blockft prepare again with --overwrite"
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
    return PreparedData(folder, manifest, Examples(folder / EXAMPLES))


def find_foreign_file(folder: Path) -> str | None:
    """Return the name of a file in a folder that `prepare` does not write, or None.

    Hidden files, which systems leave in every folder, do not count. The files of a hidden folder such as .git
    do.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_own = name in (MANIFEST, EXAMPLES) or _SHARD.fullmatch(name)
        if not (is_own or path.name.startswith(".")) and (path.is_symlink() or not path.is_dir()):
            return name
    return None


class PreparedWriter:
    """Writes the samples and examples of a folder in order. `finish` completes the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_samples = 0
        self._shard: TextIO | None = None
        self._batch: list[Example] = []
        (folder / EXAMPLES).parent.mkdir()
        self._examples_file = pa.OSFile(str(folder / EXAMPLES), "wb")
        self._examples = pa.ipc.new_file(self._examples_file, _SCHEMA)

    def __enter__(self) -> "PreparedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._examples_file.closed:
            self._examples.close()
            self._examples_file.close()  # Arrow's writer leaves the last bytes in a buffer of the file
        if self._shard:
            self._shard.close()

    def add_sample(self, sample: Sample) -> None:
        """Append a sample to the current file."""
        if self._num_samples % SHARD_SAMPLES == 0:
            if self._shard:
                self._shard.close()
            name = f"samples-{self._num_samples // SHARD_SAMPLES:05}.jsonl"
            self._shard = (self._folder / name).open("w", encoding="utf-8")
        assert self._shard
        self._shard.write(json.dumps(sample_to_record(sample), ensure_ascii=False) + "\n")
        self._num_samples += 1

    def add_example(self, example: Example) -> None:
        """Append an example. Examples are written in batches."""
        self._batch.append(example)
        if len(self._batch) == BATCH_EXAMPLES:
            self._flush()

    def finish(self, manifest: dict[str, Any]) -> None:
        """Close the files, and write the manifest with their digests and one hash of the whole content."""
        self._flush()
        self.__exit__(None, None, None)
        files = digest_files(self._folder, list_files(self._folder))
        content_hash = digest_names(files, sorted(files))
        complete = {"version": VERSION, **manifest, "content_hash": content_hash}
        complete[FILES] = files_to_record(files)
        (self._folder / MANIFEST).write_text(dump_with_digest(complete), encoding="utf-8")

    def _flush(self) -> None:
        if self._batch:
            columns = [
                _list_array([example.input_ids for example in self._batch]),
                _list_array([example.labels for example in self._batch]),
                _list_array([np.array(example.block_lengths, np.int32) for example in self._batch]),
                pa.array([example.num_final for example in self._batch], pa.int32()),
                pa.array([example.sample_ids for example in self._batch], pa.list_(pa.string())),
            ]
            self._examples.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            self._batch = []


def _list_array(arrays: Sequence[np.ndarray[Any, np.dtype[np.int32]]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays))
