"""The block cache gives blocks from the nearest tier, records uses, and never gives a damaged block."""

import logging
import os
import resource
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blockft.inference.block_cache as cache_module
from blockft.inference.block_cache import BlockCache, DamagedBlocks, Tier
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.cache_folder import CacheFolder
from blockft.inference.device_tier import DeviceTier
from blockft.inference.disk_tier import DiskTier
from blockft.inference.host_tier import HostTier
from tests.inference.cached import TOY, kv_of, random_key
from tests.inference.test_disk_tier import flip, path_of

KEYS = [random_key(seed, length) for seed, length in enumerate([5, 3, 8, 1, 5, 5])]


def open_cache(folder: Path | None, *, host: int = 2**20, device: int | None = None) -> BlockCache:
    return BlockCache(
        TOY,
        host=HostTier(host),
        device=None if device is None else DeviceTier(TOY, torch.device("cpu"), device),
        disk=DiskTier(folder, TOY) if folder else None,
    )


def insert_all(cache: BlockCache, *keys: BlockKey) -> None:
    for key in keys:
        cache.insert(key, kv_of(key))
    cache.flush()


def tiers(cache: BlockCache, keys: list[BlockKey] = KEYS) -> list[Tier | None]:
    hits = cache.lookup(keys)
    return [hits[key].tier if key in hits else None for key in keys]


def damage_layer(folder: Path, key: BlockKey, layer: int = TOY.num_layers - 1) -> None:
    """Flip a bit of a layer, which is found when the layer is read."""
    path = path_of(folder, key)
    after = (TOY.num_layers - layer) * num_tokens(key) * TOY.layer_bytes
    flip(path, path.stat().st_size - after)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="blockft.cache"):
        yield caplog


def test_a_lookup_gives_the_nearest_tier(folder: Path) -> None:
    cache = open_cache(folder, device=20 * TOY.token_bytes)
    insert_all(cache, *KEYS[:3])
    assert cache.device is not None
    with cache.device.add(KEYS[:1], keep=()):
        pass
    cache.host.clear()
    cache.host.put(KEYS[1], kv_of(KEYS[1]))
    assert tiers(cache) == [Tier.device, Tier.host, Tier.disk, None, None, None]
    assert tiers(open_cache(folder)) == [Tier.disk] * 3 + [None] * 3
    assert tiers(open_cache(None)) == [None] * 6


def test_an_inserted_block_is_copied(folder: Path) -> None:
    cache, kv = open_cache(folder), kv_of(KEYS[0])
    cache.insert(KEYS[0], kv)
    kv.zero_()
    cache.flush()
    assert torch.equal(cache.on_host(KEYS[0]), kv_of(KEYS[0]))
    (loaded,) = open_cache(folder).load(open_cache(folder).lookup(KEYS[:1])).values()
    assert torch.equal(loaded, kv_of(KEYS[0]))


def test_loaded_blocks_of_the_disk_go_into_the_host_tier(folder: Path) -> None:
    insert_all(open_cache(folder), *KEYS)
    cache = open_cache(folder)
    blocks = cache.load(cache.lookup(KEYS))
    assert all(torch.equal(blocks[key], kv_of(key)) for key in KEYS)
    assert tiers(cache) == [Tier.host] * len(KEYS)


def test_a_request_may_need_more_blocks_than_fit_into_the_host_tier(folder: Path) -> None:
    insert_all(open_cache(folder), *KEYS)
    cache = open_cache(folder, host=9 * TOY.token_bytes)
    insert_all(cache, KEYS[1])
    hits = cache.lookup(KEYS)
    assert hits[KEYS[1]].tier is Tier.host
    blocks = cache.load(hits)
    assert all(torch.equal(blocks[key], kv_of(key)) for key in KEYS)
    assert cache.host.used_bytes <= 9 * TOY.token_bytes


def test_without_host_and_disk_tiers_no_block_is_kept() -> None:
    cache = open_cache(None, host=0)
    insert_all(cache, *KEYS)
    assert not cache.lookup(KEYS) and not cache.host.num_blocks


