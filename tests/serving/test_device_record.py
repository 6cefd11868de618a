"""The scheduler's record of blocks on the device follows the device tier of a worker."""

import random

import pytest
import torch

from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.device_tier import DeviceTier
from blockft.serving import device_record
from blockft.serving.device_record import DeviceRecord
from tests.inference.cached import random_key
from tests.serving.stubs import SHAPE

KEYS = [random_key(seed, 4) for seed in range(8)]


def test_it_has_the_blocks_that_the_device_tier_has() -> None:
    """Blocks of equal lengths leave no free slots that are too scattered."""
    tier = DeviceTier(SHAPE, torch.device("cpu"), 12 * SHAPE.token_bytes)
    record, rng = DeviceRecord(tier.num_slots), random.Random(0)
    for _ in range(200):
        keys = rng.sample(KEYS, rng.randint(1, 3))
        with tier.add([key for key in keys if key not in tier], keys):
            pass
        for key in keys:
            tier.slot(key)
        record.use(keys)
        assert [record.has_all([key]) for key in KEYS] == [key in tier for key in KEYS]


def test_a_block_counts_once_and_several_must_all_be_there() -> None:
    record = DeviceRecord(8)
    record.use([KEYS[0], KEYS[0], KEYS[1]])
    assert record.has_all(KEYS[:2]) and not record.has_all(KEYS[:3])


@pytest.mark.parametrize("num_slots", [0, 11])
def test_blocks_that_do_not_fit_together_are_not_in_the_tier(num_slots: int) -> None:
    record = DeviceRecord(num_slots)
    record.use(KEYS[:3])
    assert not any(record.has_all([key]) for key in KEYS)


def test_a_computed_block_is_near_for_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    record, clock = DeviceRecord(0), [5.0]
    monkeypatch.setattr(device_record.time, "monotonic", lambda: clock[0])
    record.add_computed(KEYS[0])
    clock[0] += device_record.COMPUTED_S / 2
    record.add_computed(KEYS[1])
    record.add_computed(KEYS[0])
    assert record.has_all(KEYS[:2])
    clock[0] += device_record.COMPUTED_S * 0.9
    assert record.has_all(KEYS[:2])
    clock[0] += device_record.COMPUTED_S * 0.2
    assert not record.has_all(KEYS[:1]) and not record.has_all(KEYS[1:2])


def test_a_long_block_evicts_several_short_ones() -> None:
    record = DeviceRecord(12)
    record.use(KEYS[:2])
    record.use(KEYS[2:3])
    long: BlockKey = random_key(9, 7)
    assert num_tokens(long) == 7
    record.use([long])
    assert record.has_all([long, KEYS[2]]) and not record.has_all([KEYS[0]]) and not record.has_all([KEYS[1]])


def test_it_follows_a_tier_whose_free_slots_are_scattered() -> None:
    """Such a tier evicts more blocks than their lengths say. The worker tells which ones."""
    keys = [random_key(seed, 3 + seed % 4) for seed in range(12)]
    tier = DeviceTier(SHAPE, torch.device("cpu"), 20 * SHAPE.token_bytes)
    record, rng, num_wrong = DeviceRecord(tier.num_slots), random.Random(0), 0
    for _ in range(300):
        chosen = rng.sample(keys, rng.randint(1, 3))
        with tier.add([key for key in chosen if key not in tier], chosen) as evicted:
            pass
        for key in chosen:
            tier.slot(key)
        record.use(chosen)
        num_wrong += sum(record.has_all([key]) for key in keys if key not in tier)
        record.drop(evicted)
        assert all(key in tier for key in keys if record.has_all([key]))
        assert record._num_used == sum(map(num_tokens, record._in_tier))
    assert num_wrong
