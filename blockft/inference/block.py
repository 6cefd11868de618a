"""The key of a block in the cache: its token ids, for they alone decide what a model makes of it."""

import hashlib
from collections.abc import Sequence

import numpy as np

Key = bytes
"""The token ids of a block as little-endian int32, joined: unlike hashes, equal keys are equal blocks."""

ID_BYTES = 4


def key_of(ids: Sequence[int] | np.ndarray) -> Key:
    """The key of a block; `ids_of` is its inverse."""
    assert len(ids), "a block has at least one token"
    return np.asarray(ids, dtype="<i4").tobytes()


def ids_of(key: Key) -> list[int]:
    """The token ids of a block."""
    return [int(token) for token in np.frombuffer(key, dtype="<i4")]


def num_tokens(key: Key) -> int:
    """The length of a block."""
    return len(key) // ID_BYTES


def digest(key: Key) -> str:
    """A short name for a block, 32 hexadecimal digits that nobody can make collide."""
    return hashlib.blake2b(key, digest_size=16).hexdigest()
