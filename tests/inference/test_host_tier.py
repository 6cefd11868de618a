"""The host tier keeps its budget and evicts the least recently used blocks."""

import logging
import random
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockft.inference.block_key import BlockKey, block_key
from blockft.inference.host_tier import HostTier

KEYS = [block_key([i]) for i in range(6)]


def block(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


@given(
    st.lists(st.tuples(st.sampled_from(["put", "get", "clear"]), st.sampled_from(KEYS), st.integers(1, 12)))
)
@settings(max_examples=100, deadline=None)
def test_random_uses_match_a_queue_with_a_budget(uses: list[tuple[str, BlockKey, int]]) -> None:
    tier, queue, evicted = HostTier(10), OrderedDict[BlockKey, torch.Tensor](), 0
    for use, key, size in uses:
        if use == "clear":
            tier.clear()
            queue.clear()
        elif use == "get":
            assert tier.get(key) is queue.get(key)
            if key in queue:
                queue.move_to_end(key)
        else:
            kv = block(size)
            tier.put(key, kv)
            if key not in queue and size <= 10:
                while sum(map(len, queue.values())) + size > 10:
                    queue.popitem(last=False)
                    evicted += 1
                queue[key] = kv
        assert [key for key in KEYS if key in tier] == [key for key in KEYS if key in queue]
        assert tier.used_bytes == sum(map(len, queue.values())) <= 10
        assert tier.num_blocks == len(queue) and tier.num_evicted == evicted


class SlowBlocks(OrderedDict[BlockKey, torch.Tensor]):
    """Another thread runs between the steps of a use."""

    def get(self, key: BlockKey, default: Any = None) -> Any:
        found = super().get(key, default)
        time.sleep(1e-4)
        return found


def test_threads_may_use_a_tier_while_blocks_are_evicted() -> None:
    tier, kv = HostTier(10), block(4)
    tier._blocks = SlowBlocks()

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            key = rng.choice(KEYS)
            tier.put(key, kv)
            found = tier.get(key)
            assert found is None or found is kv

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert tier.used_bytes == 4 * tier.num_blocks <= 10


def test_a_block_above_the_budget_is_not_kept_and_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tier = HostTier(10)
    tier.put(KEYS[0], block(8))
    with caplog.at_level(logging.WARNING):
        tier.put(KEYS[1], block(11))
        tier.put(KEYS[2], block(12))
    assert [key for key in KEYS if key in tier] == KEYS[:1]
    assert len(caplog.records) == 1
    assert "a block of 11 B is larger than the memory budget of 10 B" in caplog.text


def test_a_budget_of_0_keeps_nothing_and_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tier = HostTier(0)
    tier.put(KEYS[0], block(1))
    assert KEYS[0] not in tier and tier.get(KEYS[0]) is None and not caplog.records
