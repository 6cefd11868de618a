"""What to change: rows with much padding, many dropped records, samples of the evaluation in training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blockft.data.chat_formats import NOT_LEARNED
from blockft.data.fit import TOO_LONG, UNRANKED, UNSPLIT
from blockft.data.mixture import Mixture
from blockft.data.packing import PackedRows, list_example_modes, plan_rows
from blockft.data.prepared import ExampleColumns
from blockft.data.qa_formats import NO_ANSWER, NO_POSITIVE, PART_OF_EVIDENCE
from blockft.data.retrieval import NOT_RETRIEVED
from blockft.data.sample import NO_EVIDENCE
from blockft.data.squad import NO_SPAN, OTHER_DOCUMENT
from blockft.data.teacher_response import REMEDIES as TEACHER_REMEDIES
from blockft.inputs import shorten
from blockft.units import format_count

MIN_FILL = 0.9
"""Rows that are filled less give a warning."""

GOOD_FILL = 0.95
"""A row length that is proposed gives at least this fill, if any does."""

MAX_DROPPED = 0.05
"""A reason that drops a larger share of a source gives a warning."""

KEPT_SHARE = 0.95
"""A row length that is proposed holds at least this share of the samples that are too long."""

MAX_PLANNED = 10_000
"""Number of items whose packing is tried with other row lengths."""

MAX_ID_LEN = 60
"""Number of characters of an id that a warning shows."""

_EVIDENCE = "use data whose records hold the documents with the answer, or add them to the records"

_REMEDIES = {
    NO_EVIDENCE: _EVIDENCE,
    NO_POSITIVE: _EVIDENCE,
    NOT_RETRIEVED: "raise data.num_documents, or add documents with the answers to the corpus",
    PART_OF_EVIDENCE: _EVIDENCE,
    NO_SPAN: "copy the answers from their paragraphs, letter by letter",
    OTHER_DOCUMENT: "lower data.num_documents, or set data.shared_context=false",
    NO_ANSWER: "questions without an answer are not trained; remove them from the file to lose this warning",
    NOT_LEARNED: "give an answer of the assistant a weight that is not 0",
    UNSPLIT: "data.splitting.unsplit=keep trains them in full mode",
    "no response": "write a response into the samples; answers alone are for evaluation",
    "bad record": "correct the records, which bad_records in the manifest lists",
    **TEACHER_REMEDIES,
}

_TEMPLATE_REMEDY = "data.on_bad_record=error stops at the first one and says what to change"


# --- rows


@dataclass(frozen=True, kw_only=True)
class RowFill:
    """How full rows of a length are: the share of their tokens that are not padding."""

    row_len: int
    num_rows: int
    fill: float

    @classmethod
    def of_rows(cls, rows: PackedRows, lengths: ArrayLike, row_len: int) -> "RowFill":
        """Return the fill of rows with items of these lengths. Empty rows do not count."""
        num_tokens = rows.count_tokens(lengths)
        num_rows = int(np.count_nonzero(num_tokens))
        return cls(row_len=row_len, num_rows=num_rows, fill=num_tokens.sum() / max(1, num_rows * row_len))


def list_item_lengths(
    columns: ExampleColumns, mixture: Mixture, modes: Sequence[str], seed: int, *, local_sees_first: bool
) -> tuple[NDArray[np.int64], int]:
    """Return the number of tokens that each item of the first epoch takes in a row, and how many are copied.

    An item is an example in one mode. `local_sees_first` is an option of `Layout`.
    """
    drawn = mixture.draw(np.arange(len(columns.lengths)), columns.sources, seed, epoch=0)
    items, is_block = list_example_modes(columns.has_local_blocks[drawn], modes)
    examples = drawn[items]
    lengths = columns.row_lengths(examples, is_block, local_sees_first=local_sees_first)
    return lengths, int((lengths - columns.lengths[examples]).sum())


def try_row_lengths(lengths: ArrayLike, row_len: int) -> list[RowFill]:
    """Return the fill with other row lengths: from the longest item to four times `row_len`, ascending.

    Of many items a random part is packed.
    """
    lengths = np.asarray(lengths, np.int64)
    longest = int(lengths.max())
    part = lengths
    if len(lengths) > MAX_PLANNED:
        part = np.random.default_rng(0).choice(lengths, MAX_PLANNED, replace=False)
    step = 128 if row_len >= 1024 else 16
    tried = {
        -(-longest // step) * step,
        *(row_len * quarters // 4 // step * step for quarters in range(2, 17)),
    }
    return [
        RowFill(
            row_len=length,
            num_rows=round(fill.num_rows * len(lengths) / len(part)),
            fill=fill.fill,
        )
        for length in sorted(tried - {row_len})
        if length >= longest
        for fill in (RowFill.of_rows(plan_rows(part, length, seed=0, epoch=0), part, length),)
    ]


def fill_advice(lengths: ArrayLike, fill: RowFill) -> str:
    """Return a warning with row lengths that give fuller rows, or "" if the rows are full enough.

    A last row that is not full is no reason for a warning.
    """
    num_free = (1 - fill.fill) * fill.num_rows * fill.row_len
    if fill.fill >= MIN_FILL or num_free < fill.row_len:
        return ""
    lengths = np.asarray(lengths, np.int64)
    better = choose_row_lengths(try_row_lengths(lengths, fill.row_len), fill)
    remedy = " and ".join(f"data.row_len={other.row_len} gives {other.fill:.0%}" for other in better)
    return (
        f"rows are {fill.fill:.0%} filled: a row of {fill.row_len:,} tokens holds "
        f"{len(lengths) / fill.num_rows:.1f} examples of {lengths.mean():,.0f} tokens"
        f"{f'; {remedy}' if remedy else '; more data fill the rows better'}"
    )


def choose_row_lengths(tried: Sequence[RowFill], fill: RowFill) -> list[RowFill]:
    """Return the nearest longer and the nearest shorter row with a good fill; if none is good, the best."""
    good = [other for other in tried if other.fill >= GOOD_FILL]
    longer = [other for other in good if other.row_len > fill.row_len][:1]
    shorter = [other for other in good if other.row_len < fill.row_len][-1:]
    if longer or shorter:
        return longer + shorter
    best = max(tried, key=lambda other: other.fill, default=fill)
    return [best] if best.fill > fill.fill + 0.02 else []


# --- drops


@dataclass(frozen=True, kw_only=True)
class Drop:
    """The records and samples of a source that were dropped for one reason.

    total: all samples of the source and its records without a sample.
    examples: descriptions of the first ones.
    """

    path: str
    reason: str
    count: int
    total: int
    examples: tuple[str, ...]
    remedy: str

    @cached_property
    def share(self) -> float:
        return self.count / self.total

    @property
    def is_large(self) -> bool:
        """Whether the share is large enough for a warning. `unsplit: drop` asks for its drops."""
        return self.share > MAX_DROPPED and self.reason != UNSPLIT

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.count:,} of {self.total:,} dropped ({self.share:.0%}), {self.reason}: "
            f"{self.remedy}"
        )


def list_drops(manifest: Mapping[str, Any]) -> Iterator[Drop]:
    """Yield what a prepared folder does not hold, by source and reason, the largest of a source first."""
    for index, source in enumerate(manifest["sources"]):
        dropped = source["dropped"]
        for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
            yield Drop(
                path=source["path"],
                reason=reason,
                count=count,
                total=source["kept"] + sum(dropped.values()),
                examples=tuple(source["drop_examples"].get(reason, ())),
                remedy=_remedy(reason, index, source, manifest["options"]),
            )


def drop_remedy(reason: str) -> str:
    """Return what a user can change if many samples are dropped for a reason other than their length."""
    return _REMEDIES.get(reason, _TEMPLATE_REMEDY)


def num_documents_setting(index: int, format: str) -> str:
    """Return the setting that limits the documents of the prompts of a source."""
    return (
        f"data.sources.{index}.constructed.num_documents" if format == "constructed" else "data.num_documents"
    )


def _remedy(reason: str, index: int, source: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    if reason not in (TOO_LONG, UNRANKED):
        return drop_remedy(reason)
    lengths = {int(length): count for length, count in source["too_long_lengths"].items()}
    remedies = [_row_len_remedy(lengths)]
    if source["has_questions"]:
        if reason == UNRANKED:
            remedies.append("retriever: bm25 in the source ranks its documents, so that they can be trimmed")
        elif options["too_long"] == "drop":
            remedies.append("data.too_long=trim leaves out the least relevant documents")
        remedies.append(f"lower {num_documents_setting(index, source['format'])}")
    return "; or ".join(remedies)


def _row_len_remedy(lengths: Mapping[int, int]) -> str:
    """Return the row length that holds most of the samples of these lengths."""
    ascending, total = sorted(lengths), sum(lengths.values())
    kept_counts = [*accumulate(lengths[length] for length in ascending)]
    place = next(i for i, kept in enumerate(kept_counts) if kept >= KEPT_SHARE * total)
    needed, kept = ascending[place], kept_counts[place]
    step = 1024 if needed > 4096 else 128
    return f"data.row_len={-(-needed // step) * step} holds {kept / total:.0%} of them"


def list_warnings(manifest: Mapping[str, Any], lengths: NDArray[np.int64], fill: RowFill) -> list[str]:
    """Return one sentence for each thing to change: too much padding, or a reason that drops too many.

    lengths: of the items of an epoch.
    """
    warnings = [fill_advice(lengths, fill)]
    return [*filter(None, warnings), *(str(drop) for drop in list_drops(manifest) if drop.is_large)]


# --- leaks


def list_leak_warnings(leaks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one sentence for each pair of a training and an evaluation source that have samples in common.

    leaks: the entry `leaks` of the manifest.
    """
    for index, evaluation in enumerate(leaks):
        for found in evaluation["found"]:
            shared = [format_count(found["questions"], "question")] if found["questions"] else []
            if found["documents"]:
                shared.append(format_count(found["documents"], "set of documents", "sets of documents"))
            examples = ", ".join(
                f"{shorten(example['evaluation'], MAX_ID_LEN)} and {shorten(example['training'], MAX_ID_LEN)}"
                for example in found["examples"]
            )
            yield (
                f"data.sources.{found['training_source']} ({found['path']}) also holds "
                f"{' and '.join(shared)} of eval.sources.{index} ({evaluation['path']}), which has "
                f"{format_count(evaluation['samples'], 'question')} (ids in evaluation and training: "
                f"{examples}): scores may be too high; take other samples with split, skip_samples or "
                "max_samples"
            )
