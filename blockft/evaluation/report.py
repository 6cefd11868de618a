"""The report of an evaluation: mean scores by mode, for all questions and for each group of questions."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from blockft.data.statistics import histogram
from blockft.evaluation.bootstrap import LEVEL, NUM_RESAMPLES, SEED, bootstrap_interval
from blockft.evaluation.metrics import METRICS

VERSION = 2
"""The version of the report's format; reports of another version are refused."""

ALL = "all"
"""The group of all questions."""

INTERVALS = "intervals"
DIFFERENCE = "block - full"
REPEATED = "same questions"
"""The entry for groups that hold the same questions as an earlier group: their name -> the earlier name."""


@dataclass(frozen=True)
class Prediction:
    """An answered question.

    groups: the groups of the report that count the question besides `ALL`, such as its source.
    num_tokens: the length of the answer.
    hit_token_limit: whether the answer ended only because it reached the output limit.
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
        """The score of each metric, from 0 to 1."""
        return {name: metric(self.answer, self.golds) for name, metric in METRICS.items()}

    def to_record(self) -> dict[str, Any]:
        """Return the prediction and its scores as a JSON object."""
        return asdict(self) | {"scores": self.scores}


def summarize_scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return mean scores in percent, their intervals and the number of questions, for each group.

    Groups with the same questions as an earlier group are left out.
    """
    return {
        group: _mean_scores([predictions[i].scores for i in indices])
        for group, indices in _distinct_groups(predictions).items()
    }


def paired_difference(block: Sequence[Prediction], full: Sequence[Prediction]) -> dict[str, Any]:
    """Return the mean of block score minus full score of each question, in the form of `summarize_scores`."""
    assert [p.id for p in block] == [p.id for p in full]
    return {
        group: _mean_scores(
            [{name: block[i].scores[name] - full[i].scores[name] for name in METRICS} for i in indices]
        )
        for group, indices in _distinct_groups(block).items()
    }


def build_report(
    model: str, predictions: Mapping[str, Sequence[Prediction]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Build the content of `report.json` from the predictions of each mode.

    The report holds no time and no output folder: the same answers give the same report. It equals what is
    read back from its JSON.

    options: everything that decides an answer, for the reader of the report.
    """
    report = {
        "version": VERSION,
        "model": model,
        "options": dict(options),
        INTERVALS: {"level": LEVEL, "resamples": NUM_RESAMPLES, "seed": SEED},
        "modes": {mode: summarize_scores(answered) for mode, answered in predictions.items()},
        "prompts": {mode: _prompt_statistics(answered) for mode, answered in predictions.items()},
        REPEATED: _repeated_groups(next(iter(predictions.values()), ())),
    }
    if {"block", "full"} <= predictions.keys():
        report[DIFFERENCE] = paired_difference(predictions["block"], predictions["full"])
    return report


def check_report(report: Any) -> None:
    """Check that JSON content has the form of a report.

    Raises:
        ValueError: a part is missing or has another form; the message names it.
    """
    modes = report.get("modes") if isinstance(report, dict) else None
    if not isinstance(modes, dict) or not modes:
        raise ValueError("it has no 'modes'")
    if report.get("version") != VERSION:
        raise ValueError(
            f"its version is {report.get('version')}, this blockft reads version {VERSION}: "
            "run the evaluation again"
        )
    if not isinstance(report.get("options"), dict):
        raise ValueError("it has no 'options'")
    for mode, groups in modes.items():
        if not isinstance(groups, dict) or ALL not in groups:
            raise ValueError(f"mode {mode!r} has no scores")
        for group, scores in groups.items():
            if not _is_summary(scores):
                raise ValueError(f"mode {mode!r} has no scores of {group!r}")
        repeated = report.get(REPEATED, {})
        if not isinstance(repeated, dict) or not groups.keys() >= set(map(str, repeated.values())):
            raise ValueError(f"{REPEATED!r} names groups that mode {mode!r} does not have")
    if not isinstance(report.get("model"), str):
        raise ValueError("it has no 'model'")


def _is_summary(scores: Any) -> bool:
    match scores:
        case {"questions": int(), "intervals": {**intervals}}:
            return all(
                _is_percent(scores.get(name))
                and isinstance(bounds := intervals.get(name), list)
                and len(bounds) == 2
                and all(map(_is_percent, bounds))
                for name in METRICS
            )
    return False


def _is_percent(value: Any) -> bool:
    return isinstance(value, int | float) and -100.1 < value < 100.1


def _distinct_groups(predictions: Sequence[Prediction]) -> dict[str, list[int]]:
    """Return the indices of the predictions in each group, without groups that repeat an earlier one."""
    repeated = _repeated_groups(predictions)
    return {group: indices for group, indices in _groups(predictions).items() if group not in repeated}


def _repeated_groups(predictions: Sequence[Prediction]) -> dict[str, str]:
    """Map each group that holds the same predictions as an earlier group to the earlier group."""
    first: dict[tuple[int, ...], str] = {}
    firsts = {
        group: first.setdefault(tuple(indices), group) for group, indices in _groups(predictions).items()
    }
    return {group: earlier for group, earlier in firsts.items() if group != earlier}


def _groups(predictions: Sequence[Prediction]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prediction in enumerate(predictions):
        for group in (ALL, *prediction.groups):
            groups[group].append(index)
    return groups


def _mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    percents = {name: [100 * score[name] for score in scores] for name in METRICS}
    return (
        {"questions": len(scores)}
        | {name: fmean(values) for name, values in percents.items()}
        | {INTERVALS: {name: list(bootstrap_interval(values)) for name, values in percents.items()}}
    )


def _prompt_statistics(predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {
        "blocks_per_prompt": histogram(p.num_blocks for p in predictions),
        "mean_prompt_tokens": fmean(p.prompt_tokens for p in predictions),
        "mean_answer_tokens": fmean(p.num_tokens for p in predictions),
        "answers_at_the_output_limit": sum(p.hit_token_limit for p in predictions),
    }
