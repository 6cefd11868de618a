"""The evaluations of paper-mini.sh as one table in the paper's layout: JSON, markdown and a picture.

python data/paper-mini/table.py out/paper-mini data/results/paper-mini
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from blockft.bench.measurement import measurement_provenance
from blockft.config.recipe import load_recipe
from blockft.evaluation.bootstrap import bootstrap_interval
from blockft.evaluation.report import ALL, INTERVALS
from blockft.evaluation.report_render import draw_scores, format_score, markdown_table
from blockft.run_folder import RECIPE, read_metrics

METRIC = "substring_match"
SOURCES = {
    "squad": "SQuAD-new-wiki",
    "fid": "NQ",
    "hotpotqa": "HotpotQA",
    "2wikimultihopqa": "2Wiki",
    ALL: "all",
}
"""The names of the recipe's questions, in the order of the columns."""

REFERENCE = "full fine-tuned, full attention"
ROWS = {
    "before, full attention": ("before", "full", None),
    "before, block mask": ("before", "block", None),
    REFERENCE: ("full", "full", 71.3),
    "full fine-tuned, block mask": ("full", "block", 50.0),
    "block fine-tuned, no position re-encoding": ("local", "block", 68.1),
    "block fine-tuned, block mode only": ("block-only", "block", None),
    "block fine-tuned, block mode": ("both", "block", 70.0),
    "block fine-tuned, full mode": ("both", "full", 71.8),
}
"""Each row's evaluation and mode, and the paper's mean over its four data sets (Llama-3.1-Tulu-3-8B)."""


def main(out: Path, results: Path) -> None:
    reports = {
        name: json.loads((out / name / "eval/report.json").read_text()) for name, _, _ in ROWS.values()
    }
    hits = {
        row: _hits(out / name / "eval" / f"predictions-{mode}.jsonl") for row, (name, mode, _) in ROWS.items()
    }
    scores = {row: reports[name]["modes"][mode] for row, (name, mode, _) in ROWS.items()}
    groups = [group for group in SOURCES if group in scores[REFERENCE]]
    runs = {name: _run(out / name / "run") for name in reports if name != "before"}
    assert len({run["steps"] for run in runs.values()}) == 1, (
        "the models trained for different numbers of steps"
    )
    differences = {row: _difference(hits[row], hits[REFERENCE]) for row in ROWS}
    table: dict[str, Any] = {
        **measurement_provenance(),
        "command": "bash data/paper-mini/paper-mini.sh",
        "metric": METRIC,
        "settings": (out / "settings").read_text().split(),
        "rows": {
            row: {
                "evaluation": name,
                "mode": mode,
                "paper": paper,
                "scores": {group: scores[row][group] for group in groups},
                "difference to full fine-tuning": differences[row],
            }
            for row, (name, mode, paper) in ROWS.items()
        },
        "runs": runs,
        "reports": reports,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_name(f"{results.name}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    page = markdown_table(
        ["model and mode", *(SOURCES[group] for group in groups), "all, difference to full", "paper, mean"],
        [
            [
                row,
                *(format_score(scores[row][group], METRIC) for group in groups),
                "" if row == REFERENCE else format_score(differences[row], METRIC, signed=True),
                paper or "",
            ]
            for row, (_, _, paper) in ROWS.items()
        ],
    )
    results.with_name(f"{results.name}.md").write_text(page + "\n", encoding="utf-8")
    named = {
        row: {mode: {SOURCES[group]: scores[row][group] for group in groups}}
        for row, (_, mode, _) in ROWS.items()
    }
    picture = draw_scores(
        named, [SOURCES[group] for group in groups], METRIC, title="Block-Attention fine-tuning, small table"
    )
    picture.savefig(results.with_name(f"{results.name}.png"), dpi=120)
    print(page)


def _hits(path: Path) -> list[tuple[str, float]]:
    """Return each question and its score, in the order of the file. A question may occur twice."""
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return [(f"{line['groups'][0]} {line['id']}", 100 * line["scores"][METRIC]) for line in lines]


def _difference(hits: list[tuple[str, float]], reference: list[tuple[str, float]]) -> dict[str, Any]:
    """Return the mean difference of a row to the reference, with its interval over pairs of answers."""
    assert [q for q, _ in hits] == [q for q, _ in reference], "the evaluations asked different questions"
    differences = [score - other for (_, score), (_, other) in zip(hits, reference, strict=True)]
    return {METRIC: statistics.fmean(differences), INTERVALS: {METRIC: bootstrap_interval(differences)}}


def _run(run: Path) -> dict[str, Any]:
    recipe = load_recipe(str(run / RECIPE))
    lines = [line for line in read_metrics(run) if "loss" in line]
    return {
        "modes": [str(mode) for mode in recipe.data.modes],
        "positions": str(recipe.data.positions),
        "seed": recipe.train.seed,
        "steps": lines[-1]["step"],
        "tokens_per_step": recipe.train.batch_rows * recipe.data.row_len,
        "last_loss": lines[-1]["loss"],
        "median_tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
