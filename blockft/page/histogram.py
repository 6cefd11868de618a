"""Histograms: bins of round widths, and where their bars stand in a picture of 100 by 100."""

from dataclasses import dataclass
from math import ceil, log10

import numpy as np
from numpy.typing import NDArray

MAX_BINS = 40

TAIL = 3
"""If the largest number is this many times the 99th percentile, one last bin holds the rest."""


@dataclass(frozen=True)
class Bin:
    """The numbers from `low` to `high`, both included; `high` is None in a last bin without an end."""

    low: int
    high: int | None
    count: int

    @property
    def label(self) -> str:
        """The numbers of the bin, such as "100 to 199"."""
        if self.high is None:
            return f"{self.low:,} or more"
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Bar:
    """A bar of a bin, in percent of the width and the height of the picture; y grows downwards."""

    bin: Bin
    x: float
    width: float
    y: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of numbers, and the numbers in a few words.

    median_x: where the median stands, in percent of the width.
    """

    bars: list[Bar]
    median: int
    mean: float
    percentile_95: int
    largest: int
    median_x: float

    @property
    def tallest(self) -> int:
        """The largest count of a bin."""
        return max(bar.bin.count for bar in self.bars)

    @property
    def ticks(self) -> list[str]:
        """The numbers at the left, in the middle and at the right of the picture."""
        bins = [bar.bin for bar in self.bars]
        last = bins[-1]
        if len(bins) == 1:
            return [last.label]
        right = f"{last.low:,}" if last.low == last.high else f"{last.low:,}+" if last.high is None else ""
        ticks = [f"{bins[0].low:,}", right or f"{last.high:,}"]
        if len(bins) > 4:
            ticks.insert(1, f"{bins[len(bins) // 2].low:,}")
        return ticks


def build_histogram(numbers: NDArray[np.int64]) -> Histogram:
    """Return the histogram of at least one whole number of at least 0."""
    smallest, largest = int(numbers.min()), int(numbers.max())
    median, tail = (int(np.percentile(numbers, q, method="inverted_cdf")) for q in (50, 99))
    has_tail = largest > TAIL * max(tail, 1)
    end = tail if has_tail else largest
    step = _round_step((end - smallest + 1) / MAX_BINS)
    start = smallest // step * step
    edges = np.arange(start, end + step + 1, step)
    counts, _ = np.histogram(numbers, [*edges[:-1], edges[-1] - 0.5])
    bins = [
        Bin(int(low), int(low) + step - 1, int(count)) for low, count in zip(edges[:-1], counts, strict=True)
    ]
    if bins[-1].count == 0 and len(bins) > 1:
        bins.pop()
    if has_tail:
        first_left_out = (bins[-1].high or 0) + 1
        bins.append(Bin(first_left_out, None, int((numbers >= first_left_out).sum())))
    width, tallest = 100 / len(bins), max(bin.count for bin in bins)
    bars = [
        Bar(bin, i * width, width, 100 - 100 * bin.count / tallest, 100 * bin.count / tallest)
        for i, bin in enumerate(bins)
    ]
    return Histogram(
        bars=bars,
        median=median,
        mean=float(numbers.mean()),
        percentile_95=int(np.percentile(numbers, 95, method="inverted_cdf")),
        largest=largest,
        median_x=min(100.0, (median - start + 0.5) / step * width),
    )


def _round_step(step: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is at least `step`."""
    power = 10 ** max(0, ceil(log10(step)) - 1) if step > 1 else 1
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)
