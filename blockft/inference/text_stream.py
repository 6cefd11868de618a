"""Text as it is generated: what is certain of it at once, up to a stop string."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from blockft.errors import UserError

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""The spelling of a token that is one byte, in vocabularies like SentencePiece's."""


class TextStream:
    """Turns the tokens of an answer into its text, piece by piece; no piece is ever taken back.

    The pieces joined are what the tokenizer decodes from all tokens together, without special tokens and
    with spaces as they are, cut before the first stop string: the one that ends first, the longest of those.

    A piece is held back while later tokens may change it: bytes that are not yet a character, and the
    beginning of a stop string. (`tokenizers.decoders.DecodeStream` will not do: a run of byte tokens that
    turns out to be no UTF-8 is decoded anew from its start, which it meets with an exception.)

    Raises:
        UserError: `stop` is one text, or holds an empty one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {stop!r}, it should be a list of texts that are not empty")
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # some tokens whose text is settled come along: decoders treat the first ones of a text differently
        self._ids: list[int] = []
        self._num_settled = self._settled_len = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that is now certain, perhaps none; after a stop string always none."""
        token = self._tokenizer.backend_tokenizer.id_to_token(token_id)
        # a model may have more rows than its tokenizer has tokens
        if self.stopped or token is None or self._is_special(token_id):
            return ""
        self._ids.append(token_id)
        if BYTE.fullmatch(token):
            return ""
        text = self._decode(self._ids)
        # only the last one may be a character to come: decoders replace each finished mistake by itself
        certain = text.removesuffix(REPLACEMENT)
        new = certain[self._settled_len :]
        self._settled_len = len(certain)
        if certain == text:
            self._drop_decoded_tokens()
        return self._pass_on(new)

    def close(self) -> str:
        """The rest of the text, when no token follows; it may hold a stop string, too."""
        rest = self._decode(self._ids)[self._settled_len :]
        self._ids, self._num_settled, self._settled_len = [], 0, 0
        return "" if self.stopped else self._pass_on(rest, is_last=True)

    def _is_special(self, token_id: int) -> bool:
        """Whether decoding skips the token. Its own flag may differ: the backend goes by its spelling."""
        backend = self._tokenizer.backend_tokenizer
        skipped, kept = (backend.decode([token_id], skip_special_tokens=skip) for skip in (True, False))
        return skipped == "" != kept

    def _drop_decoded_tokens(self) -> None:
        """Keep only the tokens since the text was last certain, if they have a text of their own."""
        recent = self._ids[self._num_settled :]
        if text := self._decode(recent):
            self._ids, self._num_settled, self._settled_len = recent, len(recent), len(text)

    def _decode(self, ids: list[int]) -> str:
        # no cleaning up: it would remove spaces that the model wrote, also those before a piece to come
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _pass_on(self, new: str, *, is_last: bool = False) -> str:
        held = self._held + new
        met = [(start + len(stop), start) for stop in self._stop if (start := held.find(stop)) >= 0]
        self.stopped = bool(met)
        end = min(met)[1] if met else len(held) if is_last else len(held) - self._stop_prefix_len(held)
        self._held = "" if met else held[end:]
        self.text += held[:end]
        return held[:end]

    def _stop_prefix_len(self, text: str) -> int:
        """How many characters at the end of a text are the beginning of a stop string."""
        longest = min(max(map(len, self._stop), default=0), len(text))
        return next((n for n in range(longest, 0, -1) if self._may_become_stop(text[-n:])), 0)

    def _may_become_stop(self, beginning: str) -> bool:
        return any(stop.startswith(beginning) for stop in self._stop)
