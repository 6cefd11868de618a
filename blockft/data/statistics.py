"""Counts of what `prepare` reads and writes: statistics of sources and of examples, and histograms."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from blockft.data.encoder import Example
from blockft.data.fit import EncodedSample
from blockft.data.sources import RecordCounts
from blockft.units import format_count


def histogram(numbers: Iterable[int]) -> dict[str, int]:
    """Count how often each number occurs, sorted by number; the keys are texts, as JSON requires."""
    return {str(number): count for number, count in sorted(Counter(numbers).items())}


@dataclass
class ExampleStatistics:
    """What the examples of a prepared folder look like, in their order."""

    lengths: list[int] = field(default_factory=list)
    has_local_blocks: list[bool] = field(default_factory=list)
    num_blocks: list[int] = field(default_factory=list)
    num_labels: int = 0

    def add(self, example: Example) -> None:
        self.lengths.append(len(example))
        self.has_local_blocks.append(example.has_local_blocks)
        self.num_blocks.append(len(example.block_lengths))
        self.num_labels += example.num_labels


@dataclass
class SourceStatistics(RecordCounts):
    """The record counts of a source, and what is known only after its samples are encoded."""

    templated: int = 0
    tokens: int = 0
    shortest_dropped: int | None = None
    too_long_lengths: Counter[int] = field(default_factory=Counter)
    # kept apart from `bad_records`: how far reading is ahead of encoding depends on the number of workers
    mismatched_samples: list[str] = field(default_factory=list)

    def add_encoded(self, encoded: EncodedSample) -> None:
        """Count an encoded sample as kept, or as dropped with its reason."""
        if not encoded.drop_reason:
            self.kept += 1
            self.templated += bool(encoded.sample.templated)
            self.tokens += len(encoded.example or ())
            return
        self.drop(encoded.drop_reason, partial(_describe, encoded))
        if encoded.is_mismatch:
            self.mismatched_samples.append(f"sample {encoded.sample.id}: {encoded.drop_reason}")
        if encoded.example:
            length = len(encoded.example)
            self.shortest_dropped = min(length, self.shortest_dropped or length)
            self.too_long_lengths[_round_length(length)] += 1


def _round_length(length: int) -> int:
    """Return a length rounded up by at most an eighth, so that few different lengths are counted."""
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def _describe(encoded: EncodedSample) -> str:
    """Return the id, the size and the question of a dropped sample."""
    sample, example = encoded.sample, encoded.example
    if example:
        size = (
            f"{format_count(len(example), 'token')} in {format_count(len(example.block_lengths), 'block')}, "
        )
    else:
        size = ""
    return f"{sample.id}: {size}{sample.blocks[-1]}"
