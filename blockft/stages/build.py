"""`blockft cache build`: the documents of a corpus, encoded before anybody asks about them."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from blockft.data.rag_prompt import Document
from blockft.data.request import parse_document
from blockft.data.sample import RecordError
from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, key_digest
from blockft.inference.disk_tier import DiskTier
from blockft.inference.engine import Engine
from blockft.progress import progress
from blockft.stages.generate import CacheArguments, open_engine
from blockft.units import format_bytes

BATCH = 64
"""Documents that are looked up and encoded together."""

STDIN = Path("-")


@dataclass(frozen=True)
class CorpusLine:
    """A document of a corpus; `at` names its place there."""

    at: str
    num_bytes: int
    document: Document


@dataclass(frozen=True)
class Corpus:
    """JSON lines {"title", "text"} or texts, which can be read again and again."""

    name: Path
    file: BinaryIO

    def lines(self) -> Iterator[CorpusLine]:
        """Every document, from the first one on.

        Raises:
            UserError: a line is none, by its number.
        """
        self.file.seek(0)
        for number, line in enumerate(self.file, start=1):
            if not line.strip():
                continue
            at = f"{self.name}, line {number}"
            try:
                record: Any = json.loads(line)
                yield CorpusLine(at, len(line), parse_document(record))
            except RecordError as error:
                raise UserError(f"{at}: {error}") from error
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number without end
                raise UserError(f"{at} is not JSON: {error}") from error


def build(model: str, corpus: Path, cache: CacheArguments) -> None:
    """Encode every document of `corpus`, a file or - for standard input, into the folder of a cache.

    What the folder holds already is passed over, so a build that was interrupted goes on.

    Raises:
        UserError: no document; a line that is none, or is unfit for the model, by its number; a folder that
            may not hold all blocks, or does not take one; see `open_engine`.
    """
    with _opened(corpus) as opened:
        # a mistake in the last line should not be found after hours
        num_bytes = sum(line.num_bytes for line in opened.lines())
        if not num_bytes:
            raise UserError(f"{corpus} holds no document")
        engine = open_engine(model, cache)
        disk = engine.runner.store.disk
        assert disk
        if (budget := cache.options().disk_bytes) is not None:
            _check_budget(engine, disk, opened, num_bytes, budget)
        names: set[str] = set()
        num_encoded = 0
        with progress("encode", num_bytes) as advance:
            for keys, part in _new_blocks(engine, opened, names):
                num_encoded += engine.runner.prefill_blocks(keys)
                engine.close()
                if disk.statistics.entries_lost:
                    raise UserError(
                        f"{cache.folder} does not take all blocks: make room or name another folder, and "
                        "go on by the same command"
                    )
                advance(part)
    print(f"{len(names):,} blocks, {num_encoded:,} of them encoded now, in {cache.folder}")
    if evicted := disk.statistics.entries_evicted:
        if gone := len(names - disk.digests()):
            raise UserError(
                f"{gone:,} of these blocks had to make way for others: allow more by --cache-bytes, and "
                "go on by the same command"
            )
        print(f"{evicted:,} other blocks had to make way: allow more by --cache-bytes")


def _check_budget(engine: Engine, disk: DiskTier, corpus: Corpus, num_bytes: int, budget: int) -> None:
    """Refuse to encode blocks that would have to make way for each other."""
    names: set[str] = set()
    needed = 0
    with progress("measure", num_bytes) as advance:
        for keys, part in _new_blocks(engine, corpus, names):
            needed += sum(map(disk.num_bytes, keys))
            advance(part)
    if needed > budget:
        raise UserError(
            f"the {len(names):,} blocks of {corpus.name} take {format_bytes(needed)}: "
            f"--cache-bytes is {budget}, it should be at least {needed}"
        )


def _new_blocks(engine: Engine, corpus: Corpus, names: set[str]) -> Iterator[tuple[list[BlockKey], int]]:
    """Blocks of a few documents, without those in `names`, to which they are added; bytes of their lines."""
    lines = corpus.lines()
    batch_size = 1  # the first one alone, for a folder that takes nothing shows by it
    while batch := list(islice(lines, batch_size)):
        blocks = {key_digest(key): key for key in _keys(engine, batch)}
        yield [key for name, key in blocks.items() if name not in names], sum(x.num_bytes for x in batch)
        names.update(blocks)
        batch_size = BATCH


def _keys(engine: Engine, lines: Sequence[CorpusLine]) -> list[BlockKey]:
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


@contextmanager
def _opened(path: Path) -> Iterator[Corpus]:
    """A corpus; what comes through a pipe is copied into a temporary file, for it can be read but once."""
    with ExitStack() as stack:
        try:
            file = sys.stdin.buffer if path == STDIN else stack.enter_context(path.open("rb"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if path == STDIN or not file.seekable():
            try:
                source, file = file, stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(source, file)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be copied into {tempfile.gettempdir()}: {error.strerror}"
                ) from error
        yield Corpus(path, file)
