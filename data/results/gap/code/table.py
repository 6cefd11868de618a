"""From the drivers' lines to one JSON file per experiment, and from those to the study's tables and picture.

python table.py collect DATA LINES.jsonl ... OUT     writes OUT/NAME.json and OUT/questions.json
python table.py show DATA OUT                             writes OUT/tables.md and OUT/recomputation.png
"""

import json
import lzma
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scores import METRICS, interval, is_yes_no, prior_answers, question_type, resampled_mean

SETS = {
    "squad": "SQuAD",
    "fid": "NQ",
    "hotpotqa": "HotpotQA",
    "2wikimultihopqa": "2Wiki",
    "musique": "MuSiQue",
}
ORDERS = ("ascending", "shuffled")
METRIC = "substring_match"
SCALES = {
    "40 % of the data, 400 steps": (("full", "full-seed1"), ("both", "both-seed1")),
    "all data, 1,000 steps": (("full-all",), ("both-all", "both-all-seed1")),
}
"""Of each scale the seeds of the baseline and of the plain block recipe; their means are the references."""

Scores = dict[str, NDArray[np.float64]]
"""Scores in percent by set, of the questions that are not answered by yes or no."""


def load_data(folder: Path) -> dict[str, Any]:
    content = lzma.decompress((folder / "prepared.pt.xz").read_bytes())
    data: dict[str, Any] = torch.load(BytesIO(content), weights_only=False)
    return data


def collect(folder: Path, lines: list[Path], out: Path) -> None:
    data = load_data(folder)
    validation = [q for q in data["questions"] if q["part"] == "validation"]
    questions = {
        "sets": [q["source"] for q in validation],
        "ids": [q["id"] for q in validation],
        "types": [q["type"] for q in validation],
        "yes_no": "".join(str(int(is_yes_no(q["answers"]))) for q in validation),
        "prior": prior_scores(data, validation),
    }
    (out / "questions.json").write_text(json.dumps(questions) + "\n", encoding="utf-8")
    for path in lines:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = renamed(json.loads(text))
            assert "error" not in line, line
            for result in line["results"].values():
                result["gold_loss"] = [round(x, 2) for x in result["gold_loss"]]
            (out / f"{line['name']}.json").write_text(json.dumps(line) + "\n", encoding="utf-8")


NEW_NAMES = {
    "see-ahead": "bidirectional",
    "twice": "question-twice",
    "first-block-twice": "first-block-question-twice",
    "joins": "merged-documents",
    "raised": "mask-loss-weights",
    "gists": "end-tokens",
    "recomputed": "recomputation",
}
NEW_KEYS = {
    "what": "description",
    "askings": "evaluations",
    "wording": "prompt_options",
    "sees_ahead": "is_bidirectional",
    "gist_tokens": "end_tokens",
    "keeps": "keep_weights",
}
"""Experiments and settings that were renamed after they had run."""


def renamed(line: dict[str, Any]) -> dict[str, Any]:
    """A driver's line with the names that experiments and settings have now."""

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {NEW_KEYS.get(key, key): keys(inner) for key, inner in value.items()}
        return value

    line = {**line, "name": NEW_NAMES.get(line["name"], line["name"]), "settings": keys(line["settings"])}
    line["settings"]["name"] = line["name"]
    # what ran as "53ce5e5+base.patch" was the first of the two commits of that patch
    line["commit"] = {"53ce5e5+base.patch": "912988b"}.get(line["commit"], line["commit"])
    return line


def prior_scores(data: dict[str, Any], validation: list[dict[str, Any]]) -> dict[str, str]:
    """The prior baseline's hits by metric: the most frequent training answer of each question type."""
    train = [
        {"source": q["source"], "question": q["question"], "answer": q["answers"][0]}
        for q in data["questions"]
        if q["part"] == "train"
    ]
    best = prior_answers(train)
    answers = [best.get((q["source"], question_type(q["question"])), "") for q in validation]
    return {
        name: "".join(str(int(metric(a, q["answers"]))) for a, q in zip(answers, validation, strict=True))
        for name, metric in METRICS.items()
    }


