"""`blockft compare`: reports of `eval` side by side, as a table, as JSON and as a picture."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from blockft.errors import UserError
from blockft.evaluation.metrics import METRICS
from blockft.evaluation.report import REPEATED, check_report
from blockft.evaluation.report_render import TITLES, draw_scores, format_score
from blockft.outputs import save_figure
from blockft.stages.evaluate import METRIC, REPORT

OF_THE_MODEL = ("revision", "model fingerprint", "tokenizer fingerprint")
"""Options in which reports are expected to differ."""


def compare(
    paths: list[Path], *, metric: str = METRIC, as_json: bool = False, png: Path | None = None
) -> None:
    """Print a score of every report and mode, for all questions and each group they share.

    Options in which the evaluations differ are named, for they alone may explain what is seen.

    Raises:
        UserError: a path is no report, or is given twice; an unknown metric.
    """
    if metric not in METRICS:
        raise UserError(f"--metric is {metric!r}, allowed are {', '.join(METRICS)}")
    reports = {name: _read(path) for name, path in _name_reports(paths).items()}
    columns = {f"{m} {name}": groups for name, r in reports.items() for m, groups in _scores(r).items()}
    rows = _rows(list(reports.values()))
    differing = _differing(reports)
    if png:
        save_figure(draw_scores(columns, rows, metric), png)
    if as_json:
        scores = {name: {group: c[group] for group in rows} for name, c in columns.items()}
        print(json.dumps({"metric": metric, "scores": scores, "differing options": differing}, indent=2))
    else:
        _print(columns, rows, metric, differing)


def _name_reports(paths: Sequence[Path]) -> dict[str, Path]:
    """The reports by name: that of their folder, unless several bear it.

    Raises:
        UserError: a report is given twice.
    """
    places = [path.parent if path.name == REPORT else path for path in paths]
    for i, place in enumerate(places):
        if place.resolve() in (other.resolve() for other in places[:i]):
            raise UserError(f"{paths[i]} is given twice: name different reports")
    # of the folder at hand the path says no name
    short = [Path(os.path.abspath(place)).name for place in places]
    names = short if len(set(short)) == len(short) else map(str, places)
    return dict(zip(names, paths, strict=True))


def _scores(report: dict[str, Any]) -> dict[str, Any]:
    """The scores of each mode, also of the groups that hold the same questions as another."""
    return {
        mode: groups | {group: groups[other] for group, other in report.get(REPEATED, {}).items()}
        for mode, groups in report["modes"].items()
    }


def _rows(reports: Sequence[dict[str, Any]]) -> list[str]:
    """The groups that all reports share; those that hold the same questions in every one are said once."""
    found: dict[tuple[str, ...], str] = {}
    for group in next(iter(_scores(reports[0]).values())):
        if all(group in groups for report in reports for groups in _scores(report).values()):
            counted_as = tuple(report.get(REPEATED, {}).get(group, group) for report in reports)
            found.setdefault(counted_as, group)
    return list(found.values())


def _print(columns: dict[str, Any], rows: list[str], metric: str, differing: dict[str, Any]) -> None:
    table = Table("questions", "number", *columns, title=TITLES[metric])
    for group in rows:
        numbers = {groups[group]["questions"] for groups in columns.values()}
        scores = (format_score(groups[group], metric).replace(" [", "\n[") for groups in columns.values())
        table.add_row(group, " / ".join(map(str, sorted(numbers))), *scores)
    console = Console()
    console.print(table)
    for name, values in differing.items():
        said = ", ".join(f"{report} {json.dumps(v, ensure_ascii=False)}" for report, v in values.items())
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
        check_report(report)
    except FileNotFoundError:
        raise UserError(f"{path} holds no {REPORT}: write one with blockft eval") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    except ValueError as error:
        raise UserError(f"{file} is no report of blockft eval that can be read: {error}") from error
    return cast(dict[str, Any], report)
