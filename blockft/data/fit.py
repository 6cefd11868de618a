"""What fits: samples in rows, prompts in a model; what becomes of long ones, which share contexts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from blockft.data.chat_template import TemplateMismatch
from blockft.data.encoder import Encoder, Example
from blockft.data.rag_prompt import trim_prompt, trim_sample
from blockft.data.sample import Sample
from blockft.errors import UserError


@dataclass(frozen=True)
class EncodedSample:
    """What became of a sample: the example as tried last, and why it was dropped, if it was.

    One that is unfit for the chat template or the tokenizer has no example.
    """

    sample: Sample
    example: Example | None
    dropped: str = ""
    is_unfit: bool = False


def encode_samples(
    samples: Sequence[Sample],
    encoder: Encoder,
    row_len: int,
    trim: bool,
    skip_bad: bool = False,
    cut: Callable[[Sample], Sample] | None = None,
) -> list[EncodedSample]:
    """Encode samples that have to fit in a row; if `trims`, long ones lose their least relevant documents.

    They are `cut` into blocks before, where their format does not mark any.

    Raises:
        UnfitText: the template or the tokenizer does not keep a text of a sample, which is named, unless
            `skip_bad`: then it is dropped.
    """
    trainable = [sample for sample in samples if sample.response]
    encoded = iter(_encode(trainable, encoder, cut))
    return [
        _fit(*next(encoded), encoder, row_len, trim, skip_bad)
        if sample.response
        else EncodedSample(sample, None, "no response")
        for sample in samples
    ]


def _encode(
    samples: Sequence[Sample], encoder: Encoder, cut: Callable[[Sample], Sample] | None = None
) -> list[tuple[Sample, Example | TemplateMismatch]]:
    """The samples as cut, and their examples, or what is wrong with those that are unfit."""
    try:
        as_cut = [cut(sample) for sample in samples] if cut else samples
        return [*zip(as_cut, encoder.encode(as_cut), strict=True)]
    except TemplateMismatch as unfit:
        # one unfit sample does not lose the others of its batch, and only alone is it known which one it is
        if len(samples) == 1:
            return [(samples[0], unfit)]
        return [one for sample in samples for one in _encode([sample], encoder, cut)]


def _fit(
    sample: Sample,
    example: Example | TemplateMismatch,
    encoder: Encoder,
    row_len: int,
    trim: bool,
    skip_bad: bool,
) -> EncodedSample:
    while isinstance(example, Example) and len(example) > row_len:
        trimmed = trim_sample(sample) if trim else None
        if trimmed is None:
            unranked = trim and sample.documents and not sample.meta.get("relevance")
            return EncodedSample(
                sample, example, "too long, documents without relevance" if unranked else "too long"
            )
        ((sample, example),) = _encode([trimmed], encoder)
    if isinstance(example, Example):
        return EncodedSample(sample, example)
    if not skip_bad:
        name = f"sample {sample.id} of {sample.source}: "
        raise TemplateMismatch(name + str(example).removeprefix(name), example.reason) from example
    return EncodedSample(sample, None, example.reason, is_unfit=True)


class PromptTooLong(UserError):
    """A prompt that does not fit into the model's positions together with its answer; others may."""


def fit_prompt(
    prompt: Sample, encoder: Encoder, num_positions: int, max_new_tokens: int, trim: bool
) -> tuple[Sample, list[list[int]]]:
    """A prompt that leaves room for an answer, and the token ids of its blocks.

    If `trims`, one that is too long loses its least relevant documents.

    Raises:
        PromptTooLong: it is too long, and not to be trimmed, or not enough.
        UnfitText: the template or the tokenizer does not keep a text of it.
    """
    ids = encoder.encode_prompt(prompt)
    while sum(map(len, ids)) + max_new_tokens > num_positions:
        shorter = trim_prompt(prompt) if trim else None
        if shorter is None:
            raise PromptTooLong(
                f"prompt {prompt.id}: it and its answer need {sum(map(len, ids)) + max_new_tokens} tokens, "
                f"the model has {num_positions} positions: "
                f"{_remedy(prompt, len(ids[-1]) + max_new_tokens > num_positions, trim)}"
            )
        prompt, ids = shorter, encoder.encode_prompt(shorter)
    return prompt, ids


def _remedy(prompt: Sample, is_question_too_long: bool, trim: bool) -> str:
    """What would make a prompt fit."""
    if is_question_too_long or not prompt.documents:
        return "shorten its question, or ask for fewer new tokens"
    return "no document can be spared" if trim else "use fewer documents or fewer new tokens"


def share_contexts(
    examples: Iterator[Example], row_len: int, num_questions: int | None = None
) -> Iterator[Example]:
    """Consecutive examples with the same local blocks become one, as long as it fits in a row.

    If there is a limit, no more than `num_questions` of them do.

    The local blocks once, then a final block per question (`Layout.num_final`)::

        A B Q1  A B Q2  A C Q3   ->   A B Q1 Q2  A C Q3
    """
    group: list[Example] = []
    group_len = 0
    for example in examples:
        own_len = example.layout.final_lengths[0]
        fits = group_len + own_len <= row_len and len(group) != num_questions
        if group and fits and _have_same_context(group[0], example):
            group.append(example)
            group_len += own_len
            continue
        if group:
            yield _merge_examples(group)
        group, group_len = [example], len(example)
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
