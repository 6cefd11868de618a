"""The device tier keeps blocks unchanged and evicts the least recently used, even after interrupts."""

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import blockft.inference.device_tier as device_module
from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, KVShape, block_key, num_tokens
from blockft.inference.device_tier import DeviceTier

SHAPE = KVShape(num_layers=2, num_kv_heads=1, head_size=2, dtype="float32")
NUM_SLOTS = 20
KEYS = [block_key([i] * length) for i, length in enumerate([1, 2, 3, 3, 4, 5, 6, 7, 8, 11, 15, 20, 21])]


def open_tier(num_slots: int = NUM_SLOTS) -> DeviceTier:
    return DeviceTier(SHAPE, torch.device("cpu"), num_slots * SHAPE.token_bytes + 3, padding=2)


def content(key: BlockKey) -> torch.Tensor:
    generator = torch.Generator().manual_seed(KEYS.index(key))
    return torch.randn(2, num_tokens(key), 2, 1, 2, generator=generator)


def fill(tier: DeviceTier, *keys: BlockKey, keep: tuple[BlockKey, ...] = ()) -> None:
    with tier.add(keys, keep=keep):
        for key in keys:
            tier.block(key).copy_(content(key))


def holds(tier: DeviceTier, key: BlockKey) -> bool:
    return key in tier and torch.equal(tier.block(key), content(key))


class AnyUse(RuleBasedStateMachine):
    """Random uses, compared with a queue of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = open_tier()
        self.queue: OrderedDict[BlockKey, None] = OrderedDict()

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
    def request(self, keys: list[BlockKey]) -> None:
        """As for a batch of prompts: blocks in the tier are kept, and count as used once all have slots."""
        new = [key for key in keys if key not in self.queue]
        if sum(map(num_tokens, keys)) > NUM_SLOTS:
            with pytest.raises(UserError):
                fill(self.tier, *new, keep=tuple(keys))
            return
        fill(self.tier, *new, keep=tuple(keys))
        evicted = [key for key in self.queue if key not in self.tier]
        spare = [key for key in self.queue if key not in keys]
        assert evicted == spare[: len(evicted)], (
            "only the least recently used blocks are evicted, and no kept block"
        )
        for key in evicted:
            del self.queue[key]
        for key in new:
            self.queue[key] = None
        for key in keys:
            self.tier.slot(key)
            self.queue.move_to_end(key)

    @rule(number=st.integers(0, 20))
    def drop(self, number: int) -> None:
        if self.queue:
            key = [*self.queue][number % len(self.queue)]
            self.tier.drop(key)
            del self.queue[key]

    @rule()
    def clear(self) -> None:
        self.tier.clear()
        self.queue.clear()

    @invariant()
    def every_block_is_what_was_written(self) -> None:
        assert self.tier.num_blocks == len(self.queue)
        assert all(holds(self.tier, key) for key in self.queue)
        assert self.tier.used_bytes == sum(map(SHAPE.block_bytes, self.queue))


AnyUse.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
test_random_uses_keep_blocks_and_their_order = AnyUse.TestCase


def test_blocks_move_if_every_free_range_is_too_short() -> None:
    tier = open_tier()
    small = KEYS[1:7]  # of 2, 3, 3, 4, 5 and 6 tokens: all but the last fit
    fill(tier, *small[:5])
    for key in (small[0], small[2], small[4]):
        tier.drop(key)
    kept = (small[1], small[3])
    fill(tier, KEYS[9], keep=kept)  # 11 of 13 free slots, which are in three ranges
    assert tier.num_evicted == 0 and all(holds(tier, key) for key in (*kept, KEYS[9]))
    ranges = sorted((tier.slot(key), num_tokens(key)) for key in (*kept, KEYS[9]))
    assert ranges[0][0] == 0 and all(a + n == b for (a, n), (b, _) in pairwise(ranges))


def test_adjacent_free_slots_are_one_range() -> None:
    tier = open_tier()
    fill(tier, KEYS[5], KEYS[4], KEYS[9])  # 5, 4 and 11 tokens
    tier.drop(KEYS[4])
    tier.drop(KEYS[5])
    fill(tier, KEYS[8])
    assert tier.num_evicted == 0 and holds(tier, KEYS[9]) and holds(tier, KEYS[8])


def test_the_least_recently_used_blocks_are_evicted() -> None:
    tier = open_tier(10)
    fill(tier, KEYS[2], KEYS[3], KEYS[4])  # 3, 3 and 4 tokens
    tier.slot(KEYS[2])
    fill(tier, KEYS[1])
    assert KEYS[3] not in tier and tier.num_evicted == 1
    assert all(holds(tier, KEYS[i]) for i in (1, 2, 4))


def test_blocks_that_do_not_fit_together_are_refused_and_evict_nothing() -> None:
    tier = open_tier(10)
    fill(tier, KEYS[4], KEYS[5])
    with pytest.raises(UserError, match="raise the device budget, or answer fewer prompts"):
        fill(tier, KEYS[6], keep=(KEYS[5],))
    assert holds(tier, KEYS[4]) and holds(tier, KEYS[5]) and tier.num_evicted == 0


def test_an_interrupt_anywhere_leaves_no_wrong_block() -> None:
    """Interrupt every line in turn, while blocks are evicted and move. All blocks in the tier stay right."""
    num_lines = 0
    while True:
        tier = open_tier()
        fill(tier, *KEYS[1:6])  # 2, 3, 3, 4 and 5 tokens
        tier.drop(KEYS[1])
        kept = (KEYS[2], KEYS[4])
        with interrupted(after=num_lines) as interrupt, suppress(KeyboardInterrupt):
            fill(
                tier, KEYS[0], KEYS[9], keep=kept
            )  # the second block needs 11 slots: the kept blocks must move
        assert all(holds(tier, key) for key in KEYS if key in tier)
        if not interrupt.raised:
            break
        for key in KEYS[:-1]:  # no slot is lost: the last block needs all
            fill(tier, *([] if key in tier else [key]))
            assert all(holds(tier, key) for key in KEYS if key in tier)
        num_lines += 1
    assert num_lines > 50 and all(holds(tier, key) for key in (*kept, KEYS[0], KEYS[9]))


@contextmanager
def interrupted(after: int) -> Iterator[SimpleNamespace]:
    """Raise a KeyboardInterrupt after this many lines of the tier's module."""
    state = SimpleNamespace(left=after, raised=False)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != device_module.__file__:
            return None
        if event == "line" and not state.raised:
            if not state.left:
                state.raised = True
                raise KeyboardInterrupt
            state.left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield state
    finally:
        sys.settrace(before)


def test_a_budget_below_one_token_holds_no_block() -> None:
    tier = DeviceTier(SHAPE, torch.device("cpu"), SHAPE.token_bytes - 1, padding=2)
    fill(tier)
    with pytest.raises(UserError, match="device budget"):
        fill(tier, KEYS[0])


def test_a_budget_above_the_memory_of_the_device_is_refused() -> None:
    with pytest.raises(UserError, match="cpu does not have 1000 TB for blocks: lower the device budget"):
        DeviceTier(SHAPE, torch.device("cpu"), 10**15)


def test_unused_slots_and_the_padding_are_zeros() -> None:
    assert not open_tier().cache_LS2KD.any()
    assert open_tier().cache_LS2KD.shape == (2, NUM_SLOTS + 2, 2, 1, 2)
