"""The disk tier is shared by processes, keeps its budget, finds damage, and survives failing disks."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

import blockft.inference.disk_tier as disk
from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, block_key, key_digest, num_tokens
from blockft.inference.cache_entry import CacheModel
from blockft.inference.cache_folder import TEMPORARY, CacheFolder
from blockft.inference.disk_tier import DamagedEntry, DiskTier
from tests.commands import TIMEOUT_S, warm_context
from tests.inference.cached import OTHER, TOY, check_file, kv_of, random_key

KEYS = [random_key(seed) for seed in range(12)]
SIZE = TOY.entry_bytes(num_tokens(KEYS[0]))


@pytest.fixture
def processes() -> ForkServerContext:
    """What starts processes quickly."""
    return warm_context()


def path_of(folder: Path, key: BlockKey, model: CacheModel = TOY) -> Path:
    return folder / model.fingerprint / f"{key_digest(key)}.safetensors"


def read(tier: DiskTier, key: BlockKey) -> torch.Tensor | None:
    entry = tier.open(key)
    if entry is None:
        return None
    with entry:
        assert entry.num_tokens == num_tokens(key)
        return torch.stack([entry.read_layer(index) for index in range(TOY.num_layers)])


def holds(tier: DiskTier, key: BlockKey) -> bool:
    kv = read(tier, key)
    return kv is not None and torch.equal(kv, kv_of(key))


def used_bytes(folder: Path) -> int | None:
    with CacheFolder(folder).locked() as byte_count:
        return byte_count.read()


def stored_bytes(folder: Path) -> int:
    return sum(entry.num_bytes for entry in CacheFolder(folder).entries())


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def tier(folder: Path) -> DiskTier:
    return DiskTier(folder, TOY)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The warnings of the cache so far."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("blockft.cache").addHandler(handler)
    yield texts
    logging.getLogger("blockft.cache").removeHandler(handler)


def test_every_tier_of_a_folder_reads_what_one_wrote(folder: Path, tier: DiskTier) -> None:
    assert read(tier, KEYS[0]) is None
    for key in KEYS:
        tier.write(key, kv_of(key))
    later = DiskTier(folder, TOY)
    assert all(holds(tier, key) and holds(later, key) for key in KEYS)
    assert tier.statistics.entries_written == later.statistics.entries_read == len(KEYS)
    assert tier.statistics.bytes_written == used_bytes(folder) == stored_bytes(folder) == SIZE * len(KEYS)
    assert later.statistics.bytes_read == sum(kv_of(key).nbytes for key in KEYS)


def test_models_share_a_folder_and_find_only_their_own_blocks(folder: Path, tier: DiskTier) -> None:
    other = DiskTier(folder, OTHER)
    tier.write(KEYS[0], kv_of(KEYS[0]))
    assert other.open(KEYS[0]) is None
    other.write(KEYS[0], kv_of(KEYS[0], OTHER))
    entry = other.open(KEYS[0])
    assert entry and torch.equal(entry.read_layer(1), kv_of(KEYS[0], OTHER)[1])
    assert holds(tier, KEYS[0])
    assert CacheFolder(folder).models() == {TOY.fingerprint: TOY, OTHER.fingerprint: OTHER}


def test_an_existing_entry_is_not_written_again(folder: Path, tier: DiskTier) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    before = path_of(folder, KEYS[0]).stat()
    later = DiskTier(folder, TOY)
    later.write(KEYS[0], kv_of(KEYS[0]))
    assert os.path.samestat(path_of(folder, KEYS[0]).stat(), before)
    assert later.statistics == disk.DiskStatistics() and used_bytes(folder) == SIZE


# damage


@pytest.mark.parametrize("offset", [0, 20, 300, 4000, 4096])
def test_damage_found_on_opening_is_reported_once_and_repaired_by_a_write(
    folder: Path, tier: DiskTier, warnings: list[str], offset: int
) -> None:
    for key in KEYS[:2]:
        tier.write(key, kv_of(key))
        flip(path_of(folder, key), offset)
        assert tier.open(key) is None and not path_of(folder, key).exists()
    assert tier.statistics.entries_damaged == 2 and used_bytes(folder) == 0
    assert len(warnings) == 1 and key_digest(KEYS[0]) in warnings[0]
    tier.write(KEYS[0], kv_of(KEYS[0]))
    assert holds(tier, KEYS[0])


@pytest.mark.parametrize("layer", range(TOY.num_layers))
def test_damage_in_a_layer_is_reported_and_repaired_by_a_write(
    folder: Path, tier: DiskTier, warnings: list[str], layer: int
) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    num_ids = 4 * num_tokens(KEYS[0])
    flip(path_of(folder, KEYS[0]), 4096 + num_ids + layer * num_tokens(KEYS[0]) * TOY.layer_bytes + 3)
    entry = tier.open(KEYS[0])
    assert entry is not None
    for index in range(TOY.num_layers):
        if index != layer:
            assert torch.equal(entry.read_layer(index), kv_of(KEYS[0])[index])
    for _ in range(2):
        with pytest.raises(DamagedEntry, match=f"layer {layer}"):
            entry.read_layer(layer)
    assert tier.statistics.entries_damaged == 1 and len(warnings) == 1
    assert tier.open(KEYS[0]) is None
    tier.write(KEYS[0], kv_of(KEYS[0]))
    assert holds(tier, KEYS[0])


def test_truncated_and_foreign_entries_are_missing(folder: Path, tier: DiskTier, warnings: list[str]) -> None:
    for key in KEYS[:3]:
        tier.write(key, kv_of(key))
    os.truncate(path_of(folder, KEYS[0]), SIZE - 1)
    os.truncate(path_of(folder, KEYS[1]), 0)
    shutil.copy(path_of(folder, KEYS[2]), path_of(folder, KEYS[3]))
    other = DiskTier(folder, OTHER)
    shutil.copy(path_of(folder, KEYS[2]), path_of(folder, KEYS[2], OTHER))
    assert [tier.open(key) for key in (KEYS[0], KEYS[1], KEYS[3])] == [None] * 3
    assert other.open(KEYS[2]) is None
    assert tier.statistics.entries_damaged == 3 and other.statistics.entries_damaged == 1
    assert holds(tier, KEYS[2])


def test_a_write_replaces_a_truncated_entry(folder: Path, tier: DiskTier) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    os.truncate(path_of(folder, KEYS[0]), 100)
    tier.write(KEYS[0], kv_of(KEYS[0]))
    assert holds(tier, KEYS[0])


def test_an_entry_that_replaced_a_damaged_one_stays(folder: Path, tier: DiskTier) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    flip(path_of(folder, KEYS[0]), SIZE - 1)
    entry = tier.open(KEYS[0])
    assert entry is not None
    path_of(folder, KEYS[0]).unlink()
    DiskTier(folder, TOY).write(KEYS[0], kv_of(KEYS[0]))
    with pytest.raises(DamagedEntry):
        entry.read_layer(TOY.num_layers - 1)
    assert holds(tier, KEYS[0])


def test_an_open_entry_is_readable_after_its_eviction(folder: Path, tier: DiskTier) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    entry = tier.open(KEYS[0])
    assert entry is not None
    with CacheFolder(folder).locked() as byte_count:
        CacheFolder(folder).prune(byte_count, max_bytes=0)
    assert tier.open(KEYS[0]) is None
    assert torch.equal(entry.read_layer(2), kv_of(KEYS[0])[2])
    assert tier.statistics.entries_damaged == 0


def test_an_entry_that_is_not_kept_open_is_readable_while_its_file_exists(
    folder: Path, tier: DiskTier, warnings: list[str]
) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    path, kept = path_of(folder, KEYS[0]), folder.parent / "kept"
    entry = tier.open(KEYS[0], keep_open=False)
    assert entry is not None and torch.equal(entry.read_layer(2), kv_of(KEYS[0])[2])
    path.rename(kept)
    with pytest.raises(DamagedEntry):
        entry.read_layer(2)
    tier.write(KEYS[0], -kv_of(KEYS[0]))  # like another process with slightly different numbers
    with pytest.raises(DamagedEntry, match="was replaced"):
        entry.read_layer(2)
    other = tier.open(KEYS[0])
    assert other is not None and torch.equal(other.read_layer(2), -kv_of(KEYS[0])[2]), (
        "a replaced file is not removed"
    )
    kept.rename(path)
    assert torch.equal(entry.read_layer(2), kv_of(KEYS[0])[2])
    assert not warnings and tier.statistics.entries_damaged == 0
    flip(path, SIZE - 1)
    with pytest.raises(DamagedEntry, match="layer 2"):
        entry.read_layer(2)
    assert len(warnings) == tier.statistics.entries_damaged == 1 and not path.exists()


# folders


def test_another_format_version_is_refused(folder: Path, tier: DiskTier) -> None:
    facts = json.loads((folder / "format.json").read_text())
    (folder / "format.json").write_text(json.dumps(facts | {"version": 2}))
    with pytest.raises(UserError, match="version 2.* has version 1"):
        DiskTier(folder, TOY)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "x"}', "\xff"])
def test_a_damaged_format_file_is_refused(folder: Path, tier: DiskTier, text: str) -> None:
    (folder / "format.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"format\.json"):
        DiskTier(folder, TOY)


def test_folders_with_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UserError, match="folder"):
            DiskTier(path, TOY)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_model_file_is_written_again(folder: Path, tier: DiskTier) -> None:
    model = folder / TOY.fingerprint / "model.json"
    for offset in range(len(model.read_bytes())):
        flip(model, offset)
        with pytest.raises(UserError, match=r"model\.json"):
            CacheFolder(folder).models()
        DiskTier(folder, TOY)
        assert CacheFolder(folder).models() == {TOY.fingerprint: TOY}


def test_a_removed_folder_is_created_again(folder: Path, tier: DiskTier) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    shutil.rmtree(folder)
    assert tier.open(KEYS[0]) is None
    tier.write(KEYS[0], kv_of(KEYS[0]))
    assert holds(tier, KEYS[0]) and CacheFolder(folder).models() == {TOY.fingerprint: TOY}


def test_a_folder_replaced_by_another_version_costs_one_warning(
    folder: Path, tier: DiskTier, warnings: list[str]
) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "format.json").write_text('{"format": "blockft cache", "version": 99}')
    for key in KEYS[:2]:
        tier.write(key, kv_of(key))
        assert tier.open(key) is None
    assert len(warnings) == 1 and "version 99" in warnings[0] and tier.statistics.entries_lost == 2


# the budget


def test_a_budget_below_one_token_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot hold a block of toy"):
        DiskTier(folder, TOY, max_bytes=TOY.entry_bytes(1) - 1)


def test_a_block_above_the_budget_is_not_written_and_evicts_nothing(
    folder: Path, warnings: list[str]
) -> None:
    tier = DiskTier(folder, TOY, max_bytes=2 * SIZE)
    tier.write(KEYS[0], kv_of(KEYS[0]))
    for seed in (1, 2):
        key = random_key(seed, 1000)
        tier.write(key, kv_of(key))
        assert tier.open(key) is None
    assert holds(tier, KEYS[0]) and tier.statistics.entries_lost == 2
    assert len(warnings) == 1 and "1000 tokens" in warnings[0]


def test_the_least_recently_used_entries_are_evicted(folder: Path) -> None:
    tier = DiskTier(folder, TOY, max_bytes=4 * SIZE)
    long_ago = time.time() - 10_000
    for index, key in enumerate(KEYS[:4]):
        tier.write(key, kv_of(key))
        os.utime(path_of(folder, key), (long_ago + index,) * 2)
    assert holds(tier, KEYS[0])
    tier.write(KEYS[1], kv_of(KEYS[1]))
    tier.write(KEYS[4], kv_of(KEYS[4]))
    assert [holds(tier, key) for key in KEYS[:5]] == [True, True, False, False, True]
    assert tier.statistics.entries_evicted == 2 and tier.statistics.bytes_evicted == 2 * SIZE
    assert used_bytes(folder) == stored_bytes(folder) == 3 * SIZE


def test_an_entry_may_be_used_without_being_read(folder: Path, tier: DiskTier) -> None:
    for key in KEYS[:2]:
        tier.write(key, kv_of(key))
        os.utime(path_of(folder, key), (1000, 1000))
    path_of(folder, KEYS[2]).write_bytes(b"of another size")
    assert [tier.use(key) for key in (KEYS[0], *KEYS[2:4])] == [True, False, False]
    assert tier.statistics.entries_read == 0
    with CacheFolder(folder).locked() as byte_count:
        CacheFolder(folder).prune(byte_count, unused_since=2000)
    assert [key in tier for key in KEYS[:2]] == [True, False]


def test_a_budget_of_one_block_keeps_the_last_block(folder: Path) -> None:
    tier = DiskTier(folder, TOY, max_bytes=SIZE)
    for key in KEYS:
        tier.write(key, kv_of(key))
        assert holds(tier, key) and stored_bytes(folder) == SIZE


def test_the_budget_covers_all_models_and_earlier_processes(folder: Path, tier: DiskTier) -> None:
    for key in KEYS:
        tier.write(key, kv_of(key))
    size = OTHER.entry_bytes(num_tokens(KEYS[0]))
    DiskTier(folder, OTHER, max_bytes=3 * size).write(KEYS[0], kv_of(KEYS[0], OTHER))
    assert path_of(folder, KEYS[0], OTHER).exists() and stored_bytes(folder) <= 3 * size


def test_a_damaged_byte_count_is_counted_again(folder: Path) -> None:
    tier = DiskTier(folder, TOY, max_bytes=6 * SIZE)
    for key in KEYS[:6]:
        tier.write(key, kv_of(key))
    (folder / ".lock").write_text("damaged")
    tier.write(KEYS[6], kv_of(KEYS[6]))
    assert stored_bytes(folder) == used_bytes(folder) <= 6 * SIZE


# failing disks


def test_a_full_disk_costs_one_warning(
    folder: Path, tier: DiskTier, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    write_entry = disk.write_entry

    def fail_late(file: Any, *args: Any) -> None:
        write_entry(file, *args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(disk, "write_entry", fail_late)
        for key in KEYS[1:3]:
            tier.write(key, kv_of(key))
            assert tier.open(key) is None
    assert holds(tier, KEYS[0])
    assert warnings == [f"{folder} cannot be written (the disk is full): blocks stay in memory only"]
    assert tier.statistics.entries_lost == 2 and not list((folder / TEMPORARY).iterdir())
    tier.write(KEYS[1], kv_of(KEYS[1]))
    assert holds(tier, KEYS[1])


def test_a_file_that_the_system_truncates_is_not_an_entry(
    folder: Path, tier: DiskTier, warnings: list[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 100, limits[1]))
    try:
        tier.write(KEYS[0], kv_of(KEYS[0]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tier.open(KEYS[0]) is None and len(warnings) == 1
    assert not list((folder / TEMPORARY).iterdir()) and stored_bytes(folder) == 0


def test_a_read_only_folder_is_readable(
    folder: Path, tier: DiskTier, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    os.utime(path_of(folder, KEYS[0]), (0, 0))
    flip_key = KEYS[1]
    tier.write(flip_key, kv_of(flip_key))
    flip(path_of(folder, flip_key), 4096)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(CacheFolder, "locked", refuse)
    monkeypatch.setattr(CacheFolder, "temporary_file", refuse)
    monkeypatch.setattr(disk.os, "utime", refuse)
    later = DiskTier(folder, TOY)
    assert not warnings
    for _ in range(2):
        assert holds(later, KEYS[0])
        assert len(warnings) == 1 and "cannot be recorded" in warnings[0]
    later.write(KEYS[2], kv_of(KEYS[2]))
    assert len(warnings) == 2 and "cannot be written (Read-only" in warnings[1]
    assert later.open(flip_key) is None and len(warnings) == 3
    assert later.statistics.entries_lost == 1


def test_a_folder_that_cannot_be_created_costs_one_warning(warnings: list[str]) -> None:
    tier = DiskTier(Path("/proc/blockft/cache"), TOY)
    tier.write(KEYS[0], kv_of(KEYS[0]))
    assert tier.open(KEYS[0]) is None
    assert len(warnings) == 1 and "cannot be written" in warnings[0]


def test_a_disk_with_read_errors_costs_one_warning(
    folder: Path, tier: DiskTier, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.write(KEYS[0], kv_of(KEYS[0]))
    entry = tier.open(KEYS[0])
    assert entry is not None

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fail)
        with pytest.raises(DamagedEntry):
            entry.read_layer(0)
        assert tier.open(KEYS[0]) is None
    assert len(warnings) == 1 and "cannot be read" in warnings[0] and tier.statistics.entries_damaged == 0
    assert holds(tier, KEYS[0])


# several threads and processes


def test_threads_may_write_and_read_the_same_blocks(folder: Path, tier: DiskTier) -> None:
    def work(seed: int) -> None:
        for key in random.Random(seed).sample(KEYS, len(KEYS)):
            tier.write(key, kv_of(key))
            right.append(holds(tier, key))

    right: list[bool] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 8 * len(KEYS)
    assert tier.statistics.entries_written == len(KEYS) and used_bytes(folder) == stored_bytes(folder)


def write_at_once(folder: Path, key: BlockKey, barrier: Any, results: Any) -> None:
    tier, kv = DiskTier(folder, TOY), kv_of(key)
    barrier.wait()
    tier.write(key, kv)
    results.put((tier.statistics.entries_written, holds(tier, key)))


def test_two_processes_may_write_the_same_block(folder: Path, processes: ForkServerContext) -> None:
    results, barrier = processes.Queue(), processes.Barrier(2)
    key = random_key(0, 20_000)
    for _ in range(2):
        processes.Process(target=write_at_once, args=(folder, key, barrier, results), daemon=True).start()
    outcomes = [results.get(timeout=TIMEOUT_S) for _ in range(2)]
    assert sorted(outcomes) == [(0, True), (1, True)]
    assert used_bytes(folder) == stored_bytes(folder) == TOY.entry_bytes(20_000)


def write_forever(folder: Path, seed: int, started: Any) -> None:
    tier = DiskTier(folder, TOY, max_bytes=20 * TOY.entry_bytes(20_000))
    rng = random.Random(seed)
    kv = kv_of(random_key(seed, 20_000))
    started.set()
    while True:
        length = rng.randrange(1, 20_000)
        tier.write(block_key([rng.randrange(50_000)] * length), kv[:, :length])


def test_sigkill_while_writing_leaves_no_damaged_entry(folder: Path, processes: ForkServerContext) -> None:
    rng = random.Random(0)
    num_temporary = 0
    for seed in count():
        if seed >= 12 and num_temporary or seed == 500:
            break
        started = processes.Event()
        writers = [
            processes.Process(target=write_forever, args=(folder, 2 * seed + i, started), daemon=True)
            for i in (0, 1)
        ]
        for writer in writers:
            writer.start()
        assert started.wait(TIMEOUT_S)
        time.sleep(rng.uniform(0, 0.1))
        for writer in writers:
            assert writer.pid
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        for entry in CacheFolder(folder).entries():
            check_file(entry.path)
        num_temporary += len(list((folder / TEMPORARY).iterdir()))
    assert CacheFolder(folder).models() == {TOY.fingerprint: TOY}
    assert num_temporary, "no writer was killed while it wrote"
    tier = DiskTier(folder, TOY)
    tier.write(KEYS[0], kv_of(KEYS[0]))
    assert holds(tier, KEYS[0]) and not list((folder / TEMPORARY).iterdir())


def use_randomly(folder: Path, seed: int, seconds: float, results: Any) -> None:
    """Read, write and prune at random. Report statistics, pruned entries and correct reads."""
    rng = random.Random(seed)
    tier = DiskTier(folder, TOY, max_bytes=20 * SIZE)
    num_right, num_pruned = 0, 0
    end = time.monotonic() + seconds

    def has_done_enough() -> bool:
        return num_right > 10 and num_pruned + tier.statistics.entries_evicted > 1

    while time.monotonic() < end or not has_done_enough():
        key = KEYS[rng.randrange(12)] if rng.random() < 0.5 else random_key(rng.randrange(12, 60))
        if rng.random() < 0.02:
            cache = CacheFolder(folder)
            with cache.locked() as byte_count:
                num_pruned += len(cache.prune(byte_count, max_bytes=rng.randrange(20) * SIZE))
        elif (kv := read(tier, key)) is None:
            tier.write(key, kv_of(key))
        else:
            assert torch.equal(kv, kv_of(key))
            num_right += 1
    results.put((tier.statistics, num_pruned, num_right))


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_eight_processes_using_one_folder_randomly_lose_no_entry(
    folder: Path, processes: ForkServerContext, seconds: float
) -> None:
    results = processes.Queue()
    workers = [
        processes.Process(target=use_randomly, args=(folder, seed, seconds, results), daemon=True)
        for seed in range(8)
    ]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=seconds + TIMEOUT_S) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    remaining = list(CacheFolder(folder).entries())
    for entry in remaining:
        check_file(entry.path)
    all_statistics = [statistics for statistics, _, _ in outcomes]
    assert all(s.entries_damaged == s.entries_lost == 0 for s in all_statistics)
    num_removed = sum(s.entries_evicted for s in all_statistics) + sum(pruned for _, pruned, _ in outcomes)
    assert sum(s.entries_written for s in all_statistics) == len(remaining) + num_removed
    assert used_bytes(folder) == stored_bytes(folder) <= 20 * SIZE
    assert all(right > 10 for _, _, right in outcomes) and num_removed > 10
    assert not list((folder / TEMPORARY).iterdir())
