"""Reports of an evaluation: scores per mode, over all questions and per group of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from blockft.evaluation.bootstrap import LEVEL, NUM_RESAMPLES, SEED, interval
from blockft.evaluation.metrics import METRICS

VERSION = 1
ALL = "all"
INTERVALS = "intervals"
DIFFERENCE = "block - full"


@dataclass(frozen=True)
class Prediction:
    """One answered question.

    `groups` are the names under which it is also counted: its source, its kind of hops. `num_tokens` is the
    answer's length, and `cut_off` says that the answer reached the output limit.
    """

    id: str
    answer: str
    golds: tuple[str, ...]
    groups: tuple[str, ...]
    num_blocks: int
    prompt_tokens: int
    num_tokens: int
    cut_off: bool

    @cached_property
    def scores(self) -> dict[str, float]:
        return {name: metric(self.answer, self.golds) for name, metric in METRICS.items()}

    def to_record(self) -> dict[str, Any]:
        return asdict(self) | {"scores": self.scores}


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Mean scores in percent with their intervals, of all predictions and of each group under its name."""
    return {
        group: _means([predictions[i].scores for i in members])
        for group, members in _groups(predictions).items()
    }


def difference(block: Sequence[Prediction], full: Sequence[Prediction]) -> dict[str, Any]:
    """What block mode scores above full mode, question by question, in the form of `summarize`."""
    assert [p.id for p in block] == [p.id for p in full]
    return {
        group: _means([{n: block[i].scores[n] - full[i].scores[n] for n in METRICS} for i in members])
        for group, members in _groups(block).items()
    }


def build_report(
    model: str, predictions: Mapping[str, Sequence[Prediction]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `report.json` holds: the model, the options that decide an answer, a summary of each mode.

    It holds no time and no folder of its own, so that the same answers give the same report.
    """
    report = {
        "version": VERSION,
        "model": model,
        "options": dict(options),
        INTERVALS: {"level": LEVEL, "resamples": NUM_RESAMPLES, "seed": SEED},
        "modes": {mode: summarize(answered) for mode, answered in predictions.items()},
        "prompts": {mode: _prompts(answered) for mode, answered in predictions.items()},
    }
    if {"block", "full"} <= predictions.keys():
        report[DIFFERENCE] = difference(predictions["block"], predictions["full"])
    return report


def histogram(numbers: Iterable[int]) -> dict[str, int]:
    """How often each number occurs; JSON has texts for keys."""
    return {str(number): times for number, times in sorted(Counter(numbers).items())}


def _groups(predictions: Sequence[Prediction]) -> dict[str, list[int]]:
    """Which predictions are in each group; one that holds the same as another before it is left out."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prediction in enumerate(predictions):
        for group in (ALL, *prediction.groups):
            groups[group].append(index)
    first: dict[tuple[int, ...], str] = {}
    for group, members in groups.items():
        first.setdefault(tuple(members), group)
    return {group: list(members) for members, group in first.items()}


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    columns = {name: [100 * one[name] for one in scores] for name in METRICS}
    return (
        {"questions": len(scores)}
        | {name: fmean(column) for name, column in columns.items()}
        | {INTERVALS: {name: interval(column) for name, column in columns.items()}}
    )


def _prompts(predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {
        "blocks_per_prompt": histogram(p.num_blocks for p in predictions),
        "mean_prompt_tokens": fmean(p.prompt_tokens for p in predictions),
        "mean_answer_tokens": fmean(p.num_tokens for p in predictions),
        "answers_cut_off": sum(p.cut_off for p in predictions),
    }
