"""Prepared data: write and read the folder of `prepare`.

::

    samples-00000.jsonl ...    50,000 samples each
    examples/examples.arrow    one row per example
    manifest.json              content and options; written last, so a folder without it is incomplete

The same samples and examples give the same bytes.
"""

import hashlib
import json
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
from blockft.errors import UserError

MANIFEST = "manifest.json"
EXAMPLES = "examples/examples.arrow"

SHARD_SAMPLES = 50_000
"""Number of samples in a file."""

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
    """Open a prepared folder.

    Raises:
        UserError: the folder does not exist or is incomplete.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of prepared examples: write it with blockft prepare RECIPE")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is incomplete (it has no {MANIFEST}): run blockft prepare again")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return PreparedData(folder, manifest, Examples(folder / EXAMPLES))


def is_incomplete(folder: Path) -> bool:
    """Return whether a folder holds only files of an interrupted `prepare`, so that it may be replaced."""
    names = {path.name for path in folder.iterdir()}
    return all(name == "examples" or name.startswith("samples-") for name in names)


class PreparedWriter:
    """Writes the samples and examples of a folder in order. `finish` completes the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_samples = 0
        self._shard: TextIO | None = None
        self._batch: list[Example] = []
        (folder / EXAMPLES).parent.mkdir()
        self._examples = pa.ipc.new_file(str(folder / EXAMPLES), _SCHEMA)

    def __enter__(self) -> "PreparedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._examples.close()
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
        """Close the files, and write the manifest with a hash of their content."""
        self._flush()
        self.__exit__(None, None, None)
        content = [*sorted(self._folder.glob("samples-*.jsonl")), self._folder / EXAMPLES]
        complete = manifest | {"content_hash": _hash_files(content)}
        (self._folder / MANIFEST).write_text(
            json.dumps(complete, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

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


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