def test_more_blocks_than_may_wait_for_the_disk_are_all_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MAX_PENDING_WRITES", 2)
    insert_all(open_cache(folder, host=0), *KEYS)
    assert tiers(open_cache(folder)) == [Tier.disk] * len(KEYS)


# use


def age(folder: Path, *keys: BlockKey) -> None:
    for key in keys:
        os.utime(path_of(folder, key), (0, 0))


def used(folder: Path, cache: BlockCache) -> list[bool]:
    """Return for each block whether the disk recorded a use after `age`."""
    cache.flush()
    return [path_of(folder, key).stat().st_mtime > 0 for key in KEYS]


def test_blocks_used_on_the_device_are_not_evicted_from_the_host() -> None:
    cache = open_cache(None, host=11 * TOY.token_bytes, device=2**16)
    insert_all(cache, KEYS[0], KEYS[1])
    assert cache.device is not None
    with cache.device.add(KEYS[:1], keep=()):
        pass
    cache.lookup(KEYS[:1])
    insert_all(cache, KEYS[4])
    assert KEYS[0] in cache.host and KEYS[1] not in cache.host


@pytest.mark.parametrize("tier", [Tier.device, Tier.host])
def test_blocks_used_in_memory_are_not_evicted_from_the_disk(
    folder: Path, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "TOUCH_INTERVAL_S", 0)
    cache = open_cache(folder, device=2**16)
    insert_all(cache, *KEYS)
    if tier is Tier.device:
        load_all(cache, KEYS)
        cache.host.clear()
    cache.flush()
    age(folder, *KEYS)
    assert tiers(cache, KEYS[:2]) == [tier] * 2
    assert used(folder, cache) == [True] * 2 + [False] * 4
    with CacheFolder(folder).locked() as byte_count:
        assert len(CacheFolder(folder).prune(byte_count, unused_since=1)) == 4


