"""The files of a run's folder: its recipe, its data's manifest, its metrics and its loss plot."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockft.digest import DamagedFile, dump_with_digest, read_with_digest
from blockft.errors import UserError, warn
from blockft.outputs import write_atomic

RECIPE = "recipe.yaml"
"""The run's recipe with every setting. Its last line is a comment with the digest of all other lines."""

DATA = "data.json"
"""The manifest of the prepared data that the run reads."""

METRICS = "metrics.jsonl"
"""One JSON object per logged step or evaluation."""

LOSS_PLOT = "loss.png"
"""A plot of the losses in `metrics.jsonl`."""

_EDITED = "# edited"
"""Last line of a recipe that somebody has changed on purpose."""


# --- the recipe and the manifest of the data


def write_recipe(run: Path, text: str) -> None:
    """Write the recipe of a run; `text` ends in a new line."""
    write_atomic(run / RECIPE, text + _digest_line(text))


def read_recipe(run: Path) -> str:
    """Return the text of the recipe of a run, without the line of its digest.

    Raises:
        UserError: it is missing or is not what the run wrote.
    """
    path = run / RECIPE
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    text, last_line = _split_last_line(content)
    if last_line != _digest_line(text) and last_line.strip() != _EDITED:
        raise UserError(
            f"{path} has changed since the run wrote it: restore it, or end it with the line {_EDITED!r} if "
            "it was changed on purpose"
        )
    return text


def _digest_line(text: str) -> str:
    return f"# digest {hashlib.sha256(text.encode()).hexdigest()}\n"


def _split_last_line(content: str) -> tuple[str, str]:
    lines = content.split("\n")  # other line breaks belong to the text
    start = sum(len(line) + 1 for line in lines[: -2 if content.endswith("\n") else -1])
    return content[:start], content[start:]


def write_data(run: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of the prepared data of a run."""
    write_atomic(run / DATA, dump_with_digest(manifest))


def read_data(run: Path) -> dict[str, Any]:
    """Return the manifest of the prepared data of a run.

    Raises:
        UserError: it is missing or is not what the run wrote.
    """
    try:
        return read_with_digest(run / DATA)
    except DamagedFile as error:
        raise UserError(
            f"{run} is damaged ({error}): restore the file; it equals the manifest.json of the prepared data"
        ) from error


# --- the metrics


def digest_metrics(run: Path) -> dict[str, Any]:
    """Return size and digest of the metrics that a run has logged until now."""
    content = (run / METRICS).read_bytes()
    return {"bytes": len(content), "digest": hashlib.sha256(content).hexdigest()}


def verify_metrics(run: Path, expected: Mapping[str, Any]) -> None:
    """Check that the metrics of a run begin with those of `expected`, which `digest_metrics` gave.

    Missing metrics are warned of: a run needs none to go on.

    Raises:
        UserError: they do not, or cannot be read.
    """
    path = run / METRICS
    if not path.exists():
        warn(f"{path} is missing: the metrics of earlier steps are not known")
        return
    try:
        content = path.read_bytes()[: expected["bytes"]]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != expected["digest"]:
        raise UserError(
            f"{path} has changed since the run wrote it: restore it, or remove it to go on without the "
            "metrics of earlier steps"
        )


def read_metrics(run: Path, num_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, or those of its first `num_bytes`; none if the file is missing.

    A last line that an interruption left incomplete is ignored.

    Raises:
        UserError: a line is not one that a run writes.
    """
    path = run / METRICS
    if not path.exists():
        return []
    metrics = []
    lines = path.read_bytes()[:num_bytes].split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            is_metrics = isinstance(values, dict) and isinstance(values.get("step"), int)
        except (ValueError, RecursionError):
            is_metrics = False
        if not is_metrics:
            raise UserError(
                f"{path}, line {number} is damaged: restore the file, or remove it to go on without the "
                "metrics of earlier steps"
            )
        metrics.append(values)
    return metrics


def truncate_metrics(run: Path, num_bytes: int) -> None:
    """Keep the first bytes of the metrics: what a checkpoint's marker counts, and a resumed run logs once."""
    path = run / METRICS
    content = path.read_bytes()[:num_bytes] if path.exists() else b""
    write_atomic(path, content.decode("utf-8"))
