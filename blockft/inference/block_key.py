"""Blocks in the cache: the key is the token ids, for they alone decide what a model makes of a block.

What it makes of it are keys and values, (L, n, 2, K, D): L layers, n tokens, K key/value heads, D head size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BlockKey = bytes
"""The token ids of a block as little-endian int32, joined: unlike hashes, equal keys are equal blocks."""

ID_BYTES = 4


def block_key(ids: Sequence[int] | np.ndarray) -> BlockKey:
    """The key of a block; `ids_of` is its inverse."""
    assert len(ids), "a block has at least one token"
    return np.asarray(ids, dtype="<i4").tobytes()


def token_ids(key: BlockKey) -> list[int]:
    """The token ids of a block."""
    return [int(token) for token in np.frombuffer(key, dtype="<i4")]


def num_tokens(key: BlockKey) -> int:
    """The length of a block."""
    return len(key) // ID_BYTES


def key_digest(key: BlockKey) -> str:
    """A short name for a block, 32 hexadecimal digits that nobody can make collide."""
    return hashlib.blake2b(key, digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """The shape of a model's keys and values, and their type as torch spells it (bfloat16)."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def layer_bytes(self) -> int:
        """What one token takes in one layer."""
        return 2 * self.num_kv_heads * self.head_size * self.torch_dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """What one token takes in all layers."""
        return self.num_layers * self.layer_bytes

    def block_bytes(self, key: BlockKey) -> int:
        return num_tokens(key) * self.token_bytes

    def layer_shape(self, num_tokens: int) -> tuple[int, int, int, int]:
        return num_tokens, 2, self.num_kv_heads, self.head_size
