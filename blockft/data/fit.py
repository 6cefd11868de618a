"""Encode samples and prompts within a length limit, trimming documents if allowed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockft.data.chat_template import TemplateMismatch
from blockft.data.encoder import Encoder, Example
from blockft.data.sample import SKIP_REMEDY, Sample
from blockft.errors import UserError

TOO_LONG = "too long"
UNRANKED = "too long, documents without relevance"
"""Reasons for dropping a sample that is longer than a row. Documents without a relevance are not trimmed."""

UNSPLIT = "does not split into blocks"
"""The reason for dropping a sample whose prompt is one block, if only samples of several are wanted."""


class PromptTooLong(UserError):
    """A prompt and its answer do not fit into the model's positions; other prompts may fit."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample after splitting and trimming, with its example, or with the reason why it was dropped.

    A sample that is too long has the example of the last attempt to trim it. A sample that the chat template
    or the tokenizer changes (`is_mismatch`), or that does not split, has no example. `row_tokens` is the
    number of tokens that the example takes in a row.
    """

    sample: Sample
    example: Example | None
    drop_reason: str = ""
    is_mismatch: bool = False
    row_tokens: int = 0


def encode_samples(
    samples: Sequence[Sample],
    encoder: Encoder,
    row_len: int,
    *,
    trim: bool,
    skip_bad: bool = False,
    split: Callable[[Sample], Sample] | None = None,
    drop_unsplit: bool = False,
    local_sees_first: bool = False,
) -> list[EncodedSample]:
    """Encode samples to train on, one `EncodedSample` per sample, in order.

    Args:
        row_len: the number of tokens that an example may take in a row.
        trim: a sample that is too long loses its least relevant documents; otherwise it is dropped.
        skip_bad: drop a sample that the template or the tokenizer changes, instead of raising.
        split: splits the prompt of a sample into blocks, for formats that mark none.
        drop_unsplit: drop a sample whose prompt is one block after splitting.
        local_sees_first: rows hold copies of the first block, see `Layout`.

    Raises:
        TemplateMismatch: the template or the tokenizer changes a text; the message names the sample.
    """
    trainable = [sample for sample in samples if sample.response.strip()]
    encoded = iter(_encode_each(trainable, encoder, split, drop_unsplit))
    return [
        _fit_sample(*next(encoded), encoder, row_len, trim, skip_bad, local_sees_first)
        if sample.response.strip()
        else EncodedSample(sample, None, "no response")
        for sample in samples
    ]


def fit_prompt(
    prompt: Sample, encoder: Encoder, num_positions: int, max_new_tokens: int, trim: bool
) -> tuple[Sample, list[list[int]]]:
    """Return a prompt that leaves room for `max_new_tokens`, and the token ids of each of its blocks.

    With `trim`, a prompt that is too long loses its least relevant documents.

    Raises:
        PromptTooLong: the prompt is too long and may not be trimmed, or is too long without documents.
        TemplateMismatch: the template or the tokenizer changes a text of the prompt.
    """
    block_ids = encoder.encode_prompt(prompt)
    while sum(map(len, block_ids)) + max_new_tokens > num_positions:
        trimmed = trim_document(prompt) if trim else None
        if trimmed is None:
            raise PromptTooLong(
                f"prompt {prompt.id}: the prompt and its answer need "
                f"{sum(map(len, block_ids)) + max_new_tokens} tokens, "
                f"the model has {num_positions} positions: "
                f"{_remedy(prompt, len(block_ids[-1]) + max_new_tokens > num_positions, trim)}"
            )
        prompt, block_ids = trimmed, encoder.encode_prompt(trimmed)
    return prompt, block_ids


def trim_document(sample: Sample, *, keep_evidence: bool = False) -> Sample | None:
    """Return the sample without its least relevant document, or None if no document may be dropped.

    Documents that are known to support the answer go last. Of the others, the document with the lowest
    relevance goes first; among documents of equal relevance the last one goes first. Documents without a
    relevance are equal. A prompt keeps at least one document.

    `keep_evidence` is for training data, because a question without its evidence would teach the model to
    invent answers. Supporting documents then stay. If none is known to support the answer, the most relevant
    documents stay. Documents without a relevance all stay.
    """
    supporting = sample.meta.get("supporting", ())
    relevance = sample.meta.get("relevance") or [0] * len(sample.documents)
    if not relevance:
        return None
    index = min(range(len(relevance)), key=lambda i: (sample.documents[i] in supporting, relevance[i], -i))
    if not keep_evidence:
        is_evidence = len(relevance) == 1
    elif supporting:
        is_evidence = sample.documents[index] in supporting or not sample.meta.get("relevance")
    else:
        is_evidence = min(relevance) == max(relevance)
    return None if is_evidence else sample.without_document(index)


def _encode_each(
    samples: Sequence[Sample],
    encoder: Encoder,
    split: Callable[[Sample], Sample] | None = None,
    drop_unsplit: bool = False,
) -> list[tuple[Sample, Example | TemplateMismatch | None]]:
    """Return each sample after splitting, with its example, or with the error if it cannot be encoded.

    A sample that is dropped because it does not split has neither.
    """
    try:
        split_samples = [split(sample) for sample in samples] if split else samples
        kept = [sample for sample in split_samples if not drop_unsplit or len(sample.blocks) > 1]
        examples = iter(encoder.encode(kept))
        return [
            (sample, None if drop_unsplit and len(sample.blocks) == 1 else next(examples))
            for sample in split_samples
        ]
    except TemplateMismatch as error:
        # the batch fails as a whole: encode its samples one by one to find the one that fails
        if len(samples) == 1:
            return [(samples[0], error)]
        return [pair for sample in samples for pair in _encode_each([sample], encoder, split, drop_unsplit)]


def _fit_sample(
    sample: Sample,
    example: Example | TemplateMismatch | None,
    encoder: Encoder,
    row_len: int,
    trim: bool,
    skip_bad: bool,
    local_sees_first: bool,
) -> EncodedSample:
    while isinstance(example, Example):
        row_tokens = len(example) + (example.copy_len if local_sees_first else 0)
        if row_tokens <= row_len:
            return EncodedSample(sample, example, row_tokens=row_tokens)
        trimmed = trim_document(sample, keep_evidence=True) if trim else None
        if trimmed is None:
            is_unranked = trim and sample.documents and not sample.meta.get("relevance")
            reason = UNRANKED if is_unranked else TOO_LONG
            return EncodedSample(sample, example, reason, row_tokens=row_tokens)
        ((sample, example),) = _encode_each([trimmed], encoder)
    if example is None:
        return EncodedSample(sample, None, UNSPLIT)
    if not skip_bad:
        prefix = f"sample {sample.id} of {sample.source}: "
        message = f"{prefix}{str(example).removeprefix(prefix)} {SKIP_REMEDY}"
        raise TemplateMismatch(message, example.reason) from example
    return EncodedSample(sample, None, example.reason, is_mismatch=True)


def _remedy(prompt: Sample, is_question_too_long: bool, trim: bool) -> str:
    """Return what the user can do to make a prompt fit."""
    if is_question_too_long or not prompt.documents:
        return "shorten its question, or ask for fewer new tokens"
    return "no document can be spared" if trim else "use fewer documents or fewer new tokens"
