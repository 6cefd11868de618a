"""Reports for people: as markdown, and as a picture."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from blockft.evaluation.report import DIFFERENCE, INTERVALS

Groups = Mapping[str, Mapping[str, Any]]
"""The scores of each group of questions: what a report holds for a mode."""

TITLES = {
    "substring_match": "answers that contain a gold answer, %",
    "exact_match": "answers that equal a gold answer, %",
    "token_f1": "mean F1 of the words of answer and gold answer, %",
}
"""What each metric shows."""


def format_score(scores: Mapping[str, Any], metric: str, *, signed: bool = False) -> str:
    """A score and its interval."""
    low, high = scores[INTERVALS][metric]
    sign = "+" if signed else ""
    return f"{scores[metric]:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: a table for each metric, then all that decided the answers."""
    modes = report["modes"]
    columns = dict(modes) | ({DIFFERENCE: report[DIFFERENCE]} if DIFFERENCE in report else {})
    parts = [f"# Evaluation of {report['model']}"]
    for metric, title in TITLES.items():
        rows = [
            [
                group,
                scores["questions"],
                *(format_score(c[group], metric, signed=name == DIFFERENCE) for name, c in columns.items()),
            ]
            for group, scores in next(iter(modes.values())).items()
        ]
        parts += [f"## {title}", markdown_table(["questions", "number", *columns], rows)]
    drawn = report[INTERVALS]
    parts.append(
        f"In brackets: {drawn['level']:.0%} intervals by percentile bootstrap over questions "
        f"({drawn['resamples']:,} resamples, seed {drawn['seed']}); those of {DIFFERENCE} are paired."
    )
    facts = [[name, _plain(value)] for name, value in report["options"].items()]
    for mode, prompts in report["prompts"].items():
        facts += [
            [f"{name.replace('_', ' ')}, {mode} mode", _plain(value)] for name, value in prompts.items()
        ]
    return "\n\n".join([*parts, "## How", markdown_table(["what", "value"], facts)]) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    if isinstance(value, str):
        return value if value.isprintable() else json.dumps(value, ensure_ascii=False)
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def draw_scores(columns: Mapping[str, Groups], groups: Sequence[str], metric: str) -> Figure:
    """Bars with intervals, one for each column in each group."""
    figure = Figure(figsize=(max(7, 1.2 + 0.45 * len(columns) * len(groups)), 4.5), layout="constrained")
    axes = figure.subplots()
    width, highest = 0.8 / len(columns), 0.0
    for i, (name, scores) in enumerate(columns.items()):
        heights = [scores[group][metric] for group in groups]
        ends = [scores[group][INTERVALS][metric] for group in groups]
        # an interval may lie beside the mean by a rounding error
        errors = [
            [max(0.0, height - low) for height, (low, _) in zip(heights, ends, strict=True)],
            [max(0.0, high - height) for height, (_, high) in zip(heights, ends, strict=True)],
        ]
        places = [x + i * width for x in range(len(groups))]
        axes.bar(places, heights, width, label=name)
        axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        for place, height, (_, high) in zip(places, heights, ends, strict=True):
            axes.text(place, high + 0.5, f"{height:.0f}", ha="center", va="bottom", fontsize=8)
        highest = max(highest, *(high for _, high in ends))
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], groups, fontsize=8)
    axes.set(ylim=(0, max(5.0, 1.08 * highest)), ylabel=TITLES[metric])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(3, len(columns)), frameon=False)
    return figure
