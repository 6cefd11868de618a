"""Heads of tensor-parallel workers: split as vLLM does, and put together again."""

import pytest
import torch

from blockft.inference.block_key import KVShape
from blockft.serving.head_shard import HeadShard

HEADS = {  # by number of heads and of workers
    (4, 1): [[0, 1, 2, 3]],
    (4, 2): [[0, 1], [2, 3]],
    (2, 4): [[0], [0], [1], [1]],
    (1, 3): [[0], [0], [0]],
    (3, 3): [[0], [1], [2]],
}


@pytest.mark.parametrize("sizes", HEADS)
def test_workers_have_the_heads_that_vllm_gives_them(sizes: tuple[int, int]) -> None:
    num_heads, num_workers = sizes
    kv = torch.arange(num_heads)[:, None].expand(3, 5, 2, num_heads, 4)
    shards = [HeadShard(worker=worker, num_workers=num_workers) for worker in range(num_workers)]
    parts = [shard.take(kv) for shard in shards]
    assert [part[0, 0, 0, :, 0].tolist() for part in parts] == HEADS[sizes]
    shape = KVShape(num_layers=3, num_kv_heads=num_heads, head_size=4, dtype="float32")
    assert all(shard.fits(num_heads) for shard in shards)
    assert {shard.local_shape(shape).num_kv_heads for shard in shards} == {parts[0].shape[3]}
    assert torch.equal(shards[0].join(torch.cat(parts, dim=3), num_heads), kv)


@pytest.mark.parametrize(("num_heads", "num_workers"), [(4, 3), (3, 2), (2, 3)])
def test_heads_that_cannot_be_split_do_not_fit(num_heads: int, num_workers: int) -> None:
    assert not HeadShard(num_workers=num_workers).fits(num_heads)
