"""Reports of an evaluation: scores per mode, over all questions and per group of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from blockft.evaluation.metrics import METRICS


@dataclass(frozen=True)
class Prediction:
    """One answered question. `groups` are the names under which it is also counted: its source, its hops."""

    id: str
    answer: str
    golds: tuple[str, ...]
    groups: tuple[str, ...]

    @property
    def scores(self) -> dict[str, float]:
        return {name: metric(self.answer, self.golds) for name, metric in METRICS.items()}

    def to_record(self) -> dict[str, Any]:
        return asdict(self) | {"scores": self.scores}


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Mean scores in percent, of all predictions under "all" and of each group under its name.

    A group that holds every prediction is "all" again and left out.
    """
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for prediction in predictions:
        for group in ("all", *prediction.groups):
            groups[group].append(prediction.scores)
    return {
        group: {"questions": len(scores)} | {name: 100 * fmean(s[name] for s in scores) for name in METRICS}
        for group, scores in groups.items()
        if group == "all" or len(scores) < len(predictions)
    }


def build_report(
    model: str, predictions: dict[str, Sequence[Prediction]], options: dict[str, Any]
) -> dict[str, Any]:
    """What `report.json` holds: the model, the options that decide an answer, a summary of each mode."""
    return {
        "model": model,
        "options": options,
        "modes": {mode: summarize(answered) for mode, answered in predictions.items()},
    }
