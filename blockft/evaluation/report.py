"""Reports of an evaluation: scores per mode, over all questions and per group of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from blockft.evaluation.bootstrap import LEVEL, NUM_RESAMPLES, SEED, bootstrap_interval
from blockft.evaluation.metrics import METRICS

VERSION = 1
ALL = "all"
INTERVALS = "intervals"
DIFFERENCE = "block - full"
REPEATED = "same questions"
"""Groups that hold the same questions as another, under which they are counted: their name -> its name."""


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
    hit_token_limit: bool

    @cached_property
    def scores(self) -> dict[str, float]:
        return {name: metric(self.answer, self.golds) for name, metric in METRICS.items()}

    def to_record(self) -> dict[str, Any]:
        return asdict(self) | {"scores": self.scores}


def summarize_scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Mean scores in percent with their intervals, of all predictions and of each group under its name."""
    return {
        group: _means([predictions[i].scores for i in members])
        for group, members in _groups(predictions).items()
    }


def paired_difference(block: Sequence[Prediction], full: Sequence[Prediction]) -> dict[str, Any]:
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
        "modes": {mode: summarize_scores(answered) for mode, answered in predictions.items()},
        "prompts": {mode: _prompts(answered) for mode, answered in predictions.items()},
        REPEATED: _repeated(next(iter(predictions.values()), ())),
    }
    if {"block", "full"} <= predictions.keys():
        report[DIFFERENCE] = paired_difference(predictions["block"], predictions["full"])
    return report


def check_report(report: Any) -> None:
    """Refuse what was read as a report and has not the form that `build_report` gives it.

    Raises:
        ValueError: the sentence says what is missing.
    """
    modes = report.get("modes") if isinstance(report, dict) else None
    if not isinstance(modes, dict) or not modes:
        raise ValueError("it has no 'modes'")
    if report.get("version") != VERSION:
        raise ValueError(
            f"it is of version {report.get('version')}, this blockft reads version {VERSION}: evaluate again"
        )
    if not isinstance(report.get("options"), dict):
        raise ValueError("it has no 'options'")
    for mode, groups in modes.items():
        if not isinstance(groups, dict) or ALL not in groups:
            raise ValueError(f"mode {mode!r} holds no scores")
        for group, scores in groups.items():
            if not _is_summary(scores):
                raise ValueError(f"mode {mode!r} holds no scores of {group!r}")
        repeated = report.get(REPEATED, {})
        if not isinstance(repeated, dict) or not groups.keys() >= set(map(str, repeated.values())):
            raise ValueError(f"{REPEATED!r} names groups that mode {mode!r} has not")


def _is_summary(scores: Any) -> bool:
    match scores:
        case {"questions": int(), "intervals": {**intervals}}:
            return all(
                isinstance(scores.get(name), int | float)
                and isinstance(ends := intervals.get(name), list)
                and len(ends) == 2
                and all(isinstance(end, int | float) for end in ends)
                for name in METRICS
            )
    return False


def histogram(numbers: Iterable[int]) -> dict[str, int]:
    """How often each number occurs; JSON has texts for keys."""
    return {str(number): times for number, times in sorted(Counter(numbers).items())}


def _groups(predictions: Sequence[Prediction]) -> dict[str, list[int]]:
    """Which predictions are in each group; one that holds the same as another before it is left out."""
    repeated = _repeated(predictions)
    return {group: members for group, members in _members(predictions).items() if group not in repeated}


def _repeated(predictions: Sequence[Prediction]) -> dict[str, str]:
    """The groups that hold the same predictions as another before them, and that one."""
    first: dict[tuple[int, ...], str] = {}
    groups = _members(predictions)
    firsts = {group: first.setdefault(tuple(members), group) for group, members in groups.items()}
    return {group: other for group, other in firsts.items() if group != other}


def _members(predictions: Sequence[Prediction]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prediction in enumerate(predictions):
        for group in (ALL, *prediction.groups):
            groups[group].append(index)
    return groups


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    columns = {name: [100 * one[name] for one in scores] for name in METRICS}
    return (
        {"questions": len(scores)}
        | {name: fmean(column) for name, column in columns.items()}
        | {INTERVALS: {name: bootstrap_interval(column) for name, column in columns.items()}}
    )


def _prompts(predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {
        "blocks_per_prompt": histogram(p.num_blocks for p in predictions),
        "mean_prompt_tokens": fmean(p.prompt_tokens for p in predictions),
        "mean_answer_tokens": fmean(p.num_tokens for p in predictions),
        "answers_cut_off": sum(p.hit_token_limit for p in predictions),
    }
