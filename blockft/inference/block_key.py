"""Cache keys of blocks (their token ids), and the shape of a block's KV tensors.

The token ids identify a block, because its keys and values depend only on its own tokens. Tensors
of blocks are (L, n, 2, K, D): L layers, n tokens, keys and values, K key/value heads, D head size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BlockKey = bytes
"""The token ids of a block as little-endian int32. Unlike hashes, equal keys always mean equal blocks."""

ID_BYTES = 4
"""Bytes of a token id in a `BlockKey`."""


def block_key(ids: Sequence[int] | np.ndarray) -> BlockKey:
    """Return the key of a block. `token_ids` is the inverse."""
    assert len(ids), "a block has at least one token"
    return np.asarray(ids, dtype="<i4").tobytes()


def token_ids(key: BlockKey) -> list[int]:
    """Return the token ids of a block."""
    return [int(token) for token in np.frombuffer(key, dtype="<i4")]


def num_tokens(key: BlockKey) -> int:
    """Return the number of tokens of a block."""
    return len(key) // ID_BYTES


def key_digest(key: BlockKey) -> str:
    """Return a cryptographic digest of a block's key: 32 hexadecimal digits."""
    return hashlib.blake2b(key, digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """The shape of a model's keys and values, and the name of their torch type, such as bfloat16."""

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
        """The size of one token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_size * self.torch_dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """The size of one token's keys and values in all layers."""
        return self.num_layers * self.layer_bytes

    def block_bytes(self, key: BlockKey) -> int:
        """Return the size of a block's keys and values."""
        return num_tokens(key) * self.token_bytes

    def layer_shape(self, num_tokens: int) -> tuple[int, int, int, int]:
        """Return the shape of a block's keys and values in one layer: (n, 2, K, D)."""
        return num_tokens, 2, self.num_kv_heads, self.head_size
