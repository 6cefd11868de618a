"""An example as the page shows it: its blocks with their kinds, labels and visible text."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase

from blockft.data.encoder import Example
from blockft.data.sample import Sample
from blockft.data.tokenizer import control_token_ids
from blockft.page.visible_text import Piece, decode, split_tokens

TEMPLATE, INSTRUCTION, FINAL, BLOCK = "template", "instruction", "final block", "block"
DOCUMENT, SUPPORTING = "document", "document with the answer"
"""Kinds of blocks. Blocks of a chat have the role of their message as their kind."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a block that are all labels, or none of them."""

    is_label: bool
    pieces: list[Piece]


@dataclass(frozen=True, kw_only=True)
class BlockView:
    """A block.

    number: its place in the example, from 1.
    kind: what it holds.
    style: the name of its colours; consecutive blocks have different ones.
    start: the index of its first token in the example.
    has_copy: whether a copy of the first block stands before it in a row.
    """

    number: int
    kind: str
    style: str
    start: int
    has_copy: bool
    num_tokens: int
    num_labels: int
    segments: list[Segment]


@dataclass(frozen=True, kw_only=True)
class ExampleView:
    """An example; `index` is its number in the prepared folder.

    num_copied: tokens that copies of the first block add in block mode.
    """

    index: int
    source: str
    sample_ids: tuple[str, ...]
    num_tokens: int
    num_labels: int
    num_copied: int
    has_local_blocks: bool
    blocks: list[BlockView]


def view_example(
    example: Example,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    index: int,
    source: str,
    local_sees_first: bool = False,
) -> ExampleView:
    """Return what the page shows of an example, which was encoded from `samples`.

    `local_sees_first` is an option of `Layout`.
    """
    layout = example.layout_in_mode("block", local_sees_first=local_sees_first)
    ids, bounds = example.input_ids.tolist(), [0, *accumulate(example.block_lengths)]
    kinds = _block_kinds(example, samples, tokenizer)
    is_label = [False] * len(ids)
    for start, end in example.label_spans:
        is_label[start:end] = [True] * (end - start)
    added_ids = control_token_ids(tokenizer)
    blocks = [
        BlockView(
            number=number,
            kind=kind,
            style=style,
            start=start,
            has_copy=layout.has_copy(number - 1),
            num_tokens=end - start,
            num_labels=sum(is_label[start:end]),
            segments=_segments(ids, is_label, start, end, tokenizer, added_ids),
        )
        for number, (kind, style, (start, end)) in enumerate(
            zip(kinds, _styles(kinds), pairwise(bounds), strict=True), start=1
        )
    ]
    return ExampleView(
        index=index,
        source=source,
        sample_ids=example.sample_ids,
        num_tokens=len(ids),
        num_labels=example.num_labels,
        num_copied=layout.num_row_tokens - layout.num_tokens,
        has_local_blocks=example.has_local_blocks,
        blocks=blocks,
    )


def _segments(
    ids: Sequence[int],
    is_label: Sequence[bool],
    start: int,
    end: int,
    tokenizer: PreTrainedTokenizerBase,
    added_ids: Collection[int],
) -> list[Segment]:
    """Return the segments of the tokens from `start` to `end`."""
    changes = [i for i in range(start + 1, end) if is_label[i] != is_label[i - 1]]
    return [
        Segment(is_label[a], split_tokens(tokenizer, ids[a:b], added_ids, ids[a - 1 : a] if a else ()))
        for a, b in pairwise([start, *changes, end])
    ]


def _block_kinds(
    example: Example, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return the kind of each block.

    The local blocks are those of the first sample, and blocks that hold nothing but markup of the chat
    template.
    """
    num_local = len(example.block_lengths) - example.num_final
    names = _local_kinds(samples[0]) if samples else []
    if len(names) != num_local:
        texts = [decode(tokenizer, block.tolist()) for block in example.blocks[:num_local]]
        contents = samples[0].blocks[:-1] if samples else ()
        names = list(_align(texts, contents, names))
    return [*names, *[FINAL] * example.num_final]


def _local_kinds(sample: Sample) -> list[str]:
    """Return the kinds of the local blocks of a sample."""
    documents, supporting = {*sample.documents}, {*sample.meta.get("supporting", ())}
    roles = [message.role for message in sample.messages for _ in message.content]
    kinds = [INSTRUCTION] * len(sample.blocks) if documents else roles or [BLOCK] * len(sample.blocks)
    return [
        SUPPORTING if i in supporting else DOCUMENT if i in documents else kind
        for i, kind in enumerate(kinds[:-1])
    ]


def _align(texts: Sequence[str], contents: Sequence[str], kinds: Sequence[str]) -> Iterator[str]:
    """Yield the kind of each text: that of the next content if the text holds it, otherwise markup."""
    remaining = list(zip(contents, kinds, strict=True))[::-1]
    for num_left, text in zip(range(len(texts), 0, -1), texts, strict=True):
        if remaining and (len(remaining) >= num_left or _squeeze(remaining[-1][0]) in _squeeze(text)):
            yield remaining.pop()[1]
        else:
            yield TEMPLATE


def _squeeze(text: str) -> str:
    """Return the text without white space, which templates and tokenizers may change."""
    return "".join(text.split())


def _styles(kinds: Sequence[str]) -> list[str]:
    """Return the names of the colours of blocks: two that alternate for the blocks between the others."""
    styles, shade = [], 0
    for kind in kinds:
        if kind in (TEMPLATE, INSTRUCTION, FINAL):
            styles.append(kind.replace(" block", ""))
        else:
            styles.append(f"shade{shade}")
            shade = 1 - shade
    return styles
