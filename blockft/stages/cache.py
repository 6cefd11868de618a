"""`blockft cache`: fill the folder of a block cache, list it, verify it, and remove entries."""

import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from rich.table import Column, Table

from blockft.console import PlainConsole
from blockft.data.fields import format_fields
from blockft.data.rag_prompt import Document
from blockft.data.request import parse_document, unknown_corpus_fields
from blockft.data.sample import RecordError
from blockft.errors import UserError, warn
from blockft.inference.block_key import BlockKey, key_digest, num_first
from blockft.inference.cache_entry import CacheModel, find_damage
from blockft.inference.cache_folder import CacheFolder, EntryInfo
from blockft.inference.disk_tier import DiskTier
from blockft.inference.engine import Engine
from blockft.inputs import MAX_TEXT_BYTES, check_readable, decode_text, parse_json
from blockft.printable import print_text
from blockft.progress import BYTE, progress
from blockft.stages.generate import CacheArguments
from blockft.units import format_bytes, format_count, parse_bytes, parse_duration

BATCH_DOCUMENTS = 64
"""Documents that are looked up and encoded together."""

STDIN = Path("-")


# cache build


@dataclass(frozen=True)
class CorpusLine:
    """A document of a corpus; `location` names its file and line."""

    location: str
    num_bytes: int
    document: Document
    unknown_fields: frozenset[str]


@dataclass(frozen=True)
class Corpus:
    """A file of documents, one JSON line each: {"title", "text"} or a text. It can be read several times."""

    name: Path
    file: BinaryIO

    def lines(self) -> Iterator[CorpusLine]:
        """Yield every document from the start of the file.

        Raises:
            UserError: a line is not a document; the message has its number.
        """
        self.file.seek(0)
        for number, line in enumerate(self.file, start=1):
            if not line.strip():
                continue
            location = f"{self.name}, line {number}"
            try:
                record = parse_json(decode_text(line, location, max_bytes=MAX_TEXT_BYTES), location)
                document = parse_document(record)
                yield CorpusLine(location, len(line), document, frozenset(unknown_corpus_fields(record)))
            except RecordError as error:
                raise UserError(f"{location}: {error}") from error


def build_cache(model: str, corpus: Path, cache: CacheArguments) -> None:
    """Compute the blocks of all documents of a corpus and store them in the cache folder.

    Blocks that the folder already holds are skipped, so an interrupted build resumes.

    corpus: a file, or - for standard input.

    Raises:
        UserError: there is no document; a line is not a document or does not fit the model (the message has
            its number); the folder cannot take all blocks, or its budget is too small; see `Engine.load`.
    """
    with _open_corpus(corpus) as opened:
        # read all lines first: an error in the last one must not appear after hours
        num_bytes, unknown = 0, Counter[str]()
        for line in opened.lines():
            num_bytes += line.num_bytes
            unknown.update(line.unknown_fields)
        if not num_bytes:
            raise UserError(f"{corpus} holds no document")
        if unknown:
            warn(f"{corpus} has fields without an effect (documents): {format_fields(unknown)}")
        options = cache.options()
        digests: set[str] = set()
        num_encoded = first_len = 0
        with Engine.load(model, cache=options) as engine:
            disk = engine.runner.block_cache.disk
            assert disk
            if options.disk_bytes is not None:
                _check_budget(engine, disk, opened, num_bytes, options.disk_bytes)
            with progress("encode", num_bytes, unit=BYTE) as advance:
                for keys, num_line_bytes in _new_blocks(engine, opened, digests):
                    num_encoded += engine.runner.prefill_blocks(keys)
                    first_len = max([first_len, *map(num_first, keys)])
                    engine.flush()
                    if disk.statistics.entries_lost:
                        raise UserError(
                            f"{cache.folder} does not take all blocks: make room or name another folder, "
                            "then run the same command again to resume"
                        )
                    advance(num_line_bytes)
    print_text(f"{format_count(len(digests), 'block')} in {cache.folder}, {num_encoded:,} of them new")
    if first_len:
        print_text(
            f"the documents see the first block of the model's prompts ({first_len} tokens: the instruction "
            "and the markup before it): prompts with another first block do not find them",
            file=sys.stderr,
        )
    if num_evicted := disk.statistics.entries_evicted:
        if num_missing := len(digests - disk.digests()):
            raise UserError(
                f"{num_missing:,} of these blocks were evicted again: raise --cache-bytes, then run the same "
                "command again to resume"
            )
        evicted = format_count(num_evicted, "other block")
        print_text(f"evicted {evicted} to make room: raise --cache-bytes to keep them", file=sys.stderr)


