"""Counts of what `prepare` reads and writes: statistics of sources and of examples, and histograms."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from blockft.data.encoder import Example
from blockft.data.fit import EncodedSample
from blockft.data.sources import MAX_LISTED, RecordCounts
from blockft.units import format_count


def histogram(numbers: Iterable[int] | Counter[int]) -> dict[str, int]:
    """Count how often each number occurs, sorted by number; the keys are texts, as JSON requires.

    A counter holds the counts already.
    """
    return {str(number): count for number, count in sorted(Counter(numbers).items())}


def _parse_histogram(record: Mapping[str, int]) -> Counter[int]:
    return Counter({int(number): count for number, count in record.items()})


@dataclass(kw_only=True)
class ExampleStatistics:
    """What the examples of a prepared folder look like.

    num_blocks: the number of examples by their number of blocks.
    lengths: the number of examples by their length, rounded up to a power of two.
    """

    num_examples: int = 0
    num_tokens: int = 0
    num_labels: int = 0
    num_blocks: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, example: Example) -> None:
        self.num_examples += 1
        self.num_tokens += len(example)
        self.num_labels += example.num_labels
        self.num_blocks[len(example.block_lengths)] += 1
        self.lengths[1 << (len(example) - 1).bit_length()] += 1

    def merge(self, other: "ExampleStatistics") -> None:
        """Add the statistics of other examples."""
        self.num_examples += other.num_examples
        self.num_tokens += other.num_tokens
        self.num_labels += other.num_labels
        self.num_blocks += other.num_blocks
        self.lengths += other.lengths

    def to_record(self) -> dict[str, Any]:
        """Return the statistics as JSON; `from_record` reads them."""
        histograms = {"num_blocks": histogram(self.num_blocks), "lengths": histogram(self.lengths)}
        return vars(self) | histograms

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "ExampleStatistics":
        """Return the statistics that `to_record` gave."""
        histograms = {name: _parse_histogram(record[name]) for name in ("num_blocks", "lengths")}
        return cls(**{**record, **histograms})


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
        if encoded.is_mismatch and len(self.mismatched_samples) < MAX_LISTED:
            self.mismatched_samples.append(f"sample {encoded.sample.id}: {encoded.drop_reason}")
        if encoded.example:
            length = encoded.row_tokens
            self.shortest_dropped = min(length, self.shortest_dropped or length)
            self.too_long_lengths[_round_length(length)] += 1

    def merge(self, other: RecordCounts) -> None:
        """Add the counts of other samples, or of another pass over the same records."""
        super().merge(other)
        if isinstance(other, SourceStatistics):
            self.templated += other.templated
            self.tokens += other.tokens
            lengths = [x for x in (self.shortest_dropped, other.shortest_dropped) if x is not None]
            self.shortest_dropped = min(lengths, default=None)
            self.too_long_lengths += other.too_long_lengths
            mismatched = dict.fromkeys(self.mismatched_samples + other.mismatched_samples)
            self.mismatched_samples = [*mismatched][:MAX_LISTED]

    def to_record(self) -> dict[str, Any]:
        """Return the counts as JSON; `from_record` reads them."""
        return vars(self) | {"too_long_lengths": histogram(self.too_long_lengths)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "SourceStatistics":
        """Return the counts that `to_record` gave. `merge` does not change the record."""
        counters: dict[str, Any] = {name: Counter(record[name]) for name in ("dropped", "unknown_fields")}
        counters["too_long_lengths"] = _parse_histogram(record["too_long_lengths"])
        return cls(**{**record, **counters, "drop_examples": {**record["drop_examples"]}})


def _round_length(length: int) -> int:
    """Return a length rounded up by at most an eighth, so that few different lengths are counted."""
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def _describe(encoded: EncodedSample) -> str:
    """Return the id, the size and the question of a dropped sample."""
    sample, example = encoded.sample, encoded.example
    if example:
        num_copied = encoded.row_tokens - len(example)
        copies = (
            f" and {format_count(num_copied, 'token')} in copies of the first block" if num_copied else ""
        )
        num_blocks = format_count(len(example.block_lengths), "block")
        size = f"{format_count(len(example), 'token')} in {num_blocks}{copies}, "
    else:
        size = ""
    return f"{sample.id}: {size}{sample.blocks[-1]}"
