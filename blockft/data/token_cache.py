"""The token ids of texts that were encoded before: a server gets the same documents again and again."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

ENTRY_BYTES = 300
"""What an entry needs beside its text and its ids."""


class TokenCache:
    """Texts and their token ids, within `max_bytes` of memory. The least recently used are dropped.

    encode: the tokenizer, which encodes each text alone. A text whose encoding is an error is not kept.
    """

    def __init__(self, encode: Callable[[list[str]], Sequence[Ids]], max_bytes: int) -> None:
        self._encode, self._max_bytes = encode, max_bytes
        self._ids: OrderedDict[str, Ids] = OrderedDict()
        self.used_bytes = 0

    def __contains__(self, text: str) -> bool:
        """Return whether the token ids of a text are known."""
        return text in self._ids

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of each text, read-only."""
        found = {text: ids for text in texts if (ids := self._ids.get(text)) is not None}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        for text, ids in zip(new, self._encode(new) if new else (), strict=True):
            found[text] = ids
            ids.flags.writeable = False
            self._ids[text] = ids
            self.used_bytes += _num_bytes(text, ids)
        for text in found:
            self._ids.move_to_end(text)
        while self.used_bytes > self._max_bytes:
            self.used_bytes -= _num_bytes(*self._ids.popitem(last=False))
        return [found[text] for text in texts]


def _num_bytes(text: str, ids: Ids) -> int:
    return sys.getsizeof(text) + ids.nbytes + ENTRY_BYTES
