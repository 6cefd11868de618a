"""The block cache: the nearest tier first, and never a block that is not what was encoded."""

import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blockft.inference.block_cache as store_module
from blockft.inference.block_cache import BlockCache, DamagedBlocks, Tier
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.cache_folder import CacheFolder
from blockft.inference.device_tier import DeviceTier
from blockft.inference.disk_tier import DiskTier
from blockft.inference.host_tier import HostTier
from tests.inference.cached import TOY, kv_of, some_key
from tests.inference.test_disk_tier import flip, path_of

KEYS = [some_key(seed, length) for seed, length in enumerate([5, 3, 8, 1, 5, 5])]


def open_store(folder: Path | None, *, host: int = 2**20, device: int | None = None) -> BlockCache:
    return BlockCache(
        TOY,
        host=HostTier(host),
        device=None if device is None else DeviceTier(TOY, torch.device("cpu"), device),
        disk=DiskTier(folder, TOY) if folder else None,
    )


def keep(store: BlockCache, *keys: BlockKey) -> None:
    for key in keys:
        store.insert(key, kv_of(key))
    store.flush()


def tiers(store: BlockCache, keys: list[BlockKey] = KEYS) -> list[Tier | None]:
    found = store.lookup(keys)
    return [found[key].tier if key in found else None for key in keys]


def spoil(folder: Path, key: BlockKey, layer: int = TOY.num_layers - 1) -> None:
    """Flip a bit of a layer, which is found when the layer is read."""
    path = path_of(folder, key)
    after = (TOY.num_layers - layer) * num_tokens(key) * TOY.layer_bytes
    flip(path, path.stat().st_size - after)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="blockft.cache"):
        yield caplog


def test_the_nearest_tier_that_has_a_block_gives_it(folder: Path) -> None:
    store = open_store(folder, device=20 * TOY.token_bytes)
    keep(store, *KEYS[:3])
    assert store.device is not None
    with store.device.add(KEYS[:1], keep=()):
        pass
    store.host.clear()
    store.host.put(KEYS[1], kv_of(KEYS[1]))
    assert tiers(store) == [Tier.device, Tier.host, Tier.disk, None, None, None]
    assert tiers(open_store(folder)) == [Tier.disk] * 3 + [None] * 3
    assert tiers(open_store(None)) == [None] * 6


def test_what_is_kept_is_a_copy(folder: Path) -> None:
    store, kv = open_store(folder), kv_of(KEYS[0])
    store.insert(KEYS[0], kv)
    kv.zero_()
    store.flush()
    assert torch.equal(store.on_host(KEYS[0]), kv_of(KEYS[0]))
    (loaded,) = open_store(folder).load(open_store(folder).lookup(KEYS[:1])).values()
    assert torch.equal(loaded, kv_of(KEYS[0]))


def test_blocks_of_the_disk_come_into_the_host_tier(folder: Path) -> None:
    keep(open_store(folder), *KEYS)
    store = open_store(folder)
    blocks = store.load(store.lookup(KEYS))
    assert all(torch.equal(blocks[key], kv_of(key)) for key in KEYS)
    assert tiers(store) == [Tier.host] * len(KEYS)


def test_blocks_are_loaded_together_even_if_the_host_cannot_hold_them_together(folder: Path) -> None:
    keep(open_store(folder), *KEYS)
    store = open_store(folder, host=9 * TOY.token_bytes)
    keep(store, KEYS[1])
    found = store.lookup(KEYS)
    assert found[KEYS[1]].tier is Tier.host
    blocks = store.load(found)
    assert all(torch.equal(blocks[key], kv_of(key)) for key in KEYS)
    assert store.host.used_bytes <= 9 * TOY.token_bytes


def test_without_room_anywhere_nothing_is_kept() -> None:
    store = open_store(None, host=0)
    keep(store, *KEYS)
    assert not store.lookup(KEYS) and not store.host.num_blocks


def test_more_blocks_than_may_wait_for_the_disk_all_arrive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_PENDING_WRITES", 2)
    keep(open_store(folder, host=0), *KEYS)
    assert tiers(open_store(folder)) == [Tier.disk] * len(KEYS)


# use


def age(folder: Path, *keys: BlockKey) -> None:
    for key in keys:
        os.utime(path_of(folder, key), (0, 0))


def used(folder: Path, store: BlockCache) -> list[bool]:
    """Whether the disk knows of a use of each block that was not in 1970."""
    store.flush()
    return [path_of(folder, key).stat().st_mtime > 0 for key in KEYS]


def test_what_the_device_gives_is_not_what_the_host_forgets() -> None:
    store = open_store(None, host=11 * TOY.token_bytes, device=2**16)
    keep(store, KEYS[0], KEYS[1])
    assert store.device is not None
    with store.device.add(KEYS[:1], keep=()):
        pass
    store.lookup(KEYS[:1])
    keep(store, KEYS[4])
    assert KEYS[0] in store.host and KEYS[1] not in store.host


@pytest.mark.parametrize("tier", [Tier.device, Tier.host])
def test_what_memory_gives_is_not_what_the_disk_forgets(
    folder: Path, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "TOUCH_INTERVAL_S", 0)
    store = open_store(folder, device=2**16)
    keep(store, *KEYS)
    if tier is Tier.device:
        load_all(store, KEYS)
        store.host.clear()
    store.flush()
    age(folder, *KEYS)
    assert tiers(store, KEYS[:2]) == [tier] * 2
    assert used(folder, store) == [True] * 2 + [False] * 4
    with CacheFolder(folder).locked() as byte_count:
        assert len(CacheFolder(folder).prune(byte_count, unused_since=1)) == 4


