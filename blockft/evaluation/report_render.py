"""Reports for people: scores as text, a report as a markdown page, and bar charts of scores."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from blockft.evaluation.report import DIFFERENCE, INTERVALS
from blockft.markdown import escape_markdown, markdown_table
from blockft.outputs import plain_label

Groups = Mapping[str, Mapping[str, Any]]
"""The scores of each group of questions in one mode: an entry of a report's `modes`."""

TITLES = {
    "substring_match": "answers that contain a gold answer, %",
    "word_match": "answers that contain a gold answer as whole words, %",
    "exact_match": "answers that equal a gold answer, %",
    "token_f1": "mean F1 of the words of answer and gold answer, %",
}
"""What each metric shows."""

MODE_COLOURS = {"block": "tab:blue", "full": "tab:orange"}
"""One colour per mode, the same in every picture."""


def format_score(scores: Mapping[str, Any], metric: str, *, signed: bool = False) -> str:
    """Format a score and its interval, such as "46.0 [40.1, 51.2]"."""
    low, high = scores[INTERVALS][metric]
    sign = "+" if signed else ""
    return f"{scores[metric]:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def report_markdown(report: Mapping[str, Any]) -> str:
    """Format a report as a markdown page: a table per metric, then everything that decided the answers."""
    modes = report["modes"]
    columns = dict(modes) | ({DIFFERENCE: report[DIFFERENCE]} if DIFFERENCE in report else {})
    parts = [f"# Evaluation of {escape_markdown(report['model'])}"]
    for metric, title in TITLES.items():
        rows = [
            [
                group,
                scores["questions"],
                *(
                    format_score(groups[group], metric, signed=name == DIFFERENCE)
                    for name, groups in columns.items()
                ),
            ]
            for group, scores in next(iter(modes.values())).items()
        ]
        parts += [f"## {title}", markdown_table(["questions", "number", *columns], rows)]
    bootstrap = report[INTERVALS]
    parts.append(
        f"In brackets: {bootstrap['level']:.0%} intervals by percentile bootstrap over questions "
        f"({bootstrap['resamples']:,} resamples, seed {bootstrap['seed']}). "
        f"The intervals of {DIFFERENCE} are paired."
    )
    options = [[name, _format_value(value)] for name, value in report["options"].items()]
    for mode, prompts in report["prompts"].items():
        options += [
            [f"{name.replace('_', ' ')}, {mode} mode", _format_value(value)]
            for name, value in prompts.items()
        ]
    return "\n\n".join([*parts, "## Options", markdown_table(["option", "value"], options)]) + "\n"


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_format_value(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(map(_format_value, value))
    if isinstance(value, str):
        return value if value.isprintable() else json.dumps(value, ensure_ascii=False)
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def draw_scores(
    reports: Mapping[str, Mapping[str, Groups]], groups: Sequence[str], metric: str, *, title: str
) -> Figure:
    """Draw horizontal bars with intervals: one bar per group of questions, report and mode.

    Each bar has its report's name at its left and its score at its right. With a single report the groups
    stand at the left instead. A mode has the same colour everywhere.

    reports: report name -> mode -> group -> scores.
    """
    rows = [(group, name, mode) for group in groups for name in reports for mode in reports[name]]
    bar, report_gap, group_gap = 1.0, 0.35, 1.3 if len(reports) > 1 else 0.0
    positions: list[float] = []
    labels: dict[float, str] = {}
    headers: dict[float, str] = {}
    top = 0.0
    for group in groups:
        if len(reports) > 1:
            headers[top + group_gap / 2] = plain_label(group)
            top += group_gap
        for name, modes in reports.items():
            middle = top + len(modes) * bar / 2
            labels[middle] = plain_label(name if len(reports) > 1 else group)
            positions += [top + (i + 0.5) * bar for i in range(len(modes))]
            top += len(modes) * bar + report_gap
    figure = Figure(figsize=(8, 1.6 + 0.2 * top), layout="constrained")
    axes = figure.subplots()
    highest = 0.0
    for position, (group, name, mode) in zip(positions, rows, strict=True):
        scores = reports[name][mode][group]
        score, (low, high) = scores[metric], scores[INTERVALS][metric]
        # rounding can put the mean just outside its interval
        errors = [[max(0.0, score - low)], [max(0.0, high - score)]]
        axes.barh(position, score, 0.85 * bar, color=MODE_COLOURS[mode])
        axes.errorbar(score, position, xerr=errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        axes.annotate(
            f"{score:.1f}", (max(high, score), position), (4, 0), textcoords="offset points", va="center"
        ).set_fontsize(8)
        highest = max(highest, high, score)
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
    for position, group in headers.items():
        axes.text(0, position, f" {group}", va="center", fontsize=9, fontweight="bold")
    axes.set(ylim=(top, 0), xlim=(0, max(5.0, 1.12 * highest)), xlabel=TITLES[metric])
    axes.set_title(plain_label(title), fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    used_modes = dict.fromkeys(mode for _, _, mode in rows)
    handles = [axes.barh(0, 0, color=MODE_COLOURS[mode], label=f"{mode} mode") for mode in used_modes]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure
