"""`blockft compare`: reports of `eval` side by side, as a table, as JSON and as a picture."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blockft.errors import UserError
from blockft.evaluation.metrics import METRICS
from blockft.evaluation.render import TITLES, cell, draw
from blockft.evaluation.report import VERSION
from blockft.rundir import save_figure
from blockft.stages.evaluate import METRIC, REPORT

OF_THE_MODEL = ("revision", "model fingerprint", "tokenizer fingerprint")
"""Options in which reports are expected to differ."""


def compare(
    paths: list[Path], *, metric: str = METRIC, as_json: bool = False, png: Path | None = None
) -> None:
    """Print a score of every report and mode, for all questions and each group they share.

    Options in which the evaluations differ are named, for they alone may explain what is seen.

    Raises:
        UserError: a path is no report; an unknown metric.
    """
    if metric not in METRICS:
        raise UserError(f"--metric is {metric!r}, allowed are {', '.join(METRICS)}")
    folders = [path.parent if path.is_file() else path for path in paths]
    short = [folder.name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    reports = {name: _read(path) for name, path in zip(names, paths, strict=True)}
    columns = {f"{m} {name}": groups for name, r in reports.items() for m, groups in r["modes"].items()}
    rows = [group for group in next(iter(columns.values())) if all(group in c for c in columns.values())]
    differing = _differing(reports)
    if as_json:
        scores = {name: {group: c[group] for group in rows} for name, c in columns.items()}
        print(json.dumps({"metric": metric, "scores": scores, "differing options": differing}, indent=2))
    else:
        _print(columns, rows, metric, differing)
    if png:
        save_figure(draw(columns, rows, metric), png)


def _print(columns: dict[str, Any], rows: list[str], metric: str, differing: dict[str, Any]) -> None:
    table = Table("questions", "number", *columns, title=TITLES[metric])
    for group in rows:
        numbers = {groups[group]["questions"] for groups in columns.values()}
        scores = (cell(groups[group], metric).replace(" [", "\n[") for groups in columns.values())
        table.add_row(group, " / ".join(map(str, sorted(numbers))), *scores)
    console = Console()
    console.print(table)
    for name, values in differing.items():
        said = ", ".join(f"{report} {value}" for report, value in values.items())
        console.print(f"not asked alike: {name}: {said}", highlight=False, markup=False, soft_wrap=True)


def _differing(reports: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of the evaluations that are not the same everywhere: name -> report -> value."""
    names = dict.fromkeys(name for report in reports.values() for name in report["options"])
    found = {
        name: {report: reports[report]["options"].get(name) for report in reports}
        for name in names
        if name not in OF_THE_MODEL
    }
    return {n: values for n, values in found.items() if len({json.dumps(v) for v in values.values()}) > 1}


def _read(path: Path) -> dict[str, Any]:
    file = path / REPORT if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} holds no {REPORT}: write one with blockft eval") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(report, dict) or not report.get("modes"):
        raise UserError(f"{file} is no report of blockft eval")
    if report.get("version") != VERSION:
        raise UserError(
            f"{file} is a report of version {report.get('version')}, this blockft reads version {VERSION}: "
            "evaluate again"
        )
    return report
