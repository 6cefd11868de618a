"""Frames of samples: compressed JSON lines, the tasks of the workers of `prepare`; read parts hold them.

A frame is decided by its samples alone, not by the number of workers. Each shard of a read part is the file
`NNNNN.frames`, its frames one after the other.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from blockft.data.part_cache import Part
from blockft.data.prepared import SHARD_SAMPLES
from blockft.data.sample import Message, Sample, sample_to_record

FRAME_SAMPLES = 256
"""Number of samples of a frame, unless samples with the same documents stay together."""

MAX_FRAME_SAMPLES = SHARD_SAMPLES
"""Largest number of samples of a frame."""

COMPRESSION_LEVEL = 1


@dataclass(frozen=True)
class Frame:
    """Consecutive samples of a source, as compressed JSON lines. `raw_bytes` is their uncompressed size."""

    data: bytes
    raw_bytes: int
    num_samples: int


def pack_frames(samples: Iterator[Sample], *, keep_contexts: bool) -> Iterator[Frame]:
    """Divide samples into frames.

    keep_contexts: a frame ends only where the documents change, so that questions about the same documents
        are in one frame, up to `MAX_FRAME_SAMPLES`.
    """
    lines: list[str] = []
    previous: object = None
    for sample in samples:
        context = _context(sample) if keep_contexts else None
        is_full = len(lines) >= FRAME_SAMPLES and (not keep_contexts or context != previous)
        if is_full or len(lines) == MAX_FRAME_SAMPLES:
            yield _pack(lines)
            lines = []
        lines.append(json.dumps(sample_to_record(sample), ensure_ascii=False))
        previous = context
    if lines:
        yield _pack(lines)


def unpack_frame(frame: Frame) -> tuple[list[bytes], list[Sample]]:
    """Return the JSON lines of a frame without their line feeds, and the samples."""
    text = _codec().decompress(frame.data, frame.raw_bytes, asbytes=True)
    lines = text.split(b"\n")[:-1]
    return lines, [_build_sample(json.loads(line)) for line in lines]


def read_frames(
    part: Part,
    read: Callable[[], Iterator[Sample]],
    check_source: Callable[[], None],
    *,
    keep_contexts: bool,
    start: int = 0,
) -> Iterator[tuple[int, Frame]]:
    """Yield the frames of a read part from shard `start` on, each with the number of its shard.

    Shards that are not in the cache are read from the source and stored on their way. The caller completes
    the part after the last frame.

    check_source: raises an error if the source changed since the key of the part was made. It is called
        before a shard counts, because a shard with another content must not stay in the cache.
    """
    num_done = 0
    for number in range(len(part.shards)):
        num_done += sum(num_samples for _, num_samples, _ in part.shards[number].state["frames"])
        if number >= start:
            yield from ((number, frame) for frame in _stored_frames(part, number))
    if part.is_complete:
        return
    samples = read()
    next(islice(samples, num_done, num_done), None)
    frames = pack_frames(samples, keep_contexts=keep_contexts)
    while (first := next(frames, None)) is not None:
        number = len(part.shards)
        for frame in _store_shard(part, first, frames, check_source):
            if number >= start:
                yield number, frame


def _store_shard(
    part: Part, first: Frame, frames: Iterator[Frame], check_source: Callable[[], None]
) -> Iterator[Frame]:
    """Yield the frames of the next shard, and store them."""
    part.start()
    name = _file_name(len(part.shards))
    sizes: list[list[int]] = []
    num_samples = 0
    frame: Frame | None = first
    with (part.folder / name).open("wb") as file:
        while frame is not None:
            file.write(frame.data)
            file.flush()  # on a full disk, closing an abandoned generator would fail, and print a traceback
            sizes.append([frame.raw_bytes, frame.num_samples, len(frame.data)])
            num_samples += frame.num_samples
            yield frame
            frame = next(frames, None) if num_samples < SHARD_SAMPLES else None
    check_source()
    part.add_shard([name], {"frames": sizes})


def _stored_frames(part: Part, number: int) -> Iterator[Frame]:
    with (part.folder / _file_name(number)).open("rb") as file:
        for raw_bytes, num_samples, num_bytes in part.shards[number].state["frames"]:
            yield Frame(file.read(num_bytes), raw_bytes, num_samples)


def _file_name(number: int) -> str:
    return f"{number:05}.frames"


def _pack(lines: list[str]) -> Frame:
    data = ("\n".join(lines) + "\n").encode()
    return Frame(_codec().compress(data, asbytes=True), len(data), len(lines))


def _codec() -> Any:
    return pa.Codec("zstd", compression_level=COMPRESSION_LEVEL)


def _build_sample(record: dict[str, Any]) -> Sample:
    """Return the sample of a record that `sample_to_record` gave, which needs no checks."""
    return Sample(
        id=record["id"],
        source=record["source"],
        messages=tuple(
            Message(role=message["role"], content=tuple(message["content"]))
            for message in record.get("messages", ())
        ),
        templated=tuple(record.get("blocks", ())),
        response=record["response"],
        answers=tuple(record.get("answers", ())),
        meta=record.get("meta", {}),
    )


def _context(sample: Sample) -> object:
    """Return a value that is equal for samples whose local blocks may be equal once chats are split."""
    if sample.templated:
        return sample.templated[:-1]
    *earlier, last = sample.messages
    return [(message.role, message.content) for message in earlier], last.content[:-1]
