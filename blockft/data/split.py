"""Prompts of chats and instructions, cut into blocks by their structure (paper, "Block segmentation").

The turns of a chat are blocks. A message is cut further where its author divided it: at blank lines; if that
does not split it, also at rules (`---`, `===`); then before indented lines; then at every new line. The first
kind that splits a message is the last one used: what only weaker separators divide belongs together.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import IntEnum

import numpy as np

from blockft.data.sample import Sample

SPLIT_FORMATS = ("messages", "alpaca")
"""The formats whose prompts are cut here; in all others the blocks arrive marked."""

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""How many tokens each of several texts has."""

RULE_LINE = re.compile(r"\s*(-{3,}|={3,})\s*")
CODE_FENCE = re.compile(r"\s*(`{3,}|~{3,})")


class Separator(IntEnum):
    """What stands between two lines, the strongest first."""

    blank_line = 1
    rule = 2
    indented_line = 3
    new_line = 4


def split_sample(
    sample: Sample, count_tokens: CountTokens, *, max_blocks: int, min_block_tokens: int
) -> Sample:
    """The sample with its messages cut into blocks; text in is text out.

    The system message stays one block. A block shorter than `min_block_tokens` is joined with the next of its
    message; while the prompt has more than `max_blocks`, the two shortest neighbours of a message are joined:
    the turns of a very long chat stay blocks. A sample whose blocks are marked already (templated, with
    documents, or with several blocks in a message) is returned as it is.
    """
    if sample.templated or sample.documents or any(len(m.content) > 1 for m in sample.messages):
        return sample
    pieces = [
        [message.text]
        if message.role == "system"
        else split_text(message.text, count_tokens, min_block_tokens=min_block_tokens)
        for message in sample.messages
    ]
    if sum(map(len, pieces)) > max_blocks:
        pieces = _merge_shortest(pieces, count_tokens, max_blocks)
    messages = (replace(m, content=tuple(p)) for m, p in zip(sample.messages, pieces, strict=True))
    return replace(sample, messages=tuple(messages))


def split_text(text: str, count_tokens: CountTokens, *, min_block_tokens: int) -> list[str]:
    """The blocks of one message, at least one; no block is blank or a mere rule unless the message is."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    separators = list(_separators(lines))
    for weakest in Separator:
        pieces = [""]
        for line, separator in zip(lines, separators, strict=True):
            if separator is None or separator > weakest:
                pieces[-1] += line
            else:
                pieces.append(line)
        pieces = _merge_short(pieces, count_tokens, min_block_tokens)
        if len(pieces) > 1:
            return pieces
    return [text]


def _separators(lines: Sequence[str]) -> Iterator[Separator | None]:
    """What stands between each line and the text before it; None where there is no cut.

    A separator belongs to the text before it, so blank lines and rules open no block, and an indentation
    belongs to its line. A text that starts with separators keeps them.
    """
    fenced = _inside_code_fence(lines)
    between: Separator | None = None
    for line, inside in zip(lines, fenced, strict=True):
        if not inside and not line.strip():
            yield None
            between = between and Separator.blank_line
        elif not inside and RULE_LINE.fullmatch(line):
            yield None
            between = between and min(between, Separator.rule)
        else:
            indented = between is Separator.new_line and line[0] in " \t"
            yield None if inside else Separator.indented_line if indented else between
            between = Separator.new_line


def _inside_code_fence(lines: Sequence[str]) -> Iterator[bool]:
    """Which lines continue a fenced code block; one that is never closed runs to the end.

    In chats a fence also opens within a line (`Mend this: ```def f():`), and any fence then closes it.
    """
    fence, alone = "", False
    for line in lines:
        yield bool(fence)
        if fence:
            at_start = CODE_FENCE.match(line)
            closes = at_start and at_start[1].startswith(fence) and not line[at_start.end() :].strip()
            if closes or not alone and "```" in line:
                fence = ""
            continue
        ticks = re.findall(r"`{3,}", line)
        at_start = CODE_FENCE.match(line)
        if at_start and at_start[1][0] == "~" or len(ticks) % 2:
            fence, alone = (at_start[1], True) if at_start else ("```", False)


def _merge_short(pieces: list[str], count_tokens: CountTokens, min_tokens: int) -> list[str]:
    """Pieces of at least `min_tokens` tokens, or one piece.

    A short one is joined with the next, as a title goes with its text, and the last with the one before it.
    """
    while len(pieces) > 1:
        joined, open_len = [""], 0
        for piece, num_tokens in zip(pieces, count_tokens(pieces), strict=True):
            if open_len >= min_tokens:
                joined.append("")
                open_len = 0
            joined[-1] += piece
            open_len += num_tokens
        if open_len < min_tokens and len(joined) > 1:
            joined[-2:] = ["".join(joined[-2:])]
        if len(joined) == len(pieces):
            break
        # a joined text may have fewer tokens than its parts: count again
        pieces = joined
    return pieces


def _merge_shortest(pieces: list[list[str]], count_tokens: CountTokens, max_blocks: int) -> list[list[str]]:
    """The pieces of each message, its two shortest neighbours joined until few enough are left."""
    texts = [text for of_message in pieces for text in of_message]
    messages = np.repeat(np.arange(len(pieces)), [len(of_message) for of_message in pieces])
    lengths = np.array(count_tokens(texts), np.float64)
    while len(texts) > max_blocks:
        sums = np.where(messages[:-1] == messages[1:], lengths[:-1] + lengths[1:], np.inf)
        first = int(np.argmin(sums))
        if np.isinf(sums[first]):
            break
        texts[first : first + 2] = [texts[first] + texts[first + 1]]
        lengths[first] = sums[first]
        lengths, messages = np.delete(lengths, first + 1), np.delete(messages, first + 1)
    return [[texts[i] for i in np.flatnonzero(messages == number)] for number in range(len(pieces))]
