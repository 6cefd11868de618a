"""Read and encode the sources of a recipe through the part cache of `prepare`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from blockft.config.choices import Retriever
from blockft.config.settings import DataSettings
from blockft.data.encode_part import EncodedFrame, encode_frame, merge_statistics, write_encoded_shard
from blockft.data.encoder import Encoder
from blockft.data.parallel import map_in_order
from blockft.data.part_cache import Part, part_name
from blockft.data.sample import Sample
from blockft.data.sample_frames import Frame, read_frames, unpack_frame
from blockft.data.sources import RecordCounts
from blockft.data.statistics import ExampleStatistics, SourceStatistics
from blockft.progress import Advance, progress
from blockft.stages.part_options import (
    SourceContent,
    encode_options,
    encode_part_options,
    identify_model,
    identify_tokenizer,
    read_options,
)
from blockft.stages.sample_estimate import CopyProgress, estimate_samples
from blockft.stages.source_settings import read_source, sees_first_block
from blockft.stages.teacher_answers import TeacherResponses

Copy = tuple[int, int]
"""The index of a source, and the number of one of its copies (`data.num_copies`)."""


@dataclass(frozen=True)
class _Task:
    """A frame of samples of a copy, and the shard that it belongs to."""

    copy: Copy
    shard: int
    frame: Frame


class SourceParts:
    """The parts of all sources of a recipe in a cache; reads and encodes what is not there.

    Raises:
        UserError: a source does not exist, or its settings contradict each other.
    """

    def __init__(self, data: DataSettings, cache: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data, self._cache = data, cache
        self._encoder = Encoder(tokenizer, local_sees_first=sees_first_block(data))
        self._tokenizer = identify_tokenizer(tokenizer)
        self._contents = [SourceContent(source) for source in data.sources]
        uses_dense = any(source.retriever is Retriever.dense for source in data.sources)
        self._dense_model = identify_model(data.dense_model) if uses_dense else None
        self._parts: dict[str, Part] = {}
        self._read_names: dict[Copy, str] = {}
        self._encode_names: dict[Copy, str] = {}
        self._opened: set[str] = set()
        self.unusable: set[str] = set()
        """The names of the parts that no other run finds, because the content of their source is unknown."""
        self._responses = TeacherResponses()
        self.num_shards_read = 0
        self.num_shards_encoded = 0
        for index in range(len(data.sources)):
            self._open_source(index, data, RecordCounts())

    @property
    def copies(self) -> list[Copy]:
        """All copies of all sources, in the order of the prepared folder."""
        return [
            (i, number) for i in range(len(self._data.sources)) for number in range(self._data.num_copies)
        ]

    @property
    def used(self) -> frozenset[str]:
        """The names of the parts that another run can use again."""
        of_copies = {
            name
            for copy in self.copies
            if self._is_known(copy[0])
            for name in (self._read_name(copy, self._data), self.encode_part(copy).name)
        }
        return frozenset(self._opened | of_copies)

    def read(self, index: int, data: DataSettings) -> Iterator[Sample]:
        """Yield the samples of all copies of a source. `data` may have another wording than the recipe."""
        for number in range(data.num_copies):
            for _, frame in self._read_copy((index, number), data):
                _, samples = unpack_frame(frame)
                yield from samples

    def encode(self, responses: TeacherResponses) -> None:
        """Encode all sources with the responses to learn.

        Raises:
            UserError: a source cannot be read, or a record is bad and `data.on_bad_record` is error.
        """
        self._responses = responses
        encode = partial(_encode_task, encoder=self._encoder, data=self._data, responses=responses)
        with progress("encode", unit="sample") as advance:
            tasks = map_in_order(encode, self._tasks(advance), self._data.num_workers)
            for copy, of_copy in groupby(tasks, itemgetter(0)):
                part = self.encode_part(copy)
                for _, of_shard in groupby(of_copy, itemgetter(1)):
                    frames = (frame for _, _, frame in of_shard)
                    write_encoded_shard(part, _count(frames, advance))
                    self.num_shards_encoded += 1
                self._finish_encode(copy)
        for copy in self.copies:
            self._finish_encode(copy)

    def encode_part(self, copy: Copy) -> Part:
        """Return the encode part of a copy. It depends on the responses that `encode` takes."""
        if copy not in self._encode_names:
            options = encode_options(self._data.sources[copy[0]], self._data)
            read_name = self._read_name(copy, self._data)
            answers = self._responses.digest(copy[0])
            part_options = encode_part_options(read_name, options, self._tokenizer, answers)
            self._encode_names[copy] = part_name("encode", part_options)
        return self._part(self._encode_names[copy], copy)

    def statistics(self, copy: Copy) -> tuple[SourceStatistics, ExampleStatistics]:
        """Return the counts of a copy that is encoded, those of its reading included."""
        part = self.encode_part(copy)
        encoded, examples = merge_statistics(part)
        statistics = SourceStatistics.from_record(part.state["counts"])
        statistics.merge(encoded)
        return statistics, examples

    def _tasks(self, advance: Advance) -> Iterator[_Task]:
        """Yield the frames that are not encoded; estimate their number of samples on the way."""
        missing: dict[str, Copy] = {}
        for copy in self.copies:
            if not (part := self.encode_part(copy)).is_complete:
                missing.setdefault(part.name, copy)  # a source that the recipe names twice has one part
        read = {copy: self._copy_progress(copy) for copy in missing.values()}
        for copy in missing.values():
            for shard, frame in self._read_copy(copy, self._data, start=len(self.encode_part(copy).shards)):
                read[copy].num_samples += frame.num_samples
                if not self._read_part(copy, self._data).is_complete:
                    read[copy].num_bytes_read = self._contents[copy[0]].num_bytes_read()
                if (total := estimate_samples([*read.values()])) is not None:
                    advance.set_total(total, is_estimate=True)
                yield _Task(copy, shard, frame)
            read[copy].is_finished = True
        advance.set_total(sum(of_copy.num_samples for of_copy in read.values()))

    def _copy_progress(self, copy: Copy) -> CopyProgress:
        """Return the size of a copy; the number of samples of a part that is read is known."""
        index, _ = copy
        part = self._read_part(copy, self._data)
        counts = [sum(number for _, number, _ in shard.state["frames"]) for shard in part.shards]
        num_earlier = sum(counts[: len(self.encode_part(copy).shards)])
        if part.is_complete:
            return CopyProgress(num_bytes=0, max_samples=sum(counts), num_earlier=num_earlier)
        content, source = self._contents[index], self._data.sources[index]
        return CopyProgress(
            num_bytes=content.num_bytes, max_samples=source.max_samples, num_earlier=num_earlier
        )

    def _read_copy(self, copy: Copy, data: DataSettings, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """Yield the frames of a copy from shard `start` on; complete its read part."""
        part = self._read_part(copy, data)
        counts = SourceStatistics()
        index, number = copy
        of_copy = data.model_copy(update={"seed": data.seed + number})
        num_stored = len(part.shards)
        yield from read_frames(
            part,
            lambda: self._open_source(index, of_copy, counts),
            self._contents[index].check_unchanged,
            keep_contexts=data.shared_context,
            start=start,
        )
        self.num_shards_read += len(part.shards) - num_stored
        if not part.is_complete:
            self._contents[index].check_unchanged()
            part.finish(counts.to_record())

    def _open_source(self, index: int, data: DataSettings, counts: RecordCounts) -> Iterator[Sample]:
        return read_source(data.sources[index], data, counts, revision=self._contents[index].revision)

    def _read_part(self, copy: Copy, data: DataSettings) -> Part:
        return self._part(self._read_name(copy, data), copy)

    def _read_name(self, copy: Copy, data: DataSettings) -> str:
        index, number = copy
        is_own = data is self._data
        if not is_own or copy not in self._read_names:
            content, source = self._contents[index], data.sources[index]
            dense_model = self._dense_model or content.nonce
            name = part_name("read", read_options(source, data, content, dense_model, number))
            if not is_own:
                return name
            self._read_names[copy] = name
        return self._read_names[copy]

    def _part(self, name: str, copy: Copy) -> Part:
        if name not in self._parts:
            self._parts[name] = Part(self._cache, name)
            if self._is_known(copy[0]):
                self._opened.add(name)
            else:
                self.unusable.add(name)
        return self._parts[name]

    def _is_known(self, index: int) -> bool:
        """Return whether the key of a source stands for its content, so that its parts can be used again."""
        searches = self._data.sources[index].retriever is Retriever.dense
        return self._contents[index].is_known and (self._dense_model is not None or not searches)

    def _finish_encode(self, copy: Copy) -> None:
        part = self.encode_part(copy)
        if not part.is_complete:
            part.finish({"counts": self._read_part(copy, self._data).state})


def _encode_task(
    task: _Task, *, encoder: Encoder, data: DataSettings, responses: TeacherResponses
) -> tuple[Copy, int, EncodedFrame]:
    index, _ = task.copy
    options = encode_options(data.sources[index], data)
    respond = partial(responses.respond_all, index)
    return task.copy, task.shard, encode_frame(task.frame, encoder, options, respond)


def _count(frames: Iterator[EncodedFrame], advance: Advance) -> Iterator[EncodedFrame]:
    for frame in frames:
        yield frame
        advance(len(frame.ids))
