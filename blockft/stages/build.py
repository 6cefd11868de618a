"""`blockft cache build`: the documents of a corpus, encoded before anybody asks about them."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from blockft.data.rag import Document
from blockft.data.request import document_of
from blockft.data.sample import RecordError
from blockft.errors import UserError
from blockft.inference.block import Key
from blockft.inference.engine import Engine
from blockft.stages.generate import CacheWords, open_engine

BATCH = 64
"""Documents that are looked up and encoded together."""


@dataclass(frozen=True)
class Line:
    """A document of a corpus; `at` names its place there."""

    at: str
    num_bytes: int
    document: Document


def build(model: str, corpus: Path, cache: CacheWords) -> None:
    """Encode every document of `corpus`, JSON lines {"title", "text"} or texts, into the folder of a cache.

    What the folder holds already is passed over, so a build that was interrupted goes on.

    Raises:
        UserError: a line is no document, or one that is unfit for the model, by its number; the folder did
            not take all blocks; see `open_engine`.
    """
    assert cache.folder
    num_bytes = sum(len(line) for line in _open(corpus))
    for _ in _documents(corpus):  # a mistake in the last line should not be found after hours
        pass
    engine = open_engine(model, cache)
    documents = _documents(corpus)
    num_blocks = num_encoded = 0
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("encode", total=num_bytes)
        while batch := list(islice(documents, BATCH)):
            keys = _keys(engine, batch)
            num_blocks += len(keys)
            num_encoded += engine.runner.encode(keys)
            progress.advance(task, sum(line.num_bytes for line in batch))
    engine.close()
    disk = engine.runner.store.disk
    assert disk
    if lost := disk.statistics.entries_lost:
        raise UserError(
            f"{cache.folder} did not take {lost:,} of {num_encoded:,} new blocks: make room or name another "
            "folder, and go on by the same command"
        )
    print(f"{num_blocks:,} blocks, {num_encoded:,} of them encoded now, in {cache.folder}")
    if evicted := disk.statistics.entries_evicted:
        print(f"{evicted:,} blocks had to make way: allow more by --cache-bytes")


def _keys(engine: Engine, lines: Sequence[Line]) -> list[Key]:
    """The blocks of documents, which are told apart only if one of them is unfit."""
    try:
        return engine.document_keys([line.document for line in lines])
    except UserError:
        for line in lines:
            try:
                engine.document_keys([line.document])
            except UserError as error:
                raise UserError(f"{line.at}: {error}") from error
        raise


def _documents(corpus: Path) -> Iterator[Line]:
    for number, line in enumerate(_open(corpus), start=1):
        if not line.strip():
            continue
        at = f"{corpus}, line {number}"
        try:
            record: Any = json.loads(line)
            yield Line(at, len(line), document_of(record, "the document"))
        except (json.JSONDecodeError, RecursionError, UnicodeDecodeError) as error:
            raise UserError(f"{at} is not JSON: {error}") from error
        except RecordError as error:
            raise UserError(f"{at}: {error}") from error


def _open(corpus: Path) -> Iterator[bytes]:
    try:
        with corpus.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise UserError(f"{corpus} cannot be read: {error.strerror}") from error