def _check_budget(engine: Engine, disk: DiskTier, corpus: Corpus, num_bytes: int, max_bytes: int) -> None:
    """Refuse a budget in which the blocks of the corpus would evict each other."""
    digests: set[str] = set()
    needed_bytes = 0
    with progress("measure", num_bytes, unit=BYTE) as advance:
        for keys, num_line_bytes in _new_blocks(engine, corpus, digests):
            needed_bytes += sum(map(disk.num_bytes, keys))
            advance(num_line_bytes)
    if needed_bytes > max_bytes:
        raise UserError(
            f"the {len(digests):,} blocks of {corpus.name} take {format_bytes(needed_bytes)}, but "
            f"--cache-bytes is {max_bytes}: set it to at least {needed_bytes}"
        )


def _new_blocks(engine: Engine, corpus: Corpus, digests: set[str]) -> Iterator[tuple[list[BlockKey], int]]:
    """Yield, for each batch of documents, the blocks that are not in `digests` and the bytes of the lines.

    Adds the digests of the blocks to `digests`.
    """
    lines = corpus.lines()
    batch_size = 1  # one document first: a folder that cannot be written is found at once
    while batch := list(islice(lines, batch_size)):
        keys = {key_digest(key): key for key in _document_keys(engine, batch)}
        new_keys = [key for digest, key in keys.items() if digest not in digests]
        yield new_keys, sum(line.num_bytes for line in batch)
        digests.update(keys)
        batch_size = BATCH_DOCUMENTS


def _document_keys(engine: Engine, lines: Sequence[CorpusLine]) -> list[BlockKey]:
    """Return the blocks of the documents; an error names the line of the document."""
    try:
        return engine.document_keys([line.document for line in lines])
    except UserError:
        for line in lines:
            try:
                engine.document_keys([line.document])
            except UserError as error:
                raise UserError(f"{line.location}: {error}") from error
        raise


@contextmanager
def _open_corpus(path: Path) -> Iterator[Corpus]:
    """Open a corpus; a pipe can be read only once, so it is copied into a temporary file."""
    with ExitStack() as stack:
        if path == STDIN and sys.stdin is None:
            raise UserError("- cannot be read: standard input is closed")
        if path != STDIN:
            check_readable(path, "the corpus", allow_named_pipe=True)
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


# cache stats


def print_cache_stats(folder: Path, *, as_json: bool = False) -> None:
    """Print for each model its entries, their tokens and bytes, and the dates of the oldest and latest use.

    Raises:
        UserError: `folder` is not a block cache, or cannot be read.
    """
    with _open_cache(folder) as cache:
        models = [_describe(model, list(cache.entries(name))) for name, model in cache.models().items()]
    total = {name: sum(model[name] for model in models) for name in ("entries", "tokens", "bytes")}
    if as_json:
        print_text(json.dumps(total | {"models": models}))
        return
    table = Table(
        Column("model", overflow="fold"),
        Column("fingerprint", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in ("entries", "tokens", "size")),
        *(Column(name, no_wrap=True) for name in ("oldest use", "latest use")),
        box=None,
    )
    for model in models:
        numbers = f"{model['entries']:,}", f"{model['tokens']:,}", format_bytes(model["bytes"])
        dates = ((model[name] or "")[:10] for name in ("oldest_use", "latest_use"))
        table.add_row(model["name"], model["fingerprint"][:12], *numbers, *dates)
    PlainConsole().print(table)
    print_text(f"{format_count(total['entries'], 'entry', 'entries')}, {format_bytes(total['bytes'])}")


