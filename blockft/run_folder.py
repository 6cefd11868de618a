"""The files of a run's folder: recipe, manifest of its data, metrics, sample answers and loss plot."""

import hashlib
import json
from collections.abc import Iterable, Mapping
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
"""One JSON object per logged step or evaluation.

A logged step has `step`, `loss`, `grad_norm`, `learning_rate`, the mean loss per label token since the last
logged step by mode and by source (`loss_block`, `loss_full`, `loss_source_0`, ...; `sources` of `data.json`
lists the sources), and `MEASURED`. An evaluation has `step`, `eval_loss_block`, `eval_loss_full`, and these
losses by source (`eval_loss_block_source_0`, ...).
"""

MEASURED = ("tokens_per_s", "utilization", "peak_memory_gib", "peak_reserved_gib", "seconds_left")
"""The metrics of a step that the machine decides. An interrupted and resumed run reproduces all others.

`tokens_per_s` counts no padding. `utilization` is the model arithmetic over the peak of the cards; it is left
out on a CPU, in float32 and on cards whose peak is not known. `peak_memory_gib` and `peak_reserved_gib` are
the largest of all ranks, see `PeakMemory`; the second one is left out on a CPU.
"""

SAMPLE_ANSWERS = "sample_answers.jsonl"
"""One JSON object per answer to a held-out prompt while the run trains, see `SampleAnswers.describe`."""

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


# --- the metrics and the sample answers


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records as lines of JSON. An interruption leaves at most an incomplete last line."""
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    # ids of samples may hold surrogates, which UTF-8 cannot encode
    with path.open("ab") as file:
        file.write(content.encode("utf-8", "backslashreplace"))


def digest_metrics(run: Path) -> dict[str, Any]:
    """Return size and digest of the metrics that a run has logged until now, and those of its answers."""
    digests = _digest_log(run / METRICS)
    if (run / SAMPLE_ANSWERS).exists():
        digests[SAMPLE_ANSWERS] = _digest_log(run / SAMPLE_ANSWERS)
    return digests


def _digest_log(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "digest": hashlib.sha256(content).hexdigest()}


def verify_metrics(run: Path, expected: Mapping[str, Any]) -> None:
    """Check that metrics and answers of a run begin with those of `expected`, which `digest_metrics` gave.

    Missing files are warned of: a run needs none to go on.

    Raises:
        UserError: they do not, or cannot be read.
    """
    _verify_log(run / METRICS, expected, "metrics")
    if SAMPLE_ANSWERS in expected:
        _verify_log(run / SAMPLE_ANSWERS, expected[SAMPLE_ANSWERS], "sample answers")


def _verify_log(path: Path, expected: Mapping[str, Any], noun: str) -> None:
    if not path.exists():
        warn(f"{path} is missing: the {noun} of earlier steps are not known")
        return
    try:
        content = path.read_bytes()[: expected["bytes"]]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != expected["digest"]:
        raise UserError(
            f"{path} has changed since the run wrote it: restore it, or remove it to go on without the "
            f"{noun} of earlier steps"
        )


def read_metrics(run: Path, num_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, or those of its first `num_bytes`; none if the file is missing.

    A last line that an interruption left incomplete is ignored.

    Raises:
        UserError: a line is not one that a run writes.
    """
    return _read_log(run / METRICS, num_bytes, "metrics")


def read_sample_answers(run: Path) -> list[dict[str, Any]]:
    """Return the lines of `sample_answers.jsonl`, as `read_metrics` returns those of the metrics.

    Raises:
        UserError: a line is not one that a run writes.
    """
    return _read_log(run / SAMPLE_ANSWERS, None, "sample answers")


def _read_log(path: Path, num_bytes: int | None, noun: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes()[:num_bytes].split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            is_record = isinstance(values, dict) and isinstance(values.get("step"), int)
        except (ValueError, RecursionError):
            is_record = False
        if not is_record:
            raise UserError(
                f"{path}, line {number} is damaged: restore the file, or remove it to go on without the "
                f"{noun} of earlier steps"
            )
        records.append(values)
    return records


def truncate_metrics(run: Path, counted: Mapping[str, Any] | None) -> None:
    """Keep the metrics and answers that a checkpoint's marker counts: a resumed run logs the others again.

    `counted` is what `digest_metrics` gave, or None to keep nothing.
    """
    _truncate(run / METRICS, counted["bytes"] if counted else 0)
    answers = run / SAMPLE_ANSWERS
    if counted and SAMPLE_ANSWERS in counted and answers.exists():
        _truncate(answers, counted[SAMPLE_ANSWERS]["bytes"])
    else:
        answers.unlink(missing_ok=True)


def _truncate(path: Path, num_bytes: int) -> None:
    content = path.read_bytes()[:num_bytes] if path.exists() else b""
    write_atomic(path, content.decode("utf-8"))
