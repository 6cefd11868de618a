"""Cache keys of blocks (their token ids), and the shape of a block's KV tensors.

The token ids identify a block, because its keys and values depend only on its own tokens, and on those of
the prompt's first block if the model was trained so that local blocks see it. Tensors of blocks are
(L, n, 2, K, D): L layers, n tokens, keys and values, K key/value heads, D head size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

ID_BYTES = 4
"""Bytes of a token id in a `BlockKey`."""


class BlockKey(NamedTuple):
    """The tokens of a block, and those of the first block that it sees, as little-endian int32.

    `first` is empty for a block that sees itself alone. Unlike hashes, equal keys always mean equal blocks.
    """

    tokens: bytes
    first: bytes = b""


def block_key(ids: Sequence[int] | np.ndarray, first: Sequence[int] | np.ndarray = ()) -> BlockKey:
    """Return the key of a block that sees the first block `first`; see `token_ids` and `first_ids`."""
    assert len(ids), "a block has at least one token"
    return BlockKey(_to_bytes(ids), _to_bytes(first))


def context_keys(
    blocks: Sequence[Sequence[int] | np.ndarray], *, local_sees_first: bool = False
) -> list[BlockKey]:
    """Return the keys of a prompt's local blocks, given by their token ids.

    With `local_sees_first` all blocks but the first see the first. A later block that equals the first sees
    it too, so their keys differ.
    """
    keys = [block_key(ids) for ids in blocks]
    if not local_sees_first:
        return keys
    return [key._replace(first=keys[0].tokens) if index else key for index, key in enumerate(keys)]


def token_ids(key: BlockKey) -> list[int]:
    """Return the token ids of a block, without those of the first block."""
    return _to_ids(key.tokens)


def first_ids(key: BlockKey) -> list[int]:
    """Return the token ids of the first block that a block sees; there are none if it sees itself alone."""
    return _to_ids(key.first)


def num_tokens(key: BlockKey) -> int:
    """Return the number of tokens of a block, without those of the first block."""
    return len(key.tokens) // ID_BYTES


def num_first(key: BlockKey) -> int:
    """Return the number of tokens of the first block that a block sees."""
    return len(key.first) // ID_BYTES


def key_digest(key: BlockKey) -> str:
    """Return a cryptographic digest of a block's key: 32 hexadecimal digits."""
    return tokens_digest(key.tokens, first_digest(key))


def first_digest(key: BlockKey) -> str:
    """Return the digest of the key of the first block that a block sees; "" if it sees itself alone."""
    return tokens_digest(key.first) if key.first else ""


def tokens_digest(tokens: bytes, first_digest: str = "") -> str:
    """Return the digest of the key of a block, from its tokens and the digest of its first block."""
    # a hash with a key never equals one without, so that a block has another digest in each place
    return hashlib.blake2b(tokens, digest_size=16, key=bytes.fromhex(first_digest)).hexdigest()


def _to_bytes(ids: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()


def _to_ids(tokens: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(tokens, dtype="<i4").tolist()
    return ids


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
