"""Text of users as pieces in which white space, unseen characters and added tokens can be seen."""

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

PieceKind = Literal["text", "newline", "tab", "space", "code", "token"]

_PARTS = re.compile(
    r"(?P<newline>\n)|(?P<tab>\t)"
    r"|(?P<space>\A[ ]+|[ ]{2,}|[ ]+(?=\n|\Z))"  # spaces that layout would hide
    r"|(?P<other>[^\x20-\x7e\n\t])"
)

_JOINERS = "\u200c\u200d"
"""They change the shape of letters and of emoji, and are shown by it."""

_BLANK_LETTERS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
"""Characters that Unicode counts as letters, marks or symbols, and that leave no ink."""


@dataclass(frozen=True)
class Piece:
    """A part of a text.

    kind: `text` can be seen as it is; `newline`, `tab` and `space` are white space that needs a mark; `code`
        is a character that cannot be seen or that controls others; `token` is an added token.
    text: the characters; of a `code` its code point, such as "U+202E".
    name: what a `code` is called, for a tooltip.
    """

    kind: PieceKind
    text: str
    name: str = ""


def split_text(text: str) -> list[Piece]:
    """Return the pieces of a text, in order."""
    pieces, start = [], 0
    for match in _PARTS.finditer(text):
        kind = match.lastgroup
        if kind == "other" and not _is_unseen(match[0]):
            continue
        if match.start() > start:
            pieces.append(Piece("text", text[start : match.start()]))
        start = match.end()
        if kind == "other":
            code = f"U+{ord(match[0]):04X}"
            pieces.append(Piece("code", code, unicodedata.name(match[0], "control character")))
        else:
            pieces.append(Piece(kind, match[0]))  # type: ignore[arg-type]
    if start < len(text):
        pieces.append(Piece("text", text[start:]))
    return pieces


def _is_unseen(character: str) -> bool:
    """Return whether a character has no ink of its own: a control, a format character, an unusual space."""
    if character in _JOINERS:
        return False
    return unicodedata.category(character)[0] in "CZ" or character in _BLANK_LETTERS


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], previous: Sequence[int] = ()) -> str:
    """Return the text of token ids that follow the ids `previous`.

    Some decoders remove a space at the start of a text, which the ids before it prevent.
    """

    def text_of(all_ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(list(all_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    before, both = text_of(previous), text_of([*previous, *ids])
    return both[len(before) :] if previous and both.startswith(before) else text_of(ids)


def split_tokens(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    added_ids: Collection[int],
    previous: Sequence[int] = (),
) -> list[Piece]:
    """Return the pieces of token ids that follow the ids `previous`; an added token is a piece."""
    pieces: list[Piece] = []
    for start, end in _runs(ids, added_ids):
        text = decode(tokenizer, ids[start:end], ids[start - 1 : start] if start else previous)
        if ids[start] in added_ids:
            pieces.append(Piece("token", "".join(piece.text for piece in split_text(text))))
        else:
            pieces += split_text(text)
    return pieces


def _runs(ids: Sequence[int], added_ids: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each added token, and of each run of other tokens."""
    start = 0
    for i, id in enumerate(ids):
        if id in added_ids:
            if start < i:
                yield start, i
            yield i, i + 1
            start = i + 1
    if start < len(ids):
        yield start, len(ids)
