"""Shared contexts: merge examples that have the same local blocks into one example with several questions."""

from collections.abc import Iterator, Sequence

import numpy as np

from blockft.data.encoder import Example


def merge_shared_contexts(
    examples: Iterator[Example],
    row_len: int,
    max_questions: int | None = None,
    *,
    local_sees_first: bool = False,
) -> Iterator[Example]:
    """Merge consecutive examples with the same local blocks, as long as the merged example fits in a row.

    A merged example has the local blocks once, then one final block per question (`Layout.num_final`)::

        A B Q1  A B Q2  A C Q3   ->   A B Q1 Q2  A C Q3

    A merged example has at most `max_questions` questions; None sets no limit. With `local_sees_first`, it
    also has the copies of the first block (see `Layout`) once.
    """
    group: list[Example] = []
    group_len = 0
    for example in examples:
        final_len = example.layout.final_lengths[0]
        fits = group_len + final_len <= row_len and len(group) != max_questions
        if group and fits and _have_same_context(group[0], example):
            group.append(example)
            group_len += final_len
            continue
        if group:
            yield _merge_examples(group)
        group, group_len = [example], len(example) + (example.copy_len if local_sees_first else 0)
    if group:
        yield _merge_examples(group)


def _have_same_context(a: Example, b: Example) -> bool:
    context_len = a.layout.context_len
    return (
        context_len > 0
        and a.layout.local_lengths == b.layout.local_lengths
        and np.array_equal(a.input_ids[:context_len], b.input_ids[:context_len])
    )


def _merge_examples(group: Sequence[Example]) -> Example:
    """Return one example with the context of the group and the final blocks of all its examples."""
    if len(group) == 1:
        return group[0]
    context_len = group[0].layout.context_len
    later = group[1:]
    # each final block moves from the end of its own context to the end of the final block before it
    ends = np.cumsum([len(group[0]), *(len(e) - context_len for e in later)])
    moves = [0, *(int(end) - context_len for end in ends[:-1])]
    return Example(
        input_ids=np.concatenate([group[0].input_ids, *(e.input_ids[context_len:] for e in later)]),
        label_spans=tuple(
            (start + move, end + move)
            for e, move in zip(group, moves, strict=True)
            for start, end in e.label_spans
        ),
        block_lengths=group[0].block_lengths + tuple(e.block_lengths[-1] for e in later),
        num_final=len(group),
        sample_ids=tuple(id for e in group for id in e.sample_ids),
    )