def test_a_use_is_recorded_once_per_interval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, clock = open_cache(folder), [1000.0]
    monkeypatch.setattr(cache_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    insert_all(cache, *KEYS)
    cache.lookup(KEYS[:2])
    cache.flush()
    age(folder, *KEYS)
    cache.lookup(KEYS[:3])
    assert used(folder, cache) == [False, False, True, False, False, False]
    clock[0] += cache_module.TOUCH_INTERVAL_S
    cache.lookup(KEYS[:2])
    assert used(folder, cache) == [True, True, True, False, False, False]


def test_uses_that_cannot_be_recorded_cost_one_warning(
    folder: Path, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(folder)
    insert_all(cache, *KEYS)
    age(folder, *KEYS)
    path_of(folder, KEYS[0]).unlink()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("blockft.inference.disk_tier.os.utime", refuse)
    assert tiers(cache) == [Tier.host] * len(KEYS)
    cache.flush()
    assert len(warnings.records) == 1 and "cannot be recorded (Read-only" in warnings.text


# damage


def test_a_block_with_a_damaged_entry_is_missing_until_it_is_inserted_again(
    folder: Path, warnings: pytest.LogCaptureFixture
) -> None:
    insert_all(open_cache(folder), *KEYS[:2])
    damage_layer(folder, KEYS[0])
    cache = open_cache(folder)
    blocks = cache.load(cache.lookup(KEYS[:2]))
    assert list(blocks) == [KEYS[1]]
    assert len(warnings.records) == 1 and "damaged" in warnings.text
    assert tiers(cache, KEYS[:2]) == [None, Tier.host]
    insert_all(cache, KEYS[0])
    cache.host.clear()
    assert torch.equal(cache.load(cache.lookup(KEYS[:1]))[KEYS[0]], kv_of(KEYS[0]))


def test_a_damaged_entry_that_cannot_be_removed_is_ignored_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    insert_all(open_cache(folder), KEYS[0])
    damage_layer(folder, KEYS[0])
    cache = open_cache(folder)

    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("blockft.inference.cache_folder.CacheFolder.remove_damaged", refuse)
    assert not cache.load(cache.lookup(KEYS[:1]))
    assert path_of(folder, KEYS[0]).exists() and not cache.lookup(KEYS[:1])
    assert len(warnings.records) == 2 and "blocks stay in memory only" in warnings.text


# files


@pytest.mark.parametrize("device", [None, 2**16])
def test_more_blocks_than_open_files_are_found_and_loaded(
    folder: Path, device: int | None, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [random_key(seed, 2) for seed in range(100)]
    insert_all(open_cache(folder), *keys)
    cache = open_cache(folder, device=device)
    monkeypatch.setattr(cache_module, "MAX_OPEN_FILES", 4)
    open_files = {int(descriptor) for descriptor in os.listdir("/proc/self/fd")}
    # the kept files, one per reader thread, and a few for Python itself
    free = (number for number in count() if number not in open_files)
    limit = next(islice(free, 4 + cache_module.NUM_READERS + 8, None))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        assert tiers(cache, keys) == [Tier.disk] * len(keys)
        if device:
            load_all(cache, keys)
            assert cache.device is not None
            blocks = {key: cache.device.block(key) for key in keys}
        else:
            blocks = cache.load(cache.lookup(keys))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(torch.equal(blocks[key], kv_of(key)) for key in keys) and not warnings.records


def test_blocks_evicted_after_a_lookup_are_missing_unless_their_files_are_open(
    folder: Path, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MAX_OPEN_FILES", 2)
    insert_all(open_cache(folder), *KEYS)
    for device in (None, 2**16):
        insert_all(open_cache(folder), *KEYS)
        cache = open_cache(folder, device=device)
        hits = cache.lookup(KEYS)
        with CacheFolder(folder).locked() as byte_count:
            CacheFolder(folder).prune(byte_count, max_bytes=0)
        if cache.device is None:
            blocks = cache.load(hits)
            assert list(blocks) == KEYS[:2]
            assert all(torch.equal(blocks[key], kv_of(key)) for key in blocks)
        else:
            with pytest.raises(DamagedBlocks), cache.device.add(KEYS, keep=()):
                cache.load_layers(hits, layer_loaded=())
            assert not cache.lookup(KEYS)
    assert not warnings.records, "an eviction is no error"


# the device


def load_all(cache: BlockCache, keys: list[BlockKey]) -> None:
    assert cache.device is not None
    hits = cache.lookup(keys)
    with cache.device.add([key for key in keys if key not in cache.device], keep=keys):
        cache.load_layers(hits, layer_loaded=())


def test_blocks_of_every_tier_are_loaded_to_the_device(folder: Path) -> None:
    insert_all(open_cache(folder), *KEYS)
    cache = open_cache(folder, device=2**16)
    insert_all(cache, KEYS[2])
    load_all(cache, KEYS[3:4])
    assert tiers(cache)[2:4] == [Tier.host, Tier.device]
    load_all(cache, KEYS)
    assert cache.device is not None
    assert all(torch.equal(cache.device.block(key), kv_of(key)) for key in KEYS)
    assert tiers(cache) == [Tier.device] * len(KEYS)
    cache.device.clear()
    assert tiers(cache) == [Tier.host] * len(KEYS)


@pytest.mark.parametrize("layer", range(TOY.num_layers))
def test_damage_stops_loading_to_the_device(
    folder: Path, layer: int, warnings: pytest.LogCaptureFixture
) -> None:
    insert_all(open_cache(folder), *KEYS)
    damage_layer(folder, KEYS[1], layer)
    cache = open_cache(folder, device=2**16)
    with pytest.raises(DamagedBlocks):
        load_all(cache, KEYS)
    assert cache.device is not None
    cache.device.clear()
    assert len(warnings.records) == 1
    assert tiers(cache) == [Tier.disk, None, *[Tier.disk] * 4]
    assert not cache.host.used_bytes, "partly loaded blocks are not kept"
    insert_all(cache, KEYS[1])
    load_all(cache, KEYS)
    assert all(torch.equal(cache.device.block(key), kv_of(key)) for key in KEYS)