class Results:
    """The scores of all experiments, by set."""

    def __init__(self, out: Path) -> None:
        questions = json.loads((out / "questions.json").read_text(encoding="utf-8"))
        self._sets = np.array(questions["sets"])
        self._is_yes_no = np.array([c == "1" for c in questions["yes_no"]])
        self.prior = questions["prior"]
        self.lines = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(out.glob("*.json"))
            if path.stem not in ("questions", "split", "more")
        }

    def reading(self, hits: str) -> Scores:
        values = np.array([100.0 * (c == "1") for c in hits])
        return {name: values[(self._sets == name) & ~self._is_yes_no] for name in SETS}

    def of(self, name: str, evaluation: str, metric: str = METRIC) -> Scores:
        return self.reading(self.lines[name]["results"][evaluation]["scores"][metric])

    def hits(self, name: str, evaluation: str) -> NDArray[np.float64]:
        """The scores of all questions in percent."""
        found = self.lines[name]["results"][evaluation]["scores"][METRIC]
        return np.array([100.0 * (c == "1") for c in found])

    def is_read_most(self, name: str, mode: str, order: str) -> NDArray[np.float64]:
        """100 where a model attends most to a document that supports the answer, 0 elsewhere, of all questions."""
        reading = self.lines[f"{name}-twice"]["results"][f"{mode}, sorted {order}"]["reading"]
        return np.array([100.0 * (c == "1") for c in reading["last_document_supports"]])

    def yes_no(self, hits: str) -> float:
        values = np.array([100.0 * (c == "1") for c in hits])
        return float(values[self._is_yes_no].mean())

    def loss(self, name: str, evaluation: str) -> float:
        losses = np.array(self.lines[name]["results"][evaluation]["gold_loss"])
        return float(losses[~self._is_yes_no].mean())


def mean(scores: Scores) -> float:
    return float(np.mean(np.concatenate([np.atleast_2d(s).mean(axis=0) for s in scores.values()])))


def minus(a: Scores, b: Scores) -> Scores:
    return {name: a[name] - b[name] for name in SETS}


def averaged(several: list[Scores]) -> Scores:
    return {name: np.mean([scores[name] for scores in several], axis=0) for name in SETS}


def with_interval(scores: Scores, signed: bool = False) -> str:
    low, high = interval(resampled_mean(scores))
    sign = "+" if signed else ""
    return f"{mean(scores):{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def verdict(difference: Scores) -> str:
    low, high = interval(resampled_mean(difference))
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def is_second_round(line: dict[str, Any]) -> bool:
    """Whether an experiment differs from the first round in what all of its experiments have in common."""
    training = line["settings"]["training"]
    steps = 1000 if training["data_share"] == 1.0 else 400
    return bool(training.get("sharing") or training["learning_rate"] != 2.5e-4 or training["steps"] != steps)


def scale_of(line: dict[str, Any]) -> str:
    training = line["settings"]["training"]
    return list(SCALES)[bool(training and training["data_share"] == 1.0)]


def main_table(results: Results, scale: str) -> str:
    """The block mode of every experiment of a scale against the baseline and against the plain recipe."""
    baselines, plains = SCALES[scale]
    head = (
        "| experiment | what | seed | block, ascending | minus baseline | block, shuffled | minus baseline "
        "| full mode minus baseline, ascending; shuffled | block mode minus plain recipe, both orders "
        "| loss of gold answers, ascending; shuffled | verdict |"
    )
    rows = [head, "|---" * 11 + "|"]
    for name, line in results.lines.items():
        training = line["settings"]["training"]
        if not training or scale_of(line) != scale or training["modes"] == "full" or is_second_round(line):
            continue
        block = [results.of(name, f"block {order}") for order in ORDERS]
        full = [averaged([results.of(b, f"full {order}") for b in baselines]) for order in ORDERS]
        own_full = "; ".join(
            f"{mean(minus(results.of(name, f'full {order}'), b)):+.1f}"
            if f"full {order}" in line["results"]
            else "-"
            for order, b in zip(ORDERS, full, strict=True)
        )
        of_plain = averaged([results.of(p, f"block {order}") for order in ORDERS for p in plains])
        to_plain = minus(averaged(block), of_plain)
        is_plain = name in plains
        cells = [name, line["settings"]["description"], str(training["seed"])]
        for scores, reference in zip(block, full, strict=True):
            cells += [f"{mean(scores):.1f}", with_interval(minus(scores, reference), signed=True)]
        losses = "; ".join(f"{results.loss(name, f'block {order}'):.3f}" for order in ORDERS)
        cells += [own_full, "" if is_plain else with_interval(to_plain, True), losses]
        cells.append("plain recipe" if is_plain else verdict(to_plain))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def baseline_table(results: Results) -> str:
    """Baselines that know no block fine-tuning, in percent."""
    rows = ["| what | experiment | ascending | shuffled |", "|---|---|---|---|"]
    prior = with_interval(results.reading(results.prior[METRIC]))
    rows.append(f"| most frequent training answer of the question's type | prior | {prior} | the same |")
    for name in ("full", "full-seed1", "full-ranking", "full-fewer-documents", "full-all"):
        line = results.lines[name]
        for mode, words in (("full", "full attention"), ("block", "the block mask alone")):
            if f"{mode} ascending" in line["results"]:
                cells = [with_interval(results.of(name, f"{mode} {order}")) for order in ORDERS]
                rows.append(
                    f"| {line['settings']['description']}; {words} | {name} | " + " | ".join(cells) + " |"
                )
    for evaluation in results.lines["untrained-baselines"]["settings"]["evaluations"]:
        cells = [
            with_interval(results.of("untrained-baselines", f"{evaluation} {order}")) for order in ORDERS
        ]
        rows.append(
            f"| `full` under the block mask; {evaluation} | untrained-baselines | " + " | ".join(cells) + " |"
        )
    return "\n".join(rows)


