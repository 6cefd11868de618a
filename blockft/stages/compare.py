"""`blockft compare`: the scores of several evaluations side by side, as a table, JSON and a picture."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from blockft.console import PlainConsole
from blockft.errors import UserError, list_allowed
from blockft.evaluation.metrics import METRICS
from blockft.evaluation.report import REPEATED, check_report
from blockft.evaluation.report_render import TITLES, draw_scores, format_score
from blockft.inputs import missing_path, read_json
from blockft.outputs import save_figure
from blockft.printable import print_text
from blockft.stages.evaluate import PLOTTED_METRIC, REPORT

MODEL_OPTIONS = ("revision", "model fingerprint", "tokenizer fingerprint")
"""Options that are expected to differ, because they name the evaluated model."""

Scores = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Report name -> mode -> group of questions -> scores."""


def compare(
    paths: Sequence[Path], *, metric: str = PLOTTED_METRIC, png: Path | None = None
) -> dict[str, Any]:
    """Compare reports by one metric, over all questions and over each group that all reports share.

    png: a file to draw the comparison into.

    Returns:
        {"metric": ..., "scores": {report name: {mode: {group: scores}}}, "differing options": {option:
        {report name: value}}}. Differing options may explain a difference of the scores.

    Raises:
        UserError: a path holds no report, or is given twice; the metric is unknown; `png` cannot be written.
    """
    if metric not in METRICS:
        raise UserError(f"--metric is {metric!r} ({list_allowed(metric, METRICS)})")
    reports = {name: read_report(path) for name, path in _name_reports(paths).items()}
    groups = _shared_groups(list(reports.values()))
    scores = {
        name: {
            mode: {group: by_group[group] for group in groups} for mode, by_group in _scores(report).items()
        }
        for name, report in reports.items()
    }
    if png:
        title = "Evaluation" if len(reports) == 1 else f"Comparison of {len(reports)} evaluations"
        save_figure(draw_scores(scores, groups, metric, title=title), png)
    return {"metric": metric, "scores": scores, "differing options": _differing_options(reports)}


def print_comparison(comparison: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print a comparison as a table of at most 80 columns, or as JSON.

    Differing options are a remark on stderr below the table.
    """
    if as_json:
        print_text(json.dumps(comparison, indent=2))
        return
    scores, metric = comparison["scores"], comparison["metric"]
    modes = list(dict.fromkeys(mode for by_mode in scores.values() for mode in by_mode))
    table = Table(
        Column("questions", overflow="fold"),
        Column("report", overflow="fold"),
        Column("number", justify="right", no_wrap=True),
        *(Column(f"{mode} mode", no_wrap=True) for mode in modes),
        title=TITLES[metric],
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for group in next(iter(next(iter(scores.values())).values())):
        for i, (name, by_mode) in enumerate(scores.items()):
            number = next(iter(by_mode.values()))[group]["questions"]
            cells = [format_score(by_mode[mode][group], metric) if mode in by_mode else "" for mode in modes]
            table.add_row("" if i else group, name, str(number), *cells)
        table.add_section()
    PlainConsole().print(table)
    remarks = PlainConsole(stderr=True)
    for option, values in comparison["differing options"].items():
        listed = ", ".join(f"{name} {json.dumps(v, ensure_ascii=False)}" for name, v in values.items())
        remarks.print(f"differing option: {option}: {listed}", soft_wrap=True)


def _name_reports(paths: Sequence[Path]) -> dict[str, Path]:
    """Name each report after its folder, or after its path if two folders have the same name.

    Raises:
        UserError: a report is given twice.
    """
    folders = [path.parent if path.name == REPORT else path for path in paths]
    for i, folder in enumerate(folders):
        if os.path.realpath(folder) in map(os.path.realpath, folders[:i]):
            raise UserError(f"{paths[i]} is given twice: name different reports")
    # the path "." has no name of its own
    short_names = [Path(os.path.abspath(folder)).name for folder in folders]
    names = short_names if len(set(short_names)) == len(short_names) else map(str, folders)
    return dict(zip(names, paths, strict=True))


def _scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of each mode.

    Repeated groups are included; they get the scores of the earlier equal group.
    """
    return {
        mode: groups | {group: groups[earlier] for group, earlier in report.get(REPEATED, {}).items()}
        for mode, groups in report["modes"].items()
    }


def _shared_groups(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the groups that all reports have; groups with the same questions in every report once."""
    shared: dict[tuple[str, ...], str] = {}
    for group in next(iter(_scores(reports[0]).values())):
        if all(group in groups for report in reports for groups in _scores(report).values()):
            counted_as = tuple(report.get(REPEATED, {}).get(group, group) for report in reports)
            shared.setdefault(counted_as, group)
    return list(shared.values())


def _differing_options(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the options that differ between the reports: option -> report name -> value."""
    options = dict.fromkeys(option for report in reports.values() for option in report["options"])
    values = {
        option: {name: report["options"].get(option) for name, report in reports.items()}
        for option in options
        if option not in MODEL_OPTIONS
    }
    return {
        option: by_report
        for option, by_report in values.items()
        if len({json.dumps(value) for value in by_report.values()}) > 1
    }


def read_report(path: Path) -> dict[str, Any]:
    """Return the report in a folder of `blockft eval`, or in a file.

    Raises:
        UserError: the report cannot be read, or is not one of this version.
    """
    file = path / REPORT if path.is_dir() else path
    if not file.exists():
        raise UserError(missing_path(path, f"{path} holds no {REPORT}: write one with blockft eval"))
    report = read_json(file, "the report")
    try:
        check_report(report)
    except ValueError as error:
        raise UserError(f"{file} is not a report of blockft eval: {error}") from error
    return cast(dict[str, Any], report)
