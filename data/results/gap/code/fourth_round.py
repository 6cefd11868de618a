"""The tables of the fourth round, and all candidates by kind of question: python fourth_round.py RESULTS"""

import json
import sys
from pathlib import Path

import numpy as np

from scores import interval, resampled_mean
from sealed import KINDS
from table import ORDERS, SEEDS, SETS, Results, against_baselines, compare, mean

RANKING = tuple(f"first-block-ranking-1e-4{seed}" for seed in ("", "-seed1", "-seed2"))
FULL_RANKING = "full-ranking-1e-4"
OF_BASELINE = dict(zip(RANKING, SEEDS["full"], strict=True))

POOLED = {
    "one document": ("SQuAD, one document", "NQ, one document"),
    "two documents": ("HotpotQA, bridge", "HotpotQA, comparison", "2Wiki, compositional")
    + ("2Wiki, comparison", "2Wiki, inference", "MuSiQue, 2 hops"),
    "three or four documents": ("2Wiki, bridge comparison", "MuSiQue, 3 hops", "MuSiQue, 4 hops"),
}
"""Kinds of question by the documents that an answer needs."""


def comparisons(results: Results) -> str:
    rows = ["| comparison | ascending | shuffled | both orders |", "|---|---|---|---|"]
    full, first, ranking = list(SEEDS["full"]), list(SEEDS["first-block"]), list(RANKING)

    def add(label: str, one: list[str], e: str, other: list[str], f: str) -> None:
        cells = compare(results, [(n, e) for n in one], [(n, f) for n in other])
        rows.append(f"| {label} | " + " | ".join(cells) + " |")

    add("ranking loss, block mode, minus `full`, three seeds", ranking, "block", full, "full")
    add("ranking loss, full mode, minus `full`, three seeds", ranking, "full", full, "full")
    add("ranking loss, block mode minus full mode, three seeds", ranking, "block", ranking, "full")
    add("ranking loss minus none, `first-block`, block mode, three seeds", ranking, "block", first, "block")
    add("ranking loss minus none, `first-block`, full mode, three seeds", ranking, "full", first, "full")
    add("ranking loss minus none, `full`, seed 0", [FULL_RANKING], "full", full[:1], "full")
    add("ranking loss, one seed, minus none, three seeds, `full`", [FULL_RANKING] * 3, "full", full, "full")
    add(
        "ranking loss, block mode, minus `full` with it, seed 0",
        ranking[:1],
        "block",
        [FULL_RANKING],
        "full",
    )
    add(
        "ranking loss, block mode, three seeds, minus `full` with it, one seed",
        ranking,
        "block",
        [FULL_RANKING] * 3,
        "full",
    )
    twice = [f"{ranking[0]}-twice", f"{ranking[1]}-best-3"]
    add(
        "best 3: ranking loss, block mode read twice minus once, two seeds",
        twice,
        "block, best 3",
        ranking[:2],
        "block",
    )
    add(
        "best 3: ranking loss, block mode read twice, minus `full` read once, two seeds",
        twice,
        "block, best 3",
        full[:2],
        "full",
    )
    add(
        "best 3: ranking loss, block mode, minus `full` of seed 1, both read twice, two seeds",
        twice,
        "block, best 3",
        [f"{full[1]}-twice"] * 2,
        "full, best 3",
    )
    return "\n".join(rows)


def second_readings(results: Results) -> str:
    rows = [
        "| model, mode | ascending: read most | once | best 3 | shuffled: read most | once | best 3 |",
        "|---" * 7 + "|",
    ]
    for name, asked, mode in (
        (SEEDS["full"][1], f"{SEEDS['full'][1]}-twice", "full"),
        *((name, f"{name}-twice", "block") for name in SEEDS["first-block"][1:]),
        (RANKING[0], f"{RANKING[0]}-twice", "block"),
        (RANKING[1], f"{RANKING[1]}-best-3", "block"),
    ):
        cells = []
        for order in ORDERS:
            result = results.lines[asked]["results"][f"{mode}, best 3 {order}"]
            cells.append(f"{mean(results.reading(result['reading']['last_document_supports'])):.1f}")
            cells.append(f"{mean(results.of(name, f'{mode} {order}')):.1f}")
            cells.append(f"{mean(results.reading(result['scores']['substring_match'])):.1f}")
        rows.append(f"| {name}, {mode} mode | " + " | ".join(cells) + " |")
    return "\n".join(rows)


MODELS = {
    "`full`": (SEEDS["full"], "full"),
    "`full`, ranking loss": ((FULL_RANKING,), "full"),
    "`both`": (("both-rate-1e-4",), "block"),
    "`first-block`": (SEEDS["first-block"], "block"),
    "`first-block`, ranking loss": (RANKING, "block"),
}


def kinds_of_question(results: Results, out: Path) -> str:
    """Scores and differences from `full` by kind of question, both orders; yes-or-no questions left out."""
    questions = json.loads((out / "questions.json").read_text(encoding="utf-8"))
    sets, types = np.array(questions["sets"]), np.array(questions["types"])
    is_open = np.array([c == "0" for c in questions["yes_no"]])
    chosen = {
        kind: (sets == name) & np.isin(types, some) & is_open
        for kind, (name, some) in KINDS.items()
        if name in SETS
    }
    assert sum(int(c.sum()) for c in chosen.values()) == int(is_open.sum()), sorted(SETS)
    pooled = {name: np.any([chosen[kind] for kind in kinds], axis=0) for name, kinds in POOLED.items()}

    def hits(names: tuple[str, ...], mode: str) -> np.ndarray:
        runs = [[results.hits(n, f"{mode} {order}") for order in ORDERS] for n in names]
        return np.array(runs).mean(axis=1)

    full = hits(*MODELS["`full`"])
    rows = ["| questions | number | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 2) + "|"]
    for kind, of_kind in {**pooled, **chosen}.items():
        cells = [kind, str(of_kind.sum())]
        for label, (names, mode) in MODELS.items():
            own = hits(names, mode)[:, of_kind]
            # a model of one seed has the reference of that seed
            difference = own - full[: len(own), of_kind]
            low, high = interval(resampled_mean({"all": difference}))
            cell = f"{own.mean():.1f}"
            if label != "`full`":
                cell += f"; {difference.mean():+.1f}"
                if of_kind.sum() >= 20:
                    cell += f" [{low:+.1f}, {high:+.1f}]"
            cells.append(cell)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(out: Path) -> None:
    results = Results(out)
    print(against_baselines(results, OF_BASELINE), end="\n\n")
    orders = [mean(results.of(FULL_RANKING, f"full {order}")) for order in ORDERS]
    print(f"{FULL_RANKING}: {orders[0]:.1f}; {orders[1]:.1f}", end="\n\n")
    print(comparisons(results), end="\n\n")
    print(second_readings(results), end="\n\n")
    print(kinds_of_question(results, out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
