"""Streaming of text: yield the pieces of an answer that later tokens cannot change, up to a stop string."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from blockft.errors import UserError

REPLACEMENT = "\ufffd"
"""The character that decoders write for bytes that are not (or not yet) a character."""

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""The name of a token that is a single byte, in vocabularies like SentencePiece's."""


class TextStream:
    """Decodes the tokens of an answer to text, piece by piece. A piece never changes afterwards.

    The concatenated pieces are the text that the tokenizer decodes from all tokens together, without special
    tokens and with unchanged spaces, up to the first stop string. The first stop string is the one that ends
    first, and the longest of several that end there.

    Text is held back while later tokens may change it: bytes that are not yet a character, and the start of a
    stop string. `tokenizers.decoders.DecodeStream` does not work here: a run of byte tokens that turns out
    not to be UTF-8 is decoded again from its start, for which it raises an exception.

    text     the text so far
    stopped  whether a stop string was generated

    Raises:
        UserError: `stop` is a single text or contains an empty one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {stop!r}, it should be a list of non-empty texts")
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # the last decoded tokens stay here, because decoders treat the first token of a text differently
        self._ids: list[int] = []
        self._num_decoded_ids = self._decoded_len = 0
        self._held_back = ""

    def push(self, token_id: int) -> str:
        """Append a token and return the text that is now certain. It is empty after a stop string."""
        token = self._tokenizer.backend_tokenizer.id_to_token(token_id)
        # token is None: a model may have more ids than its tokenizer
        if self.stopped or token is None or self._is_special(token_id):
            return ""
        self._ids.append(token_id)
        if BYTE.fullmatch(token):
            return ""
        text = self._decode(self._ids)
        # only the last replacement character may still become another one: each invalid byte has its own
        certain = text.removesuffix(REPLACEMENT)
        new = certain[self._decoded_len :]
        self._decoded_len = len(certain)
        if certain == text:
            self._drop_decoded_tokens()
        return self._emit(new)

    def close(self) -> str:
        """Return the rest of the text when no token follows. It also ends before a stop string."""
        rest = self._decode(self._ids)[self._decoded_len :]
        self._ids, self._num_decoded_ids, self._decoded_len = [], 0, 0
        return "" if self.stopped else self._emit(rest, is_last=True)

    def _is_special(self, token_id: int) -> bool:
        """Return whether decoding skips the token. The backend decides by its text, not by its flag."""
        backend = self._tokenizer.backend_tokenizer
        skipped, kept = (backend.decode([token_id], skip_special_tokens=skip) for skip in (True, False))
        return skipped == "" != kept

    def _drop_decoded_tokens(self) -> None:
        """Drop the tokens before the last certain text, if the tokens after it have a text."""
        recent = self._ids[self._num_decoded_ids :]
        if text := self._decode(recent):
            self._ids, self._num_decoded_ids, self._decoded_len = recent, len(recent), len(text)

    def _decode(self, ids: list[int]) -> str:
        # cleaning up would remove spaces that the model generated
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _emit(self, new: str, *, is_last: bool = False) -> str:
        """Return the text that is certain with `new`, and hold back a possible start of a stop string."""
        held = self._held_back + new
        found = [(start + len(stop), start) for stop in self._stop if (start := held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found)[1] if found else len(held) if is_last else len(held) - self._stop_prefix_len(held)
        self._held_back = "" if found else held[end:]
        self.text += held[:end]
        return held[:end]

    def _stop_prefix_len(self, text: str) -> int:
        """Return how many characters at the end of a text are the start of a stop string."""
        longest = min(max(map(len, self._stop), default=0), len(text))
        return next((n for n in range(longest, 0, -1) if self._may_become_stop(text[-n:])), 0)

    def _may_become_stop(self, start: str) -> bool:
        return any(stop.startswith(start) for stop in self._stop)