def set_table(results: Results, rows: list[tuple[str, str]]) -> str:
    """Scores by set, beside them whole words, yes or no and the loss."""
    names = " | ".join(
        f"{name} ({len(results.of('full', 'full ascending')[key])})" for key, name in SETS.items()
    )
    table = [
        f"| experiment, mode, order | {names} | mean | whole words | yes or no | loss |",
        "|---" * (len(SETS) + 5) + "|",
    ]
    prior = results.reading(results.prior[METRIC])
    cells = [f"{scores.mean():.1f}" for scores in prior.values()]
    words = mean(results.reading(results.prior["word_match"]))
    cells += [f"{mean(prior):.1f}", f"{words:.1f}", f"{results.yes_no(results.prior[METRIC]):.0f}", ""]
    table.append("| prior | " + " | ".join(cells) + " |")
    for name, mode in rows:
        for order in ORDERS:
            evaluation = f"{mode} {order}"
            scores = results.of(name, evaluation)
            cells = [f"{values.mean():.1f}" for values in scores.values()]
            cells += [
                f"{mean(scores):.1f}",
                f"{mean(results.of(name, evaluation, 'word_match')):.1f}",
                f"{results.yes_no(results.lines[name]['results'][evaluation]['scores'][METRIC]):.0f}",
                f"{results.loss(name, evaluation):.3f}",
            ]
            table.append(f"| {name}, {mode} mode, {order} | " + " | ".join(cells) + " |")
    return "\n".join(table)


