"""The picture of the baselines, from the study's JSON files.

python baselines.py RESULTS     writes RESULTS/baselines.png

Left: SmolLM2-135M on the validation questions, all from one model (`full`, 40 % of the data), beside what
plain block fine-tuning with the same data and steps gives. Right: the demo's base model on its own questions,
by the methods of `blockft eval --method`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from demo_methods import read_scores
from scores import interval, resampled_mean
from table import METRIC, ORDERS, Results, Scores, mean

LEFT = {
    "most frequent answer": ("", "prior"),
    "no re-encoding": ("untrained-baselines", "no re-encoding"),
    "the block mask alone": ("full", "block"),
    "first tokens hidden": ("untrained-baselines", "first tokens hidden"),
    "first tokens shared": ("untrained-baselines", "first tokens shared"),
    "first block shared": ("untrained-baselines", "first block shared"),
    "block fine-tuned, block mode": ("both", "block"),
    "full attention": ("full", "full"),
}
"""Label -> experiment and evaluation."""


def draw_bar(ax: Any, place: float, scores: Scores, color: str, height: float, label: str | None) -> None:
    low, high = interval(resampled_mean(scores))
    middle = mean(scores)
    ax.barh(place, middle, height, color=color, label=label)
    ax.plot([low, high], [place, place], color="black", lw=1)


def draw_study(ax: Any, results: Results) -> None:
    for row, (name, evaluation) in enumerate(LEFT.values()):
        for order, offset, color in zip(ORDERS, (-0.2, 0.2), ("C0", "C1"), strict=True):
            if name:
                scores = results.of(name, f"{evaluation} {order}")
            else:
                scores = results.reading(results.prior[METRIC])
            draw_bar(ax, row + offset, scores, color, 0.36, f"{order} order" if row == 0 else None)
    ax.set_yticks(range(len(LEFT)), list(LEFT))
    ax.set(title="SmolLM2-135M, 1,079 questions", xlabel="substring match, %")
    ax.invert_yaxis()
    ax.legend(fontsize=8, loc="upper right")


def draw_demo(ax: Any, path: Path) -> None:
    found = [(label.replace("`", ""), hits) for label, hits in read_scores(path)]
    # all tokens recomputed are full attention, and the first block has one token there
    found = [(label, hits) for label, hits in found if not label.endswith(("share 1.0", "start_tokens 2"))]
    found.sort(key=lambda pair: float(np.mean(pair[1])))
    for row, (_, hits) in enumerate(found):
        draw_bar(ax, row, {"all": hits}, "C2", 0.7, None)
    ax.set_yticks(range(len(found)), [label for label, _ in found], fontsize=8)
    ax.set(title="the demo, 1,200 questions", xlabel="substring match, %")
    ax.invert_yaxis()


def main(folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_study(left, Results(folder))
    draw_demo(right, folder / "world" / "methods.json")
    figure.savefig(folder / "baselines.png", dpi=110)


if __name__ == "__main__":
    match sys.argv[1:]:
        case [folder]:
            main(Path(folder))
        case _:
            sys.exit(__doc__)
