"""Histograms of the page count every number once, in bins of round widths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.page.histogram import MAX_BINS, build_histogram


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_every_number_is_in_the_bin_of_its_label(numbers: list[int]) -> None:
    histogram = build_histogram(np.array(numbers))
    bins = [bar.bin for bar in histogram.bars]
    assert len(bins) <= MAX_BINS + 2 and sum(bin.count for bin in bins) == len(numbers)
    for bin in bins:
        high = 10**9 if bin.high is None else bin.high
        assert bin.count == sum(bin.low <= number <= high for number in numbers)
    assert all(a.high is not None and a.high + 1 == b.low for a, b in zip(bins, bins[1:], strict=False))
    assert histogram.largest == max(numbers) and 0 <= histogram.median_x <= 100
    assert max(bar.height for bar in histogram.bars) == 100


@pytest.mark.parametrize(
    ("numbers", "labels"),
    [
        ([7, 7], ["7"]),
        ([1, 2, 4], ["1", "2", "3", "4"]),
        ([0] * 99 + [10**6], ["0", "1 or more"]),
    ],
)
def test_bins_have_labels(numbers: list[int], labels: list[str]) -> None:
    assert [bar.bin.label for bar in build_histogram(np.array(numbers)).bars] == labels


def test_bins_have_round_widths_and_the_axis_names_its_ends() -> None:
    histogram = build_histogram(np.arange(20, 1000))
    assert histogram.bars[0].bin.label == "0 to 49" and histogram.bars[-1].bin.label == "950 to 999"
    assert histogram.ticks == ["0", "500", "999"]
    assert (histogram.median, histogram.percentile_95) == (509, 950)
