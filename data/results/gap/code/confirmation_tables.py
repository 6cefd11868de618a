"""More tables of the confirmation, and its picture, from the files in `sealed`.

python confirmation_tables.py SEALED                 prints the tables, writes SEALED/confirmation.png
python confirmation_tables.py validation RESULTS    the same grouping of the validation questions

`sealed.py tables` has the primary result, which was fixed before the opening. The tables here were made after
the results were known: each seed alone, each set, and questions by the number of documents that they need.
"""

import json
import sys
from pathlib import Path

import numpy as np
from fourth_round import POOLED
from numpy.typing import NDArray
from scores import interval, resampled_mean
from sealed import KINDS, ORDERS, RELATED, SETS, Confirmation, cell
from table import SEEDS, Results

BASELINE, WINNER = "sealed-full-1e-4", "sealed-first-block-1e-4"
MODES = ("block", "full")
NAMES = {"squad": "SQuAD", "fid": "NQ", "hotpotqa": "HotpotQA", "2wikimultihopqa": "2Wiki"}
GROUPS = {
    "one document": ("SQuAD, one document", "NQ, one document"),
    "two documents": (
        "HotpotQA, bridge",
        "HotpotQA, comparison",
        "2Wiki, compositional",
        "2Wiki, inference",
        "2Wiki, comparison",
    ),
    "four documents": ("2Wiki, bridge comparison",),
    "related passages (180, of two to four)": tuple(kind for kind in KINDS if kind.startswith(RELATED[:7])),
}


def members(found: Confirmation, group: str) -> NDArray[np.bool_]:
    """The questions of a group, without those that are answered by yes or no."""
    return np.any([found.chosen(*KINDS[kind]) for kind in GROUPS[group]], axis=0) & found.is_open


def differences(found: Confirmation, mode: str, order: str) -> NDArray[np.float64]:
    return found.hits(WINNER, mode, order) - found.hits(BASELINE, "full", order)


def by_seed(found: Confirmation) -> str:
    rows = ["| seed | `full` | block mode | minus `full` | full mode | minus `full` |", "|---" * 6 + "|"]
    for seed in range(len(found.lines[BASELINE])):
        cells = [f"{seed}"]
        for recipe, mode in ((BASELINE, "full"), (WINNER, "block"), (WINNER, "full")):
            of_orders = [found.by_set(found.hits(recipe, mode, order)[seed : seed + 1]) for order in ORDERS]
            levels = [np.concatenate([*some.values()], axis=1).mean() for some in of_orders]
            cells.append("; ".join(f"{level:.1f}" for level in levels))
            if recipe == WINNER:
                some = [found.by_set(differences(found, mode, order)[seed : seed + 1]) for order in ORDERS]
                cells.append("; ".join(cell(values, True) for values in some))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def by_set(found: Confirmation) -> str:
    rows = [
        "| set | order | `full` | block mode | minus `full` | full mode | minus `full` |",
        "|---" * 7 + "|",
    ]
    sets = {NAMES[name]: (found.sets == name) & found.is_open for name in SETS if name in NAMES}
    for name, chosen in sets.items():
        for order in ORDERS:
            cells = [f"{name} ({chosen.sum()})", order]
            cells.append(f"{found.hits(BASELINE, 'full', order)[:, chosen].mean():.1f}")
            for mode in MODES:
                cells.append(f"{found.hits(WINNER, mode, order)[:, chosen].mean():.1f}")
                cells.append(cell({"all": differences(found, mode, order)[:, chosen]}, True))
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def by_group(found: Confirmation) -> str:
    rows = [
        "| questions need | number | `full` | block mode minus `full`, ascending | shuffled | both orders "
        "| full mode minus `full`, both orders |",
        "|---" * 7 + "|",
    ]
    for group in GROUPS:
        chosen = members(found, group)
        cells = [group, str(chosen.sum()), f"{found.hits(BASELINE, 'full', 'both')[:, chosen].mean():.1f}"]
        for mode, orders in (("block", (*ORDERS, "both")), ("full", ("both",))):
            for order in orders:
                cells.append(cell({"all": differences(found, mode, order)[:, chosen]}, True))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def losses(found: Confirmation) -> str:
    """The mean loss of the gold answers' tokens, which varies less by chance than a match does."""
    rows = ["| model, mode | ascending | shuffled |", "|---|---|---|"]
    for label, recipe, mode in (
        ("`full`, full mode", BASELINE, "full"),
        ("`first-block`, block mode", WINNER, "block"),
        ("`first-block`, full mode", WINNER, "full"),
    ):
        primary = np.isin(found.sets, SETS) & found.is_open
        cells = [
            np.mean([np.array(line["results"][f"{mode} {order}"]["gold_loss"])[primary] for line in lines])
            for lines in [found.lines[recipe]]
            for order in ORDERS
        ]
        rows.append(f"| {label} | " + " | ".join(f"{value:.3f}" for value in cells) + " |")
    return "\n".join(rows)


