"""`blockft compare`: reports of `eval` side by side, as a table and a picture."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blockft.errors import UserError
from blockft.rundir import save_figure
from blockft.stages.evaluate import REPORT

METRIC = "substring_match"


def compare(paths: list[Path], *, png: Path | None = None) -> None:
    """Print the substring match of every report and mode, for all questions and each group they share.

    Raises:
        UserError: a path is no report.
    """
    folders = [path.parent if path.is_file() else path for path in paths]
    short = [folder.name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    columns = {
        f"{mode} {name}": groups
        for name, path in zip(names, paths, strict=True)
        for mode, groups in _read(path)["modes"].items()
    }
    rows = [group for group in next(iter(columns.values())) if all(group in c for c in columns.values())]
    table = Table("questions", "number", *columns, title="answers that contain a gold answer, %")
    for group in rows:
        numbers = {groups[group]["questions"] for groups in columns.values()}
        scores = (f"{groups[group][METRIC]:.1f}" for groups in columns.values())
        table.add_row(group, " / ".join(map(str, sorted(numbers))), *scores)
    Console().print(table)
    if png:
        _draw(columns, rows, png)


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
    return report


def _draw(columns: dict[str, Any], rows: list[str], png: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(columns)
    for i, (name, groups) in enumerate(columns.items()):
        bars = axes.bar([x + i * width for x in range(len(rows))], [groups[g][METRIC] for g in rows], width)
        bars.set_label(name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], rows)
    axes.set(ylim=(0, 108), ylabel="answers that contain a gold answer, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(columns), frameon=False)
    save_figure(figure, png)
