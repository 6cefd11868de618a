"""Check which questions and documents of `eval.sources` are also in `data.sources`."""

from collections.abc import Callable, Iterator
from typing import Any

from blockft.config.settings import Recipe, Source
from blockft.data.advice import list_leak_warnings
from blockft.data.leaks import Hashes, LeakFinder, hash_sample, to_hashes
from blockft.data.sample import Sample
from blockft.data.sources import RecordCounts
from blockft.errors import UserError, first_line, warn
from blockft.progress import progress
from blockft.stages.source_settings import read_source, take_in_turn
from blockft.units import format_count


class LeakCheck:
    """Compares the samples of `data.sources` with those of `eval.sources`, which are read here.

    An evaluation source that cannot be read gives a warning: it may be written after the training data.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._unread: dict[int, str] = {}
        self._evaluation = self._read_evaluation()
        self._finder = LeakFinder(self._evaluation, len(recipe.data.sources))

    def add(
        self, source: int, hashes: Hashes, get_id: Callable[[int], str], *, is_copy: bool = False
    ) -> None:
        """Add hashes of samples of `data.sources[source]`; see `LeakFinder.add`."""
        self._finder.add(source, hashes, get_id, is_copy=is_copy)

    def warn(self) -> None:
        """Print one warning for each pair of sources that have samples in common."""
        for warning in list_leak_warnings(self._leaks_record()):
            warn(warning)

    def to_record(self) -> dict[str, Any]:
        """Return the manifest's entries `leaks` and `duplicates`."""
        num_questions, num_samples = self._finder.count_duplicates()
        return {
            "leaks": self._leaks_record(),
            # training samples whose question, or whose question and documents, an earlier sample has as well
            "duplicates": {"questions": num_questions, "questions_and_documents": num_samples},
        }

    @property
    def _sources(self) -> list[Source]:
        return self._recipe.eval.sources if self._recipe.eval else []

    def _read_evaluation(self) -> list[tuple[list[str], Hashes]]:
        """Return the ids and hashes of the questions that `blockft eval` asks."""
        if not self._sources:
            return []
        template = self._recipe.data.prompt.question
        found: list[list[tuple[str, tuple[int, int]]]] = [[] for _ in self._sources]
        samples = [self._read(index, source) for index, source in enumerate(self._sources)]
        max_samples = self._recipe.eval.max_samples if self._recipe.eval else None
        with progress("read evaluation", unit="question") as advance:
            for index, sample in take_in_turn(samples, max_samples):
                found[index].append((sample.id, hash_sample(sample, template)))
                advance()
        return [([id for id, _ in pairs], to_hashes(hashes for _, hashes in pairs)) for pairs in found]

    def _read(self, index: int, source: Source) -> Iterator[Sample]:
        num_read = 0
        try:
            for sample in read_source(source, self._recipe.data, RecordCounts(), needs_evidence=False):
                if sample.answers:
                    num_read += 1
                    yield sample
        except UserError as error:
            self._unread[index] = first_line(error)
            after = f" after {format_count(num_read, 'question')}" if num_read else ""
            warn(f"eval.sources.{index} is not compared with the training data{after}: {error}")

    def _leaks_record(self) -> list[dict[str, Any]]:
        return [self._evaluation_record(index, source) for index, source in enumerate(self._sources)]

    def _evaluation_record(self, index: int, source: Source) -> dict[str, Any]:
        ids, _ = self._evaluation[index]
        record: dict[str, Any] = {"path": source.path, "format": source.format.value, "samples": len(ids)}
        if index in self._unread:
            record["not_read"] = self._unread[index]
        record["found"] = [
            {
                "training_source": leak.training_source,
                "path": self._recipe.data.sources[leak.training_source].path,
                "questions": leak.num_questions,
                "documents": leak.num_documents,
                "examples": [{"evaluation": ours, "training": theirs} for ours, theirs in leak.examples],
            }
            for leak in self._finder.leaks()
            if leak.evaluation_source == index
        ]
        return record
