"""Tiny cache models, and blocks whose keys and values depend only on their key."""

import random
from pathlib import Path

import torch

from blockft.inference.block_key import BlockKey, block_key, num_tokens, token_ids
from blockft.inference.cache_entry import CacheModel, EntryReader, write_entry

TOY = CacheModel(
    fingerprint="a1b2c3", name="toy", dtype="bfloat16", num_layers=3, num_kv_heads=2, head_size=4
)
OTHER = CacheModel(
    fingerprint="d4e5f6", name="other", dtype="float32", num_layers=2, num_kv_heads=1, head_size=8
)


def kv_of(key: BlockKey, model: CacheModel = TOY) -> torch.Tensor:
    """Return keys and values that depend only on the key and the model's shape: (L, n, 2, K, D)."""
    shape = (model.num_layers, *model.layer_shape(num_tokens(key)))
    generator = torch.Generator().manual_seed(sum(token_ids(key)))
    return torch.randn(shape, generator=generator).to(model.torch_dtype)


def random_key(seed: int, length: int = 5) -> BlockKey:
    rng = random.Random(seed)
    return block_key([rng.randrange(50_000) for _ in range(length)])


def write_file(path: Path, key: BlockKey, model: CacheModel = TOY) -> None:
    with path.open("wb", buffering=0) as file:
        write_entry(file, model, key, kv_of(key, model))


def check_file(path: Path, model: CacheModel = TOY) -> None:
    """Read the whole file. Raises as `EntryReader` does."""
    with EntryReader(path, model) as entry:
        entry.verify()
