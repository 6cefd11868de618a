"""`blockft cache build`: the documents of a corpus, encoded before anybody asks about them."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from blockft.data.rag import Document
from blockft.data.request import document_of
from blockft.data.sample import RecordError
from blockft.errors import UserError
from blockft.stages.generate import CacheWords, open_engine

BATCH = 64
"""Documents that are looked up and encoded together."""


def build(model: str, corpus: Path, cache: CacheWords) -> None:
    """Encode every document of `corpus`, JSON lines {"title", "text"} or texts, into the folder of a cache.

    What the folder holds already is passed over, so a build that was interrupted goes on.

    Raises:
        UserError: a line is no document, by its number; see `open_engine`.
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
            keys = engine.document_keys([document for document, _ in batch])
            num_blocks += len(keys)
            num_encoded += engine.runner.encode(keys)
            progress.advance(task, sum(size for _, size in batch))
    engine.close()
    print(f"{num_blocks:,} blocks, {num_encoded:,} of them encoded now, in {cache.folder}")


def _documents(corpus: Path) -> Iterator[tuple[Document, int]]:
    """Every document and the bytes of its line."""
    for number, line in enumerate(_open(corpus), start=1):
        if not line.strip():
            continue
        at = f"{corpus}, line {number}"
        try:
            record: Any = json.loads(line)
            yield document_of(record, "the document"), len(line)
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