def _describe(model: CacheModel, entries: list[EntryInfo]) -> dict[str, Any]:
    times = [datetime.fromtimestamp(entry.used_at, UTC).isoformat(timespec="seconds") for entry in entries]
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "dtype": model.dtype,
        "entries": len(entries),
        "tokens": sum(model.num_tokens(entry.num_bytes) for entry in entries),
        "bytes": sum(entry.num_bytes for entry in entries),
        "oldest_use": min(times, default=None),
        "latest_use": max(times, default=None),
    }


# cache verify


def verify_cache(folder: Path, *, remove: bool = False, as_json: bool = False) -> None:
    """Verify the checksums of all entries and print the damaged entries.

    remove: remove the damaged entries.

    Raises:
        UserError: `folder` is not a block cache, or cannot be read; entries are damaged and not removed.
    """
    damaged = []
    with _open_cache(folder) as cache:
        models = cache.models()
        entries = [entry for name in models for entry in cache.entries(name)]
        with progress("verify", sum(entry.num_bytes for entry in entries), unit=BYTE) as advance:
            for entry in entries:
                model = models[entry.fingerprint]
                if reason := find_damage(entry.path, model):
                    damaged.append({"path": str(entry.path), "reason": reason})
                    if remove:
                        cache.remove_damaged(entry.path, model)
                advance(entry.num_bytes)
    if as_json:
        print_text(json.dumps({"entries": len(entries), "damaged": damaged, "removed": remove}))
    else:
        for line in damaged:
            print_text(f"{line['path']}: {line['reason']}")
        checked = format_count(len(entries), "entry", "entries")
        print_text(f"{checked}, {len(damaged):,} damaged{' and removed' if remove else ''}")
    if damaged and not remove:
        raise UserError(f"{len(damaged)} of {len(entries)} entries in {folder} are damaged: add --remove")


# cache prune


def prune_cache(
    folder: Path, *, max_bytes: str | None = None, older_than: str | None = None, model: str | None = None
) -> None:
    """Remove entries unused for `older_than`, then the least recently used ones beyond `max_bytes`.

    Both limits apply to the entries of `model`, or to all entries together. With `model` and no limit, all
    its entries are removed.

    max_bytes: a size such as 10GB.
    older_than: a duration such as 7d.
    model: a model's name, or the start of its fingerprint.

    Raises:
        UserError: there is neither a limit nor a model; there is no such model; a limit cannot be parsed;
            `folder` is not a block cache, or cannot be read and written.
    """
    if max_bytes is None and older_than is None:
        if model is None:
            raise UserError(
                "prune needs a limit: add --max-bytes such as 10GB, --older-than such as 7d, or --model"
            )
        max_bytes = "0"
    with _open_cache(folder) as cache:
        fingerprints = None if model is None else _find_models(cache, model)
        limit = None if max_bytes is None else parse_bytes(max_bytes)
        unused_since = None if older_than is None else time.time() - parse_duration(older_than)
        with cache.locked() as byte_count:
            removed = cache.prune(
                byte_count, max_bytes=limit, unused_since=unused_since, fingerprints=fingerprints
            )
            left_bytes = byte_count.read() or 0
    removed_bytes = format_bytes(sum(entry.num_bytes for entry in removed))
    print_text(
        f"removed {format_count(len(removed), 'entry', 'entries')}, {removed_bytes}; "
        f"{format_bytes(left_bytes)} are left in {folder}"
    )


def _find_models(cache: CacheFolder, model: str) -> set[str]:
    """Return the fingerprints of the models whose name is `model` or whose fingerprint starts with it.

    Raises:
        UserError: the cache holds no entries of the model.
    """
    models = cache.models()
    # every fingerprint begins with the empty text, which an unset shell variable gives: match nothing
    chosen = {
        fingerprint
        for fingerprint, cached in models.items()
        if model and (cached.name == model or fingerprint.startswith(model))
    }
    if not chosen:
        known = ", ".join(f"{cached.name} ({name[:12]})" for name, cached in models.items()) or "none"
        raise UserError(f"{cache.path} holds no entries of model {model!r}; its models: {known}")
    return chosen


@contextmanager
def _open_cache(folder: Path) -> Iterator[CacheFolder]:
    cache = CacheFolder(folder)
    try:
        if not cache.exists():
            raise UserError(
                f"{folder} is not a block cache: name a folder that blockft cache build has written"
            )
        yield cache
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be used: {error.strerror}") from error
