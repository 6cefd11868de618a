"""`blockft cache`: what a cache folder holds, whether it is sound, and what may go."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from blockft.errors import UserError
from blockft.inference.cache_entry import CacheModel, DamagedEntry, Entry
from blockft.inference.cache_folder import CacheFolder, StoredEntry
from blockft.progress import track
from blockft.units import format_bytes, parse_bytes

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.ASCII)


def stats(folder: Path, *, as_json: bool = False) -> None:
    """Print, for each model, its entries, their tokens and bytes, and when the first and last were used.

    Raises:
        UserError: `folder` is no cache that can be read.
    """
    with _opened(folder) as cache:
        lines = [_describe(model, list(cache.entries(name))) for name, model in cache.models().items()]
    total = {name: sum(line[name] for line in lines) for name in ("entries", "tokens", "bytes")}
    if as_json:
        print(json.dumps(total | {"models": lines}))
        return
    right = [Column(name, justify="right", no_wrap=True) for name in ("entries", "tokens", "size")]
    names = [Column(name, no_wrap=True) for name in ("fingerprint", "oldest use", "latest use")]
    table = Table(Column("model", overflow="fold"), names[0], *right, *names[1:], box=None)
    for line in lines:
        numbers = f"{line['entries']:,}", f"{line['tokens']:,}", format_bytes(line["bytes"])
        uses = ((line[name] or "")[:10] for name in ("oldest_use", "latest_use"))
        table.add_row(line["name"], line["fingerprint"][:12], *numbers, *uses)
    Console().print(table)
    print(f"{total['entries']:,} entries, {format_bytes(total['bytes'])}")


def verify_cache(folder: Path, *, remove: bool = False, as_json: bool = False) -> None:
    """Compare every checksum of every entry, and print which do not fit; with `remove` these go.

    Raises:
        UserError: `folder` is no cache that can be read, or entries are damaged and were not to be removed.
    """
    damaged = []
    with _opened(folder) as cache:
        models = cache.models()
        entries = [entry for name in models for entry in cache.entries(name)]
        for entry in track(entries, "verify"):
            found = _damage(entry, models[entry.fingerprint])
            if found:
                damaged.append({"path": str(entry.path), "reason": str(found)})
                if remove:
                    cache.remove(entry.path, found.status)
    if as_json:
        print(json.dumps({"entries": len(entries), "damaged": damaged, "removed": remove}))
    else:
        for line in damaged:
            print(f"{line['path']}: {line['reason']}")
        print(f"{len(entries):,} entries, {len(damaged):,} damaged{' and removed' if remove else ''}")
    if damaged and not remove:
        raise UserError(f"{len(damaged)} of {len(entries)} entries in {folder} are damaged: add --remove")


def prune(
    folder: Path, *, max_bytes: str | None = None, older_than: str | None = None, model: str | None = None
) -> None:
    """Remove entries that were not used for `older_than`, then the least recently used beyond `max_bytes`.

    Both limits hold for the entries of `model` (a name, or how a fingerprint begins), or for all together;
    without a limit all entries of the model go.

    Raises:
        UserError: neither a limit nor a model is given, there is no such model, a limit cannot be read, or
            `folder` is no cache that can be read and written.
    """
    if max_bytes is None and older_than is None:
        if model is None:
            raise UserError(
                "prune needs a limit: add --max-bytes as in 10GB, --older-than as in 7d, or --model"
            )
        max_bytes = "0"
    with _opened(folder) as cache:
        chosen = None if model is None else _choose(cache, model)
        limit = None if max_bytes is None else parse_bytes(max_bytes)
        since = None if older_than is None else time.time() - _parse_age(older_than)
        with cache.locked() as ledger:
            removed = cache.prune(ledger, max_bytes=limit, unused_since=since, fingerprints=chosen)
            kept = ledger.read() or 0
    size = format_bytes(sum(entry.num_bytes for entry in removed))
    print(f"{len(removed):,} entries removed, {size}; {format_bytes(kept)} are left in {folder}")


@contextmanager
def _opened(folder: Path) -> Iterator[CacheFolder]:
    cache = CacheFolder(folder)
    try:
        if not cache.exists():
            raise UserError(f"{folder} is no block cache: name a folder that blockft cache build has written")
        yield cache
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be used: {error.strerror}") from error


def _describe(model: CacheModel, entries: list[StoredEntry]) -> dict[str, Any]:
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


def _damage(entry: StoredEntry, model: CacheModel) -> DamagedEntry | None:
    try:
        with Entry(entry.path, model) as opened:
            opened.check()
    except DamagedEntry as error:
        return error
    except OSError as error:
        if not entry.path.exists():  # evicted meanwhile
            return None
        return DamagedEntry(f"it cannot be read ({error.strerror})", entry.path.stat())
    return None


def _choose(cache: CacheFolder, model: str) -> set[str]:
    models = cache.models()
    # an empty word, as of a shell variable that is not set, begins every fingerprint
    chosen = {n for n, facts in models.items() if model and (facts.name == model or n.startswith(model))}
    if not chosen:
        known = ", ".join(f"{facts.name} ({name[:12]})" for name, facts in models.items()) or "none"
        raise UserError(f"{cache.path} holds no model {model!r}: it holds {known}")
    return chosen


def _parse_age(text: str) -> float:
    found = _AGE.fullmatch(text.strip())
    if not found:
        raise UserError(f"{text!r} is no age: write a number with a unit, as in 30m, 12h or 7d")
    return float(found[1]) * _SECONDS[found[2]]