def test_a_use_is_recorded_once_in_a_while(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = open_store(folder), [1000.0]
    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    keep(store, *KEYS)
    store.lookup(KEYS[:2])
    store.flush()
    age(folder, *KEYS)
    store.lookup(KEYS[:3])
    assert used(folder, store) == [False, False, True, False, False, False]
    clock[0] += store_module.TOUCH_INTERVAL_S
    store.lookup(KEYS[:2])
    assert used(folder, store) == [True, True, True, False, False, False]


def test_uses_of_what_the_disk_has_lost_or_cannot_record_are_no_trouble(
    folder: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(folder)
    keep(store, *KEYS)
    age(folder, *KEYS)
    path_of(folder, KEYS[0]).unlink()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("blockft.inference.disk_tier.os.utime", refuse)
    assert tiers(store) == [Tier.host] * len(KEYS)
    store.flush()
    assert len(said.records) == 1 and "cannot be recorded (Read-only" in said.text


# damage


def test_a_block_whose_entry_is_damaged_is_missing_until_it_was_encoded_again(
    folder: Path, said: pytest.LogCaptureFixture
) -> None:
    keep(open_store(folder), *KEYS[:2])
    spoil(folder, KEYS[0])
    store = open_store(folder)
    blocks = store.load(store.lookup(KEYS[:2]))
    assert list(blocks) == [KEYS[1]]
    assert len(said.records) == 1 and "damaged" in said.text
    assert tiers(store, KEYS[:2]) == [None, Tier.host]
    keep(store, KEYS[0])
    store.host.clear()
    assert torch.equal(store.load(store.lookup(KEYS[:1]))[KEYS[0]], kv_of(KEYS[0]))


def test_a_damaged_entry_that_cannot_be_removed_is_not_looked_for_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    keep(open_store(folder), KEYS[0])
    spoil(folder, KEYS[0])
    store = open_store(folder)

    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("blockft.inference.cache_folder.CacheFolder.remove", refuse)
    assert not store.load(store.lookup(KEYS[:1]))
    assert path_of(folder, KEYS[0]).exists() and not store.lookup(KEYS[:1])
    assert len(said.records) == 2 and "blocks stay in memory only" in said.text


# files


@pytest.mark.parametrize("device", [None, 2**16])
def test_more_blocks_than_files_that_may_be_open_are_found_and_loaded(
    folder: Path, device: int | None, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [some_key(seed, 2) for seed in range(100)]
    keep(open_store(folder), *keys)
    store = open_store(folder, device=device)
    monkeypatch.setattr(store_module, "MAX_OPEN_FILES", 4)
    with open(os.devnull) as lowest:
        # files that are held, one for each reader, and what Python opens by the way
        limit = lowest.fileno() + 4 + store_module.NUM_READERS + 8
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        assert tiers(store, keys) == [Tier.disk] * len(keys)
        if device:
            load_all(store, keys)
            assert store.device is not None
            blocks = {key: store.device.block(key) for key in keys}
        else:
            blocks = store.load(store.lookup(keys))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(torch.equal(blocks[key], kv_of(key)) for key in keys) and not said.records


def test_blocks_evicted_after_they_were_found_are_missing_unless_their_files_are_held(
    folder: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN_FILES", 2)
    keep(open_store(folder), *KEYS)
    for device in (None, 2**16):
        keep(open_store(folder), *KEYS)
        store = open_store(folder, device=device)
        found = store.lookup(KEYS)
        with CacheFolder(folder).locked() as byte_count:
            CacheFolder(folder).prune(byte_count, max_bytes=0)
        if store.device is None:
            blocks = store.load(found)
            assert list(blocks) == KEYS[:2]
            assert all(torch.equal(blocks[key], kv_of(key)) for key in blocks)
        else:
            with pytest.raises(DamagedBlocks), store.device.add(KEYS, keep=()):
                store.load_layers(found, layer_loaded=())
            assert not store.lookup(KEYS)
    assert not said.records, "that is nobody's fault"


# to the device


def load_all(store: BlockCache, keys: list[BlockKey]) -> None:
    assert store.device is not None
    found = store.lookup(keys)
    with store.device.add([key for key in keys if key not in store.device], keep=keys):
        store.load_layers(found, layer_loaded=())


def test_blocks_come_to_the_device_from_wherever_they_are(folder: Path) -> None:
    keep(open_store(folder), *KEYS)
    store = open_store(folder, device=2**16)
    keep(store, KEYS[2])
    load_all(store, KEYS[3:4])
    assert tiers(store)[2:4] == [Tier.host, Tier.device]
    load_all(store, KEYS)
    assert store.device is not None
    assert all(torch.equal(store.device.block(key), kv_of(key)) for key in KEYS)
    assert tiers(store) == [Tier.device] * len(KEYS)
    store.device.clear()
    assert tiers(store) == [Tier.host] * len(KEYS)


@pytest.mark.parametrize("layer", range(TOY.num_layers))
def test_damage_on_the_way_to_the_device_stops_it(
    folder: Path, layer: int, said: pytest.LogCaptureFixture
) -> None:
    keep(open_store(folder), *KEYS)
    spoil(folder, KEYS[1], layer)
    store = open_store(folder, device=2**16)
    with pytest.raises(DamagedBlocks):
        load_all(store, KEYS)
    assert store.device is not None
    store.device.clear()
    assert len(said.records) == 1
    assert tiers(store) == [Tier.disk, None, *[Tier.disk] * 4]
    assert not store.host.used_bytes, "nothing of it is kept, for layers may be missing"
    keep(store, KEYS[1])
    load_all(store, KEYS)
    assert all(torch.equal(store.device.block(key), kv_of(key)) for key in KEYS)