def picture(found: Confirmation, path: Path) -> None:
    """Differences from `full`, with intervals: all questions, and by the number of documents needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    # the interval of the 14 questions over four documents is wider than all others together
    groups = [group for group in GROUPS if group != "four documents"]
    labels = ["all questions", *groups]
    for ax, order in zip(axes, ORDERS, strict=True):
        for mode, offset, color in (("block", -0.12, "C3"), ("full", 0.12, "C0")):
            values = differences(found, mode, order)
            parts = [found.by_set(values)]
            parts += [{"all": values[:, members(found, group)]} for group in groups]
            for row, part in enumerate(parts):
                low, high = interval(resampled_mean(part))
                mean = np.concatenate([*part.values()], axis=1).mean()
                ax.plot([low, high], [row + offset] * 2, color=color)
                label = f"first-block, {mode} mode" if row == 0 else None
                ax.plot(mean, row + offset, "o", color=color, label=label)
        ax.axvline(0, color="black", lw=0.8)
        ax.axvline(-1, color="gray", ls=":", label="the aim: -1.0")
        ax.set(title=f"{order} order", xlabel="points of substring match, minus full")
        ax.set_yticks(range(len(labels)), [label.split(" (")[0] for label in labels])
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def validation_by_group(folder: Path) -> str:
    """`first-block` at 1e-4 against `full`, three seeds, by the number of documents, in each order."""
    results = Results(folder)
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    sets, types = np.array(questions["sets"]), np.array(questions["types"])
    is_open = np.array([c == "0" for c in questions["yes_no"]])

    def hits(recipe: str, mode: str, order: str) -> NDArray[np.float64]:
        return np.array([results.hits(name, f"{mode} {order}") for name in SEEDS[recipe]])

    rows = [
        "| questions need | number | block mode minus `full`, ascending | shuffled "
        "| full mode minus `full`, ascending | shuffled |",
        "|---" * 6 + "|",
    ]
    for group, kinds in POOLED.items():
        some = [KINDS[kind] for kind in kinds]
        chosen = (
            np.any([(sets == name) & np.isin(types, of_kind) for name, of_kind in some], axis=0) & is_open
        )
        cells = [group, str(chosen.sum())]
        for mode in MODES:
            for order in ORDERS:
                difference = hits("first-block", mode, order) - hits("full", "full", order)
                cells.append(cell({"all": difference[:, chosen]}, True))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(folder: Path) -> None:
    found = Confirmation(folder)
    for title, table in (
        ("By seed", by_seed(found)),
        ("By set", by_set(found)),
        ("By number of documents", by_group(found)),
        ("Loss of gold answers", losses(found)),
    ):
        print(f"### {title}\n\n{table}\n")
    picture(found, folder / "confirmation.png")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["validation", folder]:
            print(validation_by_group(Path(folder)))
        case [folder]:
            main(Path(folder))
        case _:
            sys.exit(__doc__)
