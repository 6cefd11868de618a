"""The progress of `prepare` has a total: it is estimated from bytes, and known once everything is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blockft.config.choices import Format
from blockft.config.settings import Recipe, Source
from blockft.data import sample_frames
from blockft.data.sample import sample_to_record
from blockft.progress import Advance
from blockft.stages.prepare import prepare
from blockft.stages.sample_estimate import CopyProgress, estimate_samples
from tests.data.toys import rag_sample

Make = Callable[..., Recipe]


def copy(num_bytes: int, read: int = 0, samples: int = 0, **options: int | None) -> CopyProgress:
    options = {"max_samples": None} | options
    return CopyProgress(num_bytes=num_bytes, num_bytes_read=read, num_samples=samples, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("copies", "total"),
    [
        ([copy(1000, 100, 10)], 100),
        ([copy(1000, 100, 10), copy(500)], 150),
        ([copy(1000, 100, 10, max_samples=40)], 40),
        ([copy(1000, 100, 10), copy(0, max_samples=7)], 107),
        ([copy(1000, 100, 10), copy(500, max_samples=5)], 105),
        ([copy(1000, 500, 10, num_earlier=40)], 60),
        ([copy(0, max_samples=100, num_earlier=60)], 40),
        ([copy(1000, 100, 30, max_samples=5)], 30),  # a record gives several samples
        ([copy(0)], None),
        ([copy(1000)], None),
        ([CopyProgress(num_bytes=0, max_samples=None, num_samples=3, is_finished=True)], 3),
    ],
)
def test_the_rest_of_a_source_is_like_its_beginning(copies: list[CopyProgress], total: int | None) -> None:
    assert estimate_samples(copies) == total


def test_the_estimate_of_prepare_becomes_the_number_of_samples(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_frames, "FRAME_SAMPLES", 50)
    sources = []
    for name in ("a", "b"):
        samples = [rag_sample("Who? " + 200 * "fox ", id=f"{name}{i}") for i in range(400)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(sample_to_record(sample)) + "\n" for sample in samples))
        sources.append(Source(format=Format.samples, path=str(path)))
    totals: list[tuple[float, bool]] = []
    monkeypatch.setattr(
        Advance, "set_total", lambda self, total, is_estimate=False: totals.append((total, is_estimate))
    )
    prepare(make_recipe(sources=sources))
    *estimates, (total, is_estimate) = totals
    assert (total, is_estimate) == (800, False) and len(estimates) >= 8
    assert all(is_estimate and 600 <= estimate <= 850 for estimate, is_estimate in estimates[1:])
