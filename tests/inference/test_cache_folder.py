"""Whenever another process uses a cache folder at the same time, every use of the folder ends right."""

import re
import shutil
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, key_digest
from blockft.inference.cache_entry import CacheModel, DamagedEntry, find_damage
from blockft.inference.cache_folder import TEMPORARY, CacheFolder
from blockft.inference.disk_tier import DiskTier
from blockft.stages.cache import print_cache_stats, prune_cache, verify_cache
from tests.faults.interruption import Interruption
from tests.inference.cached import OTHER, TOY, kv_of, random_key, write_file

STORED, DAMAGED, NEW = KEYS = [random_key(seed) for seed in range(3)]


class Cache:
    """A copy of a cache that has an entry and a damaged one, and the tiers of two processes."""

    def __init__(self, template: Path, folder: Path) -> None:
        shutil.copytree(template, folder)
        self.folder = folder
        self.tier, self.other = DiskTier(folder, TOY), DiskTier(folder, TOY)

    def keys(self) -> list[BlockKey]:
        """The blocks that have an entry, which is not damaged."""
        paths = {key: path_of(self.folder, key) for key in KEYS}
        return [key for key, path in paths.items() if path.exists() and not find_damage(path, TOY)]

    def used_bytes(self) -> tuple[int | None, int]:
        """The byte count, and the size of all entries."""
        with CacheFolder(self.folder).locked() as byte_count:
            stored = sum(entry.num_bytes for entry in CacheFolder(self.folder).entries())
            return byte_count.read(), stored


def path_of(folder: Path, key: BlockKey) -> Path:
    return folder / TOY.fingerprint / f"{key_digest(key)}.safetensors"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "cache"
    for key in (STORED, DAMAGED):
        DiskTier(folder, TOY).write(key, kv_of(key))
    content = path_of(folder, DAMAGED).read_bytes()
    path_of(folder, DAMAGED).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return folder


def write(cache: Cache, max_bytes: int | None = None) -> None:
    tier = DiskTier(cache.folder, TOY, max_bytes)
    tier.write(NEW, kv_of(NEW))
    assert tier.statistics.entries_lost == 0


def read(cache: Cache) -> None:
    for key in KEYS:
        if entry := cache.tier.open(key):
            try:
                kv = torch.stack([entry.read_layer(index) for index in range(TOY.num_layers)])
            except DamagedEntry:
                continue
            assert torch.equal(kv, kv_of(key))


def prune(cache: Cache) -> None:
    prune_cache(cache.folder, max_bytes="0")


def open_another_model(cache: Cache) -> None:
    DiskTier(cache.folder, OTHER)


USES: dict[str, tuple[Callable[[Cache], object], list[BlockKey]]] = {
    "write": (write, [STORED, NEW]),
    "write and evict": (lambda cache: write(cache, TOY.entry_bytes(5)), []),
    "read": (read, [STORED]),
    "open a model": (open_another_model, [STORED]),
    "stats": (lambda cache: print_cache_stats(cache.folder), [STORED]),
    "verify": (lambda cache: verify_cache(cache.folder, remove=True), [STORED]),
    "prune": (prune, []),
}
"""What a process does, and the entries that are there afterwards if no other process removes them."""


def write_again(cache: Cache) -> None:
    for key in (STORED, DAMAGED):
        cache.other.write(key, kv_of(key))


def repair(cache: Cache) -> None:
    """Replace the damaged entry by a new file that gets its inode, as some file systems choose."""
    with CacheFolder(cache.folder).locked():
        path = path_of(cache.folder, DAMAGED)
        if is_there := path.exists():
            write_file(path, DAMAGED)
    if not is_there:
        cache.other.write(DAMAGED, kv_of(DAMAGED))


OTHERS: dict[str, tuple[list[Callable[[Cache], object]], list[BlockKey]]] = {
    "writes": ([lambda cache: cache.other.write(NEW, kv_of(NEW))], [STORED, NEW]),
    "evicts and writes again": ([prune, write_again], [STORED, DAMAGED]),
    "repairs": ([repair], [STORED, DAMAGED]),
    "verifies": ([lambda cache: verify_cache(cache.folder, remove=True)], [STORED]),
    "removes a model": ([lambda cache: shutil.rmtree(cache.folder / TOY.fingerprint)], []),
    "removes the cache": ([lambda cache: shutil.rmtree(cache.folder)], []),
}
"""What another process does, and the entries that are there afterwards if the first process removes none."""


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("use", USES)
def test_another_process_between_any_two_steps(
    use: str, other: str, template: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    act, left = USES[use]
    acts, left_by_other = OTHERS[other]
    for number in count():
        cache = Cache(template, tmp_path / str(number))
        try:
            with Interruption(number, *(partial(step, cache) for step in acts)) as interruption:
                act(cache)
        except UserError as error:
            assert other == "removes the cache"
            assert re.search("is not a block cache|lock cannot be used: No such file", str(error))
        if cache.folder.exists():
            expected = left_by_other if interruption.has_happened and left else left
            assert set(expected) <= set(cache.keys())
            used, stored = cache.used_bytes()
            assert used in (None, stored) or (other.startswith("removes") and used > stored)
            assert not list((cache.folder / TEMPORARY).glob("*"))
        if not interruption.has_happened:
            break
    assert number > 5
    assert not [message for message in caplog.messages if "is damaged or foreign" not in message]


@pytest.mark.parametrize("other", [TOY, OTHER])
def test_two_processes_create_a_cache(
    other: CacheModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in count():
        folder = tmp_path / str(number) / "cache"
        with Interruption(number, partial(DiskTier, folder, other)) as interruption:
            DiskTier(folder, TOY)
        if not interruption.has_happened:
            break
        assert CacheFolder(folder).models().keys() == {TOY.fingerprint, other.fingerprint}
    assert number > 5 and not caplog.messages
