"""Examples that fit in rows: what becomes of long samples, and which examples share their context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from blockft.data.encode import Encoder, Example
from blockft.data.rag import trim
from blockft.data.sample import Sample
from blockft.data.template import UnfitText


@dataclass(frozen=True)
class Outcome:
    """What became of a sample: the example as tried last, and why it was dropped, if it was."""

    sample: Sample
    example: Example | None
    dropped: str = ""


def encode_to_fit(
    samples: Sequence[Sample], encoder: Encoder, row_len: int, trims: bool, skip_bad: bool = False
) -> list[Outcome]:
    """Encode samples that have to fit in a row; if `trims`, long ones lose their least relevant documents.

    Raises:
        UnfitText: the template changes a text, unless `skip_bad`: then its sample is dropped.
    """
    trainable = [sample for sample in samples if sample.response]
    examples = iter(_encode(trainable, encoder, skip_bad))
    return [
        _fit(sample, next(examples), encoder, row_len, trims, skip_bad)
        if sample.response
        else Outcome(sample, None, "no response")
        for sample in samples
    ]


def _encode(samples: Sequence[Sample], encoder: Encoder, skip_bad: bool) -> list[Example | UnfitText]:
    """The examples of samples, and what is wrong with those that are unfit."""
    try:
        return [*encoder.encode(samples)]
    except UnfitText as unfit:
        if not skip_bad:
            raise
        # one unfit sample does not lose the others of its batch
        if len(samples) == 1:
            return [unfit]
        return [example for sample in samples for example in _encode([sample], encoder, skip_bad)]


def _fit(
    sample: Sample, example: Example | UnfitText, encoder: Encoder, row_len: int, trims: bool, skip_bad: bool
) -> Outcome:
    while isinstance(example, Example) and len(example) > row_len:
        trimmed = trim(sample) if trims else None
        if trimmed is None:
            return Outcome(sample, example, "too long")
        sample, (example,) = trimmed, _encode([trimmed], encoder, skip_bad)
    if isinstance(example, UnfitText):
        return Outcome(sample, None, example.reason)
    return Outcome(sample, example)


def share_context(examples: Iterator[Example], row_len: int) -> Iterator[Example]:
    """Consecutive examples with the same local blocks become one, as long as it fits in a row.

    The local blocks once, then a final block per question (`Layout.num_final`)::

        A B Q1  A B Q2  A C Q3   ->   A B Q1 Q2  A C Q3
    """
    group: list[Example] = []
    group_len = 0
    for example in examples:
        own_len = example.layout.final_lengths[0]
        if group and _shares(group[0], example) and group_len + own_len <= row_len:
            group.append(example)
            group_len += own_len
            continue
        if group:
            yield _merge(group)
        group, group_len = [example], len(example)
    if group:
        yield _merge(group)


def _shares(a: Example, b: Example) -> bool:
    context_len = a.layout.context_len
    return (
        context_len > 0
        and a.layout.local_lengths == b.layout.local_lengths
        and np.array_equal(a.input_ids[:context_len], b.input_ids[:context_len])
    )


def _merge(group: Sequence[Example]) -> Example:
    if len(group) == 1:
        return group[0]
    context_len = group[0].layout.context_len
    later = group[1:]
    return Example(
        input_ids=np.concatenate([group[0].input_ids, *(e.input_ids[context_len:] for e in later)]),
        labels=np.concatenate([group[0].labels, *(e.labels[context_len:] for e in later)]),
        block_lengths=group[0].block_lengths + tuple(e.block_lengths[-1] for e in later),
        num_final=len(group),
        sample_ids=tuple(id for e in group for id in e.sample_ids),
    )
