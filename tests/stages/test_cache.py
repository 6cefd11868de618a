"""`blockft cache`: what a folder holds, what is damaged in it, and what goes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blockft.errors import UserError
from blockft.inference.cache_folder import DRAFTS, CacheFolder
from blockft.inference.disk_tier import DiskTier
from blockft.stages.cache import prune, stats, verify_cache
from tests.inference.cached import OTHER, TOY, kv_of, some_key

ROOT = Path(__file__).parents[2]
SIZE = TOY.entry_bytes(5)
DAY = 86400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four blocks of one model, last used 1, 2, 3 and 4 days ago, and one of another, 5 days ago."""
    folder = tmp_path / "cache"
    tier, other = DiskTier(folder, TOY), DiskTier(folder, OTHER)
    for seed in range(4):
        tier.write(some_key(seed), kv_of(some_key(seed)))
    other.write(some_key(4), kv_of(some_key(4), OTHER))
    for days, entry in enumerate(sorted(CacheFolder(folder).entries(), key=lambda e: e.path.parent), start=1):
        os.utime(entry.path, (time.time() - days * DAY - 60,) * 2)
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def num_entries(folder: Path, fingerprint: str | None = None) -> int:
    return len(list(CacheFolder(folder).entries(fingerprint)))


def damage(folder: Path, number: int) -> list[Path]:
    paths = sorted(entry.path for entry in CacheFolder(folder).entries())[:number]
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    return paths


def test_stats_count_per_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats(folder, as_json=True)
    found = printed(capsys)
    assert found["entries"] == 5 and found["tokens"] == 25
    assert found["bytes"] == 4 * SIZE + OTHER.entry_bytes(5)
    toy, other = found["models"]
    assert toy["name"] == "toy" and toy["fingerprint"] == TOY.fingerprint and toy["dtype"] == "bfloat16"
    assert (toy["entries"], toy["tokens"], toy["bytes"]) == (4, 20, 4 * SIZE)
    assert toy["oldest_use"] < toy["latest_use"] and other["oldest_use"] == other["latest_use"]
    stats(folder)
    table = capsys.readouterr().out
    assert "toy" in table and "other" in table and "5 entries" in table


def test_stats_of_a_cache_without_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DiskTier(tmp_path / "cache", TOY)
    stats(tmp_path / "cache", as_json=True)
    assert printed(capsys)["models"][0]["oldest_use"] is None
    stats(tmp_path / "cache")
    verify_cache(tmp_path / "cache")
    prune(tmp_path / "cache", max_bytes="0")


def test_verify_finds_what_is_damaged_and_removes_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify_cache(folder, as_json=True)
    assert printed(capsys) == {"entries": 5, "damaged": [], "removed": False}
    paths = damage(folder, 2)
    with pytest.raises(UserError, match="2 of 5 entries in .* are damaged: add --remove"):
        verify_cache(folder, as_json=True)
    assert [line["path"] for line in printed(capsys)["damaged"]] == list(map(str, paths))
    verify_cache(folder, remove=True)
    assert "2 damaged and removed" in capsys.readouterr().out
    assert num_entries(folder) == 3 and not any(path.exists() for path in paths)
    verify_cache(folder, remove=True)


def test_prune_keeps_the_latest_within_the_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / DRAFTS / "abandoned").write_bytes(bytes(100))
    by_age = sorted(CacheFolder(folder).entries(), key=lambda entry: entry.used_at)
    prune(folder, max_bytes=str(2 * SIZE))
    assert [entry.path.exists() for entry in by_age] == [False, False, False, True, True]
    assert "3 entries removed" in capsys.readouterr().out
    assert not list((folder / DRAFTS).iterdir())


def test_prune_keeps_what_is_young_enough(folder: Path) -> None:
    prune(folder, older_than="6d")
    assert num_entries(folder) == 5
    prune(folder, older_than="60h")
    assert num_entries(folder) == 2
    prune(folder, older_than="1w", max_bytes=f"{SIZE}B")
    assert num_entries(folder) == 1


@pytest.mark.parametrize("limit", [{}, {"max_bytes": "0"}])
@pytest.mark.parametrize("model", ["toy", TOY.fingerprint[:3]])
def test_prune_of_one_model_leaves_the_others(folder: Path, model: str, limit: dict[str, str]) -> None:
    prune(folder, model=model, **limit)
    assert num_entries(folder, TOY.fingerprint) == 0 and num_entries(folder, OTHER.fingerprint) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--max-bytes"),
        ({"max_bytes": "much"}, "10GB"),
        ({"older_than": "7"}, "7d"),
        ({"model": ""}, "holds no model ''"),
        ({"model": "nobody"}, "holds no model 'nobody': it holds toy"),
        ({"max_bytes": "much", "model": "nobody"}, "holds no model"),
        ({"max_bytes": "0", "model": "nobody"}, r"holds no model 'nobody': it holds toy \(a1b2c3\), other"),
    ],
)
def test_prunes_mistakes_cost_nothing(folder: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        prune(folder, **options)
    assert num_entries(folder) == 5


def test_what_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path):
        for verb in (stats, verify_cache, lambda path: prune(path, max_bytes="0")):
            with pytest.raises(UserError, match="folder"):
                verb(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_refuses_is_said_in_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="cannot be used: Permission denied"):
        prune(folder, max_bytes="0")


def test_the_command_line(folder: Path) -> None:
    damage(folder, 1)
    command = [sys.executable, "-m", "blockft", "cache", "verify", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(json.loads(done.stdout)["damaged"]) == 1
    assert done.stderr.startswith("blockft: 1 of 5 entries") and len(done.stderr.splitlines()) == 1