def recomputation(results: Results, out: Path) -> str:
    """The curve of selective recomputation, as a table and a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    table = [
        "| recomputed | choice | ascending | minus block mode | shuffled | minus block mode |",
        "|---|---|---|---|---|---|",
    ]
    points: dict[tuple[str, str], list[tuple[float, Scores]]] = {}
    for choice in ("first", "changed"):
        for order in ORDERS:
            points[choice, order] = [(0.0, results.of("both-all", f"block {order}"))]
        for share in (5, 10, 20):
            cells = [f"{share} %", choice]
            for order in ORDERS:
                scores = results.of("recomputation", f"{choice} {share} % {order}")
                points[choice, order].append((share, scores))
                difference = minus(scores, points[choice, order][0][1])
                cells += [f"{mean(scores):.1f}", with_interval(difference, True)]
            table.append("| " + " | ".join(cells) + " |")
    cells = ["100 % (full mode)", ""]
    for order in ORDERS:
        scores = results.of("both-all", f"full {order}")
        cells += [
            f"{mean(scores):.1f}",
            with_interval(minus(scores, results.of("both-all", f"block {order}")), True),
        ]
    table.append("| " + " | ".join(cells) + " |")
    for ax, order in zip(axes, ORDERS, strict=True):
        for choice, label in (("first", "first of their blocks"), ("changed", "values changed most")):
            shares, scores = zip(*points[choice, order], strict=True)
            bounds = np.array([interval(resampled_mean(s)) for s in scores])
            ax.plot(shares, [mean(s) for s in scores], marker="o", label=label)
            ax.fill_between(shares, bounds[:, 0], bounds[:, 1], alpha=0.12)
        ax.axhline(
            mean(results.of("both-all", f"full {order}")), color="gray", ls="--", label="its full mode"
        )
        ax.axhline(
            mean(results.of("full-all", f"full {order}")), color="black", ls=":", label="full fine-tuned"
        )
        ax.set(title=f"{order} order", xlabel="context tokens recomputed, %", ylabel="substring match, %")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(out / "recomputation.png", dpi=110)
    return "\n".join(table)


def pairs(results: Results) -> str:
    """Comparisons that the text cites."""
    rows = ["| comparison | ascending | shuffled | both orders |", "|---|---|---|---|"]

    def add(label: str, one: list[tuple[str, str]], other: list[tuple[str, str]]) -> None:
        differences = []
        for order in ORDERS:
            a, b = (averaged([results.of(n, f"{m} {order}") for n, m in some]) for some in (one, other))
            differences.append(minus(a, b))
        cells = [with_interval(d, True) for d in (*differences, averaged(differences))]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")

    fulls, boths = [("full", "full"), ("full-seed1", "full")], [("both", "block"), ("both-seed1", "block")]
    add("40 %: `both` in block mode, 2 seeds, minus `full`, 2 seeds", boths, fulls)
    add("40 %: second seed minus first, `full`", fulls[1:], fulls[:1])
    add("40 %: second seed minus first, `both` in block mode", boths[1:], boths[:1])
    seeds = [("both-all", "block"), ("both-all-seed1", "block")]
    add("all: `both-all` in block mode, 2 seeds, minus `full-all`, 1 seed", seeds, [("full-all", "full")])
    add("all: `both-all`, full mode minus `full-all`", [("both-all", "full")], [("full-all", "full")])
    add("all: `both-all`, block mode minus its full mode", [("both-all", "block")], [("both-all", "full")])
    first = [("first-block-all", "block")]
    add("all: `first-block-all` in block mode minus `full-all`", first, [("full-all", "full")])
    add("all: `first-block-all` minus `both-all`, 2 seeds, block mode", first, seeds)
    add(
        "all: `first-block-all`, full mode minus `both-all`, full mode",
        [("first-block-all", "full")],
        [("both-all", "full")],
    )
    add("all: `first-block-all`, block mode minus its full mode", first, [("first-block-all", "full")])
    add("more data and steps, `full-all` minus `full`", [("full-all", "full")], [("full", "full")])
    add(
        "more data and steps, `both-all` minus `both`, block mode",
        [("both-all", "block")],
        [("both", "block")],
    )
    return "\n".join(rows)


SECOND_ROUND = {
    "full-all": ("full-rate-5e-4", "full-rate-1e-4", "full-shared", "full-more", "full-more-1e-4"),
    "full-rate-1e-4": ("full-cloze-1e-4", "full-cloze-1e-4-seed1", "full-cloze-1e-4-average-01"),
}
"""Full fine-tuned models of the second round, by the one that each is compared with."""

OF_BASELINE = {
    "both-all": "full-all",
    "both-2000": "full-all",
    "both-rate-5e-4": "full-rate-5e-4",
    "both-shared": "full-shared",
    "both-more": "full-more",
    "both-rate-1e-4": "full-rate-1e-4",
    "both-more-1e-4": "full-more-1e-4",
    "both-cloze-1e-4": "full-cloze-1e-4",
    "first-block-all": "full-all",
    "first-block-1e-4": "full-rate-1e-4",
    "first-block-cloze-1e-4": "full-cloze-1e-4",
    "stride-1e-4": "full-rate-1e-4",
    "first-block-stride-1e-4": "full-rate-1e-4",
}
"""Block fine-tuned models of all data, each with the full fine-tuned one of the same data, rate and seed."""


def baselines_of_second_round(results: Results) -> str:
    rows = [
        "| experiment | what | learning rate | seed | ascending | shuffled | both orders, minus | loss of gold answers |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def add(name: str, reference: str = "") -> None:
        settings = results.lines[name]["settings"]
        training = settings["training"] or {"learning_rate": "", "seed": ""}
        scores = [results.of(name, f"full {order}") for order in ORDERS]
        cells = [name, settings["description"], str(training["learning_rate"]), str(training["seed"])]
        cells += [with_interval(s) for s in scores]
        difference = ""
        if reference:
            others = averaged([results.of(reference, f"full {order}") for order in ORDERS])
            difference = f"`{reference}`: " + with_interval(minus(averaged(scores), others), True)
        cells += [difference, "; ".join(f"{results.loss(name, f'full {order}'):.3f}" for order in ORDERS)]
        rows.append("| " + " | ".join(cells) + " |")

    add("full-all")
    for reference, names in SECOND_ROUND.items():
        for name in names:
            add(name, reference)
    return "\n".join(rows)


def against_baselines(results: Results, of_baseline: dict[str, str]) -> str:
    """Block fine-tuned models against the full fine-tuned model of the same data, steps, rate and seed."""
    rows = [
        "| experiment | what | learning rate | baseline | block, ascending | minus | block, shuffled | minus "
        "| both orders, minus | full mode, ascending; shuffled | both orders, minus | loss of gold answers, block mode |",
        "|---" * 12 + "|",
    ]
    for name, baseline in of_baseline.items():
        settings = results.lines[name]["settings"]
        rate = str((settings["training"] or {"learning_rate": ""})["learning_rate"])
        cells = [name, settings["description"], rate, baseline]
        full = [results.of(baseline, f"full {order}") for order in ORDERS]
        block = [results.of(name, f"block {order}") for order in ORDERS]
        for scores, reference in zip(block, full, strict=True):
            cells += [f"{mean(scores):.1f}", with_interval(minus(scores, reference), True)]
        cells.append(with_interval(minus(averaged(block), averaged(full)), True))
        if "full ascending" in results.lines[name]["results"]:
            own = [results.of(name, f"full {order}") for order in ORDERS]
            cells.append("; ".join(f"{mean(scores):.1f}" for scores in own))
            cells.append(with_interval(minus(averaged(own), averaged(full)), True))
        else:
            cells += ["-", "-"]
        cells.append("; ".join(f"{results.loss(name, f'block {order}'):.3f}" for order in ORDERS))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def pairs_of_second_round(results: Results) -> str:
    """Comparisons that the text cites."""
    rows = ["| comparison | ascending | shuffled | both orders |", "|---|---|---|---|"]

    def add(label: str, one: list[str], other: list[str], mode: str = "block") -> None:
        """Each of `one` minus its partner of `other`, the mean over the pairs."""
        differences = []
        for order in ORDERS:
            some = [
                (results.of(a, f"{mode} {order}"), results.of(b, f"{mode} {order}"))
                for a, b in zip(one, other, strict=True)
            ]
            differences.append(averaged([minus(a, b) for a, b in some]))
        cells = [with_interval(d, True) for d in (*differences, averaged(differences))]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")

    firsts = ["first-block-all", "first-block-1e-4", "first-block-cloze-1e-4"]
    boths = ["both-all", "both-rate-1e-4", "both-cloze-1e-4"]
    add("rate 1e-4 minus 2.5e-4, `both`, block mode", ["both-rate-1e-4"], ["both-all"])
    add("rate 1e-4 minus 2.5e-4, `first-block`, block mode", ["first-block-1e-4"], ["first-block-all"])
    add(
        "rate 1e-4 minus 2.5e-4, `both` and `first-block`, block mode",
        [boths[1], firsts[1]],
        [boths[0], firsts[0]],
    )
    add("rate 1e-4 minus 2.5e-4, the same, full mode", [boths[1], firsts[1]], [boths[0], firsts[0]], "full")
    add("rate 1e-4 minus 2.5e-4, `full`, full mode", ["full-rate-1e-4"], ["full-all"], "full")
    add("rate 5e-4 minus 2.5e-4, `both`, block mode", ["both-rate-5e-4"], ["both-all"])
    add("`first-block` minus `both`, three pairs, block mode", firsts, boths)
    add("`first-block` minus `both`, three pairs, full mode", firsts, boths, "full")
    add("`first-block` minus `both` at 1e-4, block mode", firsts[1:2], boths[1:2])
    add(
        "clozes minus none, `both` and `first-block`, block mode",
        [boths[2], firsts[2]],
        [boths[1], firsts[1]],
    )
    add(
        "clozes minus none, `both` and `first-block`, full mode",
        [boths[2], firsts[2]],
        [boths[1], firsts[1]],
        "full",
    )
    add(
        "clozes minus none, `full`, 2 seeds against 1",
        ["full-cloze-1e-4", "full-cloze-1e-4-seed1"],
        ["full-rate-1e-4"] * 2,
        "full",
    )
    add(
        "mean weights of two seeds minus the mean of their scores, `full-cloze`",
        ["full-cloze-1e-4-average-01"] * 2,
        ["full-cloze-1e-4", "full-cloze-1e-4-seed1"],
        "full",
    )
    add("8 questions a prompt minus 1, `both`, block mode", ["both-shared"], ["both-all"])
    add("8 questions a prompt minus 1, `full`, full mode", ["full-shared"], ["full-all"], "full")
    add("2,000 steps minus 1,000, `both`, block mode", ["both-2000"], ["both-all"])
    add(
        "overlapping positions minus not, `both` and `first-block`, block mode",
        ["stride-1e-4", "first-block-stride-1e-4"],
        [boths[1], firsts[1]],
    )
    return "\n".join(rows)


PLACES = {
    "full fine-tuned, full attention": (
        "full",
        ("full-all", "full-rate-1e-4", "full-cloze-1e-4", "full-cloze-1e-4-seed1"),
    ),
    "`both`, full mode": ("full", ("both-all", "both-rate-1e-4", "both-cloze-1e-4")),
    "`both`, block mode": ("block", ("both-all", "both-rate-1e-4", "both-cloze-1e-4")),
    "`first-block`, full mode": ("full", ("first-block-all", "first-block-1e-4", "first-block-cloze-1e-4")),
    "`first-block`, block mode": ("block", ("first-block-all", "first-block-1e-4", "first-block-cloze-1e-4")),
}


def places_of_support(data: dict[str, Any]) -> NDArray[np.int64]:
    """The place of the only supporting document of each validation question in shuffled order, or -1."""
    import random

    from prompts import choose_documents

    places = []
    for number, question in enumerate(data["questions"]):
        if question["part"] == "validation":
            chosen, _ = choose_documents(question, "shuffled", random.Random(f"evaluation:{number}"), 10)
            support = [place for place, index in enumerate(chosen) if question["supports"][index]]
            yes_no = is_yes_no(question["answers"])
            places.append(support[0] if len(support) == 1 and not yes_no else -1)
    return np.array(places)


def place_table(
    results: Results,
    data: dict[str, Any],
    models: dict[str, tuple[str, tuple[str, ...]]],
    readings: dict[str, tuple[str, tuple[str, ...]]],
) -> str:
    """Substring match in shuffled order by the place of the supporting document, where there is one.

    `readings` adds how often that document is the one that is read most.
    """
    places = places_of_support(data)
    groups = {"1": (0,), "2 to 4": (1, 2, 3), "5 to 7": (4, 5, 6), "8 to 10": (7, 8, 9)}
    which = {name: np.isin(places, some) for name, some in groups.items()}
    head = " | ".join(f"{name} ({chosen.sum()})" for name, chosen in which.items())
    rows = [
        f"| place of the supporting document | models | {head} |",
        "|---|---" + "|---" * len(groups) + "|",
    ]
    shown = [
        (label, names, np.mean([results.hits(n, f"{mode} shuffled") for n in names], axis=0))
        for label, (mode, names) in models.items()
    ]
    shown += [
        (label, names, np.mean([results.is_read_most(n, mode, "shuffled") for n in names], axis=0))
        for label, (mode, names) in readings.items()
    ]
    for label, names, hits in shown:
        cells = []
        for chosen in which.values():
            values = {"all": hits[chosen]}
            low, high = interval(resampled_mean(values))
            cells.append(f"{hits[chosen].mean():.1f} [{low:.1f}, {high:.1f}]")
        rows.append(f"| {label} | {len(names)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


SEEDS = {
    "full": ("full-rate-1e-4", "full-1e-4-seed1", "full-1e-4-seed2"),
    "first-block": ("first-block-1e-4", "first-block-1e-4-seed1", "first-block-1e-4-seed2"),
    "recomputed": tuple(f"first-block-recomputed-1e-4{seed}" for seed in ("", "-seed1", "-seed2")),
}
"""Models of three seeds at the rate of 1e-4."""

OF_BASELINE_IN_THIRD_ROUND = {
    **dict(zip(SEEDS["first-block"], SEEDS["full"], strict=True)),
    "first-block-1e-4-average-12": "full-1e-4-average-12",
    "first-block-5e-5": "full-5e-5",
    "first-block-dual-1e-4": SEEDS["full"][0],
    "first-block-links-1e-4": SEEDS["full"][0],
    "first-block-ranking-1e-4": SEEDS["full"][0],
    **dict(zip(SEEDS["recomputed"], SEEDS["full"], strict=True)),
    "first-block-recomputed-1e-4-average-12": "full-1e-4-average-12",
    "first-block-recomputed-1e-4-average-012": "full-1e-4-average-12",
}


def compare(results: Results, one: list[tuple[str, str]], other: list[tuple[str, str]]) -> list[str]:
    """Pairs of (name, evaluation): their mean difference in each order and in both, pairs drawn again, too."""
    differences = []
    for order in ORDERS:
        pairs = [
            minus(results.of(a, f"{e} {order}"), results.of(b, f"{f} {order}"))
            for (a, e), (b, f) in zip(one, other, strict=True)
        ]
        differences.append({name: np.array([pair[name] for pair in pairs]) for name in SETS})
    both = {name: (differences[0][name] + differences[1][name]) / 2 for name in SETS}
    return [with_interval(d, True) for d in (*differences, both)]


def pairs_of_third_round(results: Results) -> str:
    rows = ["| comparison | ascending | shuffled | both orders |", "|---|---|---|---|"]

    def add(label: str, one: list[str], e: str, other: list[str], f: str) -> None:
        cells = compare(results, [(n, e) for n in one], [(n, f) for n in other])
        rows.append(f"| {label} | " + " | ".join(cells) + " |")

    full, first, again = (list(SEEDS[kind]) for kind in ("full", "first-block", "recomputed"))
    average = "first-block-1e-4-average-12", "full-1e-4-average-12"
    add("`first-block`, block mode, minus `full`, three seeds", first, "block", full, "full")
    add("`first-block`, full mode, minus `full`, three seeds", first, "full", full, "full")
    add("`first-block`, block mode minus full mode, three seeds", first, "block", first, "full")
    add(
        "`first-block`, three seeds, minus `both`, one seed, block mode",
        first,
        "block",
        ["both-rate-1e-4"] * 3,
        "block",
    )
    add("rate 1e-4, three seeds, minus 2.5e-4, one seed, `full`", full, "full", ["full-all"] * 3, "full")
    add(
        "rate 1e-4, three seeds, minus 2.5e-4, one seed, `first-block`, block mode",
        first,
        "block",
        ["first-block-all"] * 3,
        "block",
    )
    add(
        "mean weights minus mean of scores, `first-block`, block mode",
        [average[0]] * 2,
        "block",
        first[1:],
        "block",
    )
    add("mean weights minus mean of scores, `full`", [average[1]] * 2, "full", full[1:], "full")
    add("rate 5e-5 minus 1e-4, `first-block`, block mode", ["first-block-5e-5"], "block", first[:1], "block")
    add("rate 5e-5 minus 1e-4, `full`", ["full-5e-5"], "full", full[:1], "full")
    for name, words in (
        ("dual", "both modes and teacher"),
        ("links", "link tokens"),
        ("ranking", "ranking loss"),
    ):
        add(
            f"{words} minus none, `first-block`, block mode",
            [f"first-block-{name}-1e-4"],
            "block",
            first[:1],
            "block",
        )
    add(
        "ranking loss, one seed, minus none, three seeds, block mode",
        ["first-block-ranking-1e-4"] * 3,
        "block",
        first,
        "block",
    )
    add("trained with recomputation minus without, block mode, three seeds", again, "block", first, "block")
    add(
        "20 % recomputed (first) minus none, `first-block`, seed 1",
        [f"{first[1]}-recomputation"],
        "first 20 %",
        first[1:2],
        "block",
    )
    for kind in ("sorted", "best 3"):
        twice = [f"{name}-twice" for name in first[1:]]
        full_twice, ranking = [f"{full[1]}-twice"], "first-block-ranking-1e-4"
        add(
            f"{kind}: block mode read twice minus once, two seeds",
            twice,
            f"block, {kind}",
            first[1:],
            "block",
        )
        add(
            f"{kind}: block mode read twice minus `full` read once, two seeds",
            twice,
            f"block, {kind}",
            full[1:],
            "full",
        )
        add(f"{kind}: `full` read twice minus once", full_twice, f"full, {kind}", full[1:2], "full")
        add(
            f"{kind}: block mode minus `full`, both read twice",
            twice[:1],
            f"block, {kind}",
            full_twice,
            f"full, {kind}",
        )
        add(
            f"{kind}: ranking loss, block mode read twice, minus `full` read once",
            [f"{ranking}-twice"],
            f"block, {kind}",
            full[:1],
            "full",
        )
        add(
            f"{kind}: ranking loss, block mode, minus `full` of another seed, both read twice",
            [f"{ranking}-twice"],
            f"block, {kind}",
            full_twice,
            f"full, {kind}",
        )
    return "\n".join(rows)


def recomputation_of_third_round(results: Results) -> str:
    """Recomputation after block fine-tuning at 1e-4, without and with training for it, against `full`."""
    rows = [
        "| model | recomputed | ascending | minus `full` | shuffled | minus `full` | both orders, minus `full` |",
        "|---|---|---|---|---|---|---|",
    ]

    def add(label: str, share: str, names: list[str], evaluation: str, full: list[str]) -> None:
        one, other = [(n, evaluation) for n in names], [(n, "full") for n in full]
        ascending, shuffled, both = compare(results, one, other)
        levels = [
            f"{np.mean([mean(results.of(n, f'{evaluation} {order}')) for n in names]):.1f}"
            for order in ORDERS
        ]
        rows.append(f"| {label} | {share} | {levels[0]} | {ascending} | {levels[1]} | {shuffled} | {both} |")

    full, first, again = (list(SEEDS[kind]) for kind in ("full", "first-block", "recomputed"))
    add("`first-block`, seed 1", "0 %", first[1:2], "block", full[1:2])
    for share in (10, 20):
        for choice in ("first", "changed"):
            name = [f"{first[1]}-recomputation"]
            add("the same", f"{share} %, {choice}", name, f"{choice} {share} %", full[1:2])
    add("trained with it, three seeds", "0 %", again, "block", full)
    for share in (5, 10, 20):
        add("the same", f"{share} %, first", again, f"first {share} %", full)
    for seeds, words in (("12", "mean weights of seeds 1 and 2"), ("012", "mean weights of three seeds")):
        name = [f"first-block-recomputed-1e-4-average-{seeds}"]
        for evaluation, share in (
            ("block", "0 %"),
            ("first 10 %", "10 %, first"),
            ("first 20 %", "20 %, first"),
        ):
            add(f"trained with it, {words}", share, name, evaluation, ["full-1e-4-average-12"])
    return "\n".join(rows)


READ_TWICE = (
    ("full-1e-4-seed1", "full"),
    ("first-block-1e-4-seed1", "block"),
    ("first-block-1e-4-seed2", "block"),
    ("first-block-recomputed-1e-4-seed1", "block"),
    ("first-block-recomputed-1e-4-seed2", "block"),
    ("first-block-ranking-1e-4", "block"),
)


def second_readings(results: Results) -> str:
    """How often a supporting document is read most, and the scores of the first and of the second readings."""
    cells = "read most | once | sorted | best 3"
    rows = [f"| model, mode | ascending: {cells} | shuffled: {cells} |", "|---" * 9 + "|"]
    for name, mode in READ_TWICE:
        cells = []
        for order in ORDERS:
            read = "".join(str(int(v > 0)) for v in results.is_read_most(name, mode, order))
            cells.append(f"{mean(results.reading(read)):.1f}")
            cells.append(f"{mean(results.of(name, f'{mode} {order}')):.1f}")
            cells += [
                f"{mean(results.of(f'{name}-twice', f'{mode}, {k} {order}')):.1f}"
                for k in ("sorted", "best 3")
            ]
        rows.append(f"| {name}, {mode} mode | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def finding_table(results: Results, data: dict[str, Any]) -> str:
    """Where the gap arises: by which of the two models attends most to the only supporting document."""
    rows = [
        "| order | supporting document is read most by | questions | `full` | block mode | difference | part of the gap |",
        "|---|---|---|---|---|---|---|",
    ]
    is_single = places_of_support(data) >= 0
    full, block = SEEDS["full"][1], SEEDS["first-block"][1]
    for order in ORDERS:
        by_full, by_block = (
            results.is_read_most(name, mode, order)[is_single] > 0
            for name, mode in ((full, "full"), (block, "block"))
        )
        of_full, of_block = (
            results.hits(name, f"{mode} {order}")[is_single]
            for name, mode in ((full, "full"), (block, "block"))
        )
        for label, chosen in (
            ("both", by_full & by_block),
            ("`full` alone", by_full & ~by_block),
            ("block mode alone", ~by_full & by_block),
            ("neither", ~by_full & ~by_block),
        ):
            difference = (of_block - of_full)[chosen]
            low, high = interval(resampled_mean({"all": difference}))
            rows.append(
                f"| {order} | {label} | {chosen.sum()} | {of_full[chosen].mean():.1f} "
                f"| {of_block[chosen].mean():.1f} | {difference.mean():+.1f} [{low:+.1f}, {high:+.1f}] "
                f"| {difference.sum() / is_single.sum():+.1f} |"
            )
    return "\n".join(rows)


PLACES_IN_THIRD_ROUND = {
    "`full`, full attention": ("full", SEEDS["full"]),
    "`first-block`, full mode": ("full", SEEDS["first-block"]),
    "`first-block`, block mode": ("block", SEEDS["first-block"]),
}
READINGS_BY_PLACE = {
    "`full`: is read most": ("full", ("full-1e-4-seed1",)),
    "`first-block`, block mode: is read most": ("block", SEEDS["first-block"][1:]),
    "`first-block`, ranking loss, block mode: is read most": ("block", ("first-block-ranking-1e-4",)),
}


def show(out: Path, data: dict[str, Any]) -> None:
    results = Results(out)
    by_set = [("full-all", "full"), ("full-all", "block"), ("both-all", "block"), ("both-all", "full")]
    by_set += [("first-block-all", "block"), ("first-block-all", "full"), ("full", "full"), ("both", "block")]
    by_set += [("first-block-equal", "block")]
    parts = {
        "Baselines": baseline_table(results),
        **{scale: main_table(results, scale) for scale in SCALES},
        "Comparisons": pairs(results),
        "By set": set_table(results, by_set),
        "Recomputation": recomputation(results, out),
        "Second round, baselines": baselines_of_second_round(results),
        "Second round": against_baselines(results, OF_BASELINE),
        "Second round, comparisons": pairs_of_second_round(results),
        "By place": place_table(results, data, PLACES, {}),
        "Third round": against_baselines(results, OF_BASELINE_IN_THIRD_ROUND),
        "Third round, comparisons": pairs_of_third_round(results),
        "Third round, second readings": second_readings(results),
        "Third round, where the gap arises": finding_table(results, data),
        "Third round, by place": place_table(results, data, PLACES_IN_THIRD_ROUND, READINGS_BY_PLACE),
        "Third round, recomputation": recomputation_of_third_round(results),
    }
    text = "\n\n".join(f"### {title}\n\n{table}" for title, table in parts.items())
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["collect", data, *lines, out]:
            collect(Path(data), [Path(line) for line in lines], Path(out))
        case ["show", data, out]:
            show(Path(out), load_data(Path(data)))
        case _:
            sys.exit(__doc__)
