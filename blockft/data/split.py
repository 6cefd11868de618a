"""Split the prompts of chats and instructions into blocks by their structure (paper, "Block segmentation").

The turns of a chat are blocks. A message is split further at blank lines. If they do not split it, rules
(`---`, `===`) are used as well, then indented lines, then every new line. No weaker separators are used than
needed to split the message: text that only weaker separators divide belongs together.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import IntEnum

import numpy as np

from blockft.data.sample import Sample

SPLIT_FORMATS = ("messages", "alpaca")
"""The formats whose prompts are split here. Records of all other formats mark their blocks."""

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Returns the number of tokens of each text."""

RULE_LINE = re.compile(r"\s*(-{3,}|={3,})\s*")
CODE_FENCE = re.compile(r"\s*(`{3,}|~{3,})")


class Separator(IntEnum):
    """The kinds of separators between two lines, the strongest first."""

    blank_line = 1
    rule = 2
    indented_line = 3
    new_line = 4


def split_sample(
    sample: Sample, count_tokens: CountTokens, *, max_blocks: int, min_block_tokens: int
) -> Sample:
    """Return the sample with its messages split into blocks. The text of a message does not change.

    The system message stays one block. A block shorter than `min_block_tokens` is merged with the next block
    of its message. While the prompt has more than `max_blocks` blocks, the two shortest adjacent blocks of a
    message are merged. Blocks of different messages are never merged, so a long chat may have more blocks. A
    sample whose blocks are already marked (templated, with documents, or with several blocks in a message) is
    returned unchanged.
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
    """Return the blocks of one message, at least one. No block is blank or a rule, unless the message is."""
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
    """Yield, for each line, the separator before it; None if no block may start at this line.

    Blank lines and rules belong to the text before them, so no block starts there. Indentation belongs to its
    line. Separators at the start of the text belong to the first block.
    """
    separator: Separator | None = None
    for line, is_fenced in zip(lines, _inside_code_fence(lines), strict=True):
        if not is_fenced and not line.strip():
            yield None
            separator = separator and Separator.blank_line
        elif not is_fenced and RULE_LINE.fullmatch(line):
            yield None
            separator = separator and min(separator, Separator.rule)
        else:
            is_indented = separator is Separator.new_line and line[0] in " \t"
            yield None if is_fenced else Separator.indented_line if is_indented else separator
            separator = Separator.new_line


def _inside_code_fence(lines: Sequence[str]) -> Iterator[bool]:
    """Yield, for each line, whether it continues a fenced code block. An open block runs to the end.

    In chats a code block also starts inside a line (`Fix this: ```def f():`). Any fence then closes it.
    """
    fence, starts_line = "", False
    for line in lines:
        yield bool(fence)
        if fence:
            at_start = CODE_FENCE.match(line)
            closes = at_start and at_start[1].startswith(fence) and not line[at_start.end() :].strip()
            if closes or not starts_line and "```" in line:
                fence = ""
            continue
        ticks = re.findall(r"`{3,}", line)
        at_start = CODE_FENCE.match(line)
        if at_start and at_start[1][0] == "~" or len(ticks) % 2:
            fence, starts_line = (at_start[1], True) if at_start else ("```", False)


def _merge_short(pieces: list[str], count_tokens: CountTokens, min_tokens: int) -> list[str]:
    """Merge short pieces, so that each has at least `min_tokens` tokens, or one piece is left.

    A short piece is merged with the next one, as a title belongs to the text after it. The last piece is
    merged with the one before it.
    """
    while len(pieces) > 1:
        merged, last_len = [""], 0
        for piece, num_tokens in zip(pieces, count_tokens(pieces), strict=True):
            if last_len >= min_tokens:
                merged.append("")
                last_len = 0
            merged[-1] += piece
            last_len += num_tokens
        if last_len < min_tokens and len(merged) > 1:
            merged[-2:] = ["".join(merged[-2:])]
        if len(merged) == len(pieces):
            break
        # a merged text may have fewer tokens than its parts, so count again
        pieces = merged
    return pieces


def _merge_shortest(pieces: list[list[str]], count_tokens: CountTokens, max_blocks: int) -> list[list[str]]:
    """Merge the two shortest adjacent pieces of a message until at most `max_blocks` pieces are left."""
    texts = [text for message_pieces in pieces for text in message_pieces]
    messages = np.repeat(np.arange(len(pieces)), [len(message_pieces) for message_pieces in pieces])
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
