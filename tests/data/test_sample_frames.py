"""Frames of samples: equal samples come out, contexts stay together, and a stored part is not read again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockft.data import sample_frames
from blockft.data.part_cache import Part, part_name
from blockft.data.sample import Message, Sample
from blockft.data.sample_frames import pack_frames, read_frames, unpack_frame
from blockft.errors import UserError
from tests.data.toys import rag_sample

NAME = part_name("read", {})


def samples(number: int) -> list[Sample]:
    return [rag_sample(f"Question {i}?\u2028", (f"Fox {i // 7}.\n",), id=str(i)) for i in range(number)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_frames, "FRAME_SAMPLES", 4)
    monkeypatch.setattr(sample_frames, "SHARD_SAMPLES", 10)
    monkeypatch.setattr(sample_frames, "MAX_FRAME_SAMPLES", 20)


def test_samples_come_out_of_their_frames_unchanged() -> None:
    given = [
        *samples(9),
        Sample(id="t", source="x", templated=("a\n", "b"), response="", answers=("c",)),
        Sample(id="chat", source="x", messages=(Message(role="user", content=("one",)),), response="two"),
    ]
    frames = list(pack_frames(iter(given), keep_contexts=False))
    assert [frame.num_samples for frame in frames] == [4, 4, 3]
    assert [sample for frame in frames for sample in unpack_frame(frame)[1]] == given


def test_questions_about_the_same_documents_stay_together() -> None:
    frames = list(pack_frames(iter(samples(30)), keep_contexts=True))
    assert [frame.num_samples for frame in frames] == [7, 7, 7, 7, 2]
    same = [replace(sample, messages=samples(1)[0].messages) for sample in samples(45)]
    # up to a limit, because a frame is held in memory
    assert [frame.num_samples for frame in pack_frames(iter(same), keep_contexts=True)] == [20, 20, 5]


class Source:
    """Counts the samples that are read."""

    def __init__(self, number: int) -> None:
        self.number, self.num_read = number, 0

    def __call__(self) -> Iterator[Sample]:
        for sample in samples(self.number):
            self.num_read += 1
            yield sample


def read(cache: Path, source: Source, take: int | None = None, **options: Any) -> list[str]:
    """Read frames, as many as `take`, and return the ids of their samples."""
    part = Part(cache, NAME)
    ids: list[str] = []
    frames = read_frames(part, source, lambda: None, keep_contexts=False, **options)
    for number, (_, frame) in enumerate(frames):
        ids += [sample.id for sample in unpack_frame(frame)[1]]
        if number + 1 == take:
            return ids
    if not part.is_complete:
        part.finish({})
    return ids


def test_a_complete_part_is_not_read_again(tmp_path: Path) -> None:
    source = Source(25)
    expected = [str(i) for i in range(25)]
    assert read(tmp_path, source) == expected == read(tmp_path, source) and source.num_read == 25
    assert read(tmp_path, source, start=1) == expected[12:]


@pytest.mark.parametrize("take", range(1, 8))
def test_an_interrupted_part_gives_the_same_files(tmp_path: Path, take: int) -> None:
    read(tmp_path / "whole", Source(25))
    read(tmp_path, Source(25), take=take)
    assert read(tmp_path, Source(25)) == [str(i) for i in range(25)]
    contents = [
        {path.name: path.read_bytes() for path in (folder / NAME).iterdir()}
        for folder in (tmp_path, tmp_path / "whole")
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 7


def test_shards_that_are_written_again_are_not_yielded_before_the_start(tmp_path: Path) -> None:
    assert read(tmp_path, Source(25), start=2) == ["24"]


def test_no_shard_counts_that_was_read_from_a_source_that_changed(tmp_path: Path) -> None:
    checks = iter([None, UserError("the source changed")])

    def check() -> None:
        if error := next(checks):
            raise error

    with pytest.raises(UserError, match="changed"):
        list(read_frames(Part(tmp_path, NAME), Source(30), check, keep_contexts=False))
    assert len(Part(tmp_path, NAME).shards) == 1


def test_an_abandoned_shard_leaves_nothing_to_write(tmp_path: Path) -> None:
    part = Part(tmp_path, NAME)
    frames = read_frames(part, Source(30), lambda: None, keep_contexts=False)
    _, frame = next(frames)
    # nothing is left to write, which could fail on a full disk while the generator is closed
    assert (part.folder / "00000.frames").read_bytes() == frame.data
