"""`blockft cache`: build fills a folder, stats lists it, verify finds damage, prune removes entries."""

import io
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from blockft.errors import UserError
from blockft.inference.cache_folder import TEMPORARY, CacheFolder
from blockft.inference.disk_tier import DiskTier
from blockft.inference.runner import BlockRunner
from blockft.stages.cache import build_cache, print_cache_stats, prune_cache, verify_cache
from blockft.stages.generate import CacheArguments, generate
from tests.commands import blockft, start_ranks
from tests.hold import Hold
from tests.inference.cached import OTHER, TOY, kv_of, random_key
from tests.run import save_model, write_block_attention

SIZE = TOY.entry_bytes(5)
DAY = 86400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four blocks of one model, last used 1, 2, 3 and 4 days ago, and one of another, 5 days ago."""
    folder = tmp_path / "cache"
    tier, other = DiskTier(folder, TOY), DiskTier(folder, OTHER)
    for seed in range(4):
        tier.write(random_key(seed), kv_of(random_key(seed)))
    other.write(random_key(4), kv_of(random_key(4), OTHER))
    for days, entry in enumerate(sorted(CacheFolder(folder).entries(), key=lambda e: e.path.parent), start=1):
        os.utime(entry.path, (time.time() - days * DAY - 60,) * 2)
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def num_entries(folder: Path, fingerprint: str | None = None) -> int:
    """The number of entries, of one model or of all; 0 before the folder exists."""
    if not (folder / "format.json").exists():
        return 0
    return len(list(CacheFolder(folder).entries(fingerprint)))


def damage(folder: Path, number: int) -> list[Path]:
    paths = sorted(entry.path for entry in CacheFolder(folder).entries())[:number]
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    return paths


def test_stats_count_per_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_cache_stats(folder, as_json=True)
    stats = printed(capsys)
    assert stats["entries"] == 5 and stats["tokens"] == 25
    assert stats["bytes"] == 4 * SIZE + OTHER.entry_bytes(5)
    toy, other = stats["models"]
    assert toy["name"] == "toy" and toy["fingerprint"] == TOY.fingerprint and toy["dtype"] == "bfloat16"
    assert (toy["entries"], toy["tokens"], toy["bytes"]) == (4, 20, 4 * SIZE)
    assert toy["oldest_use"] < toy["latest_use"] and other["oldest_use"] == other["latest_use"]
    print_cache_stats(folder)
    table = capsys.readouterr().out
    assert "toy" in table and "other" in table and "5 entries" in table


def test_stats_of_a_cache_without_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DiskTier(tmp_path / "cache", TOY)
    print_cache_stats(tmp_path / "cache", as_json=True)
    assert printed(capsys)["models"][0]["oldest_use"] is None
    print_cache_stats(tmp_path / "cache")
    verify_cache(tmp_path / "cache")
    prune_cache(tmp_path / "cache", max_bytes="0")


def test_verify_finds_damaged_entries_and_removes_them(
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


def test_prune_keeps_the_latest_entries_within_the_budget(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / TEMPORARY / "abandoned").write_bytes(bytes(100))
    by_age = sorted(CacheFolder(folder).entries(), key=lambda entry: entry.used_at)
    prune_cache(folder, max_bytes=str(2 * SIZE))
    assert [entry.path.exists() for entry in by_age] == [False, False, False, True, True]
    assert "removed 3 entries" in capsys.readouterr().out
    assert not list((folder / TEMPORARY).iterdir())


def test_prune_removes_entries_unused_for_a_duration(folder: Path) -> None:
    prune_cache(folder, older_than="6d")
    assert num_entries(folder) == 5
    prune_cache(folder, older_than="60h")
    assert num_entries(folder) == 2
    prune_cache(folder, older_than="1w", max_bytes=f"{SIZE}B")
    assert num_entries(folder) == 1


@pytest.mark.parametrize("limit", [{}, {"max_bytes": "0"}])
@pytest.mark.parametrize("model", ["toy", TOY.fingerprint[:3]])
def test_prune_of_one_model_leaves_the_others(folder: Path, model: str, limit: dict[str, str]) -> None:
    prune_cache(folder, model=model, **limit)
    assert num_entries(folder, TOY.fingerprint) == 0 and num_entries(folder, OTHER.fingerprint) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--max-bytes"),
        ({"max_bytes": "much"}, "10GB"),
        ({"older_than": "7"}, "7d"),
        ({"model": ""}, "holds no entries of model ''"),
        ({"model": "nobody"}, "holds no entries of model 'nobody'; its models: toy"),
        ({"max_bytes": "much", "model": "nobody"}, "holds no entries of model"),
        (
            {"max_bytes": "0", "model": "nobody"},
            r"holds no entries of model 'nobody'; its models: toy \(a1b2c3\), other",
        ),
    ],
)
def test_a_refused_prune_removes_nothing(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_cache(folder, **options)
    assert num_entries(folder) == 5


def test_a_folder_that_is_no_cache_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path):
        for command in (print_cache_stats, verify_cache, lambda path: prune_cache(path, max_bytes="0")):
            with pytest.raises(UserError, match="folder"):
                command(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_removed_is_a_user_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="cannot be used: Permission denied"):
        prune_cache(folder, max_bytes="0")


def test_the_command_line_reports_damage_on_stdout_and_fails_with_2(folder: Path) -> None:
    damage(folder, 1)
    done = blockft("cache", "verify", folder, "--json")
    assert done.returncode == 2 and len(json.loads(done.stdout)["damaged"]) == 1
    assert done.stderr.startswith("blockft: 1 of 5 entries") and len(done.stderr.splitlines()) == 1


# cache build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The path of a cache folder that does not exist yet."""
    return tmp_path / "cache"


def document(number: int) -> dict[str, str]:
    return {"title": f"Animal {number}", "text": f"It has {number} legs."}


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def corpus_of(tmp_path: Path, number: int) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", [*map(document, range(number - 1)), "A text alone."])


def on_disk(cache: Path, **more: str) -> CacheArguments:
    """The arguments that the command line passes for a cache on the disk alone."""
    return CacheArguments(folder=cache, host="0", device="0", **more)


def test_a_second_build_computes_no_block(
    model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_of(tmp_path, 70)
    build_cache(str(model), corpus, on_disk(cache))
    first = capsys.readouterr().out
    build_cache(str(model), corpus, on_disk(cache))
    second = capsys.readouterr().out
    before = num_entries(cache)
    assert f", {before} of them new" in first and ", 0 of them new" in second
    write_lines(corpus, [document(0), document(1000)])
    build_cache(str(model), corpus, on_disk(cache))
    assert ", 1 of them new" in capsys.readouterr().out and num_entries(cache) == before + 1


def test_a_build_warns_of_fields_of_documents_once(
    model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [{**document(n), "colour": n, "id": n} for n in range(2)])
    build_cache(str(model), corpus, on_disk(cache))
    warning = "corpus.jsonl has fields without an effect (documents): colour (2)"
    assert capsys.readouterr().err.count(warning) == 1


def test_generate_finds_every_block_of_the_documents(
    model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_cache(str(model), corpus_of(tmp_path, 9), on_disk(cache))
    capsys.readouterr()
    requests = [
        {"documents": [document(5), document(2), "A text alone."], "question": "How many legs?"},
        {"documents": [document(7)], "question": "Which?"},
    ]
    source = write_lines(tmp_path / "requests.jsonl", requests)
    generate(str(model), str(source), max_new_tokens=2, as_json=True, cache=on_disk(cache))
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert line["sources"] == {"disk": line["blocks"] - 1}


WORDING = {"instruction": "Read.\n", "document": "{title} {text}\n", "question": "{question}"}


def test_documents_are_computed_behind_the_instruction_that_the_model_was_trained_with(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wording of the export has the instruction. A model without the switch finds none of the blocks."""
    fields = {"prompt": WORDING, "documents_in": "user", "order": "given"}
    model = write_block_attention(save_model(tmp_path / "model"), local_sees_first=True, **fields)
    corpus = corpus_of(tmp_path, 5)
    for new in ("6", "0"):
        build_cache(str(model), corpus, on_disk(cache))
        printed_text = capsys.readouterr()
        assert f"6 blocks in {cache}, {new} of them new" in printed_text.out
        assert "7 tokens" in printed_text.err and "instruction" in printed_text.err
    verify_cache(cache, as_json=True)
    assert printed(capsys) == {"entries": 6, "damaged": [], "removed": False}
    source = write_lines(tmp_path / "r.jsonl", [{"documents": [document(2), document(0)], "question": "?"}])
    for local_sees_first, found in [(True, "disk"), (False, "computed")]:
        write_block_attention(model, local_sees_first=local_sees_first, **fields)
        generate(str(model), str(source), max_new_tokens=2, as_json=True, cache=on_disk(cache))
        assert set(printed(capsys)["sources"]) == {found}


def test_a_killed_build_resumes(
    model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_of(tmp_path, 1500)
    hold = Hold(tmp_path / "hold", "blockft.inference.disk_tier:DiskTier.write", call=120)
    process = start_ranks("cache", "build", model, corpus, "--cache", cache, before=hold)
    hold.wait_until_reached(process.is_alive)
    process.send_signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    kept = num_entries(cache)
    verify_cache(cache, remove=False, as_json=True)
    capsys.readouterr()
    build_cache(str(model), corpus, on_disk(cache))
    complete = num_entries(cache)
    assert 100 <= kept < complete
    assert f", {complete - kept:,} of them new" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON: Expecting property name"),
        ('{"title": "a"}', "line 3: the document is ['title'], it should have the key \"text\""),
        ('{"title": "a", "text": " "}', "line 3: field 'text' is ' ', it should not be blank"),
        ('{"title": 7, "text": "b"}', "line 3: field 'title' is 7, it should be a text"),
        ("7", 'line 3: the document is 7, it should be {"title", "text"} or a text'),
        ('""', "line 3: the document is '', it should not be blank"),
        (json.dumps("a" * 5000), "line 3: a document has 50"),
    ],
)
def test_an_error_names_the_line(model: Path, tmp_path: Path, cache: Path, line: str, message: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(f"{json.dumps(document(1))}\n\n{line}\n{json.dumps(document(2))}\n")
    with pytest.raises(UserError) as raised:
        build_cache(str(model), corpus, on_disk(cache))
    assert str(raised.value).startswith(f"{corpus}, {message}")


def test_an_error_names_a_missing_corpus(model: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="corpus.jsonl cannot be read"):
        build_cache(str(model), tmp_path / "corpus.jsonl", on_disk(cache))


def test_a_corpus_without_documents_is_refused(model: Path, tmp_path: Path, cache: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n \n")
    with pytest.raises(UserError, match="corpus.jsonl holds no document"):
        build_cache(str(model), corpus, on_disk(cache))


def test_a_corpus_is_read_from_a_pipe_and_from_standard_input(
    model: Path,
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = corpus_of(tmp_path, 9).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text,), daemon=True)
    writer.start()
    build_cache(str(model), pipe, on_disk(cache))
    writer.join()
    number = num_entries(cache)
    assert number > 9 and f"{number} blocks in {cache}, {number} of them new" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    build_cache(str(model), Path("-"), on_disk(cache))
    assert f"{number} blocks in {cache}, 0 of them new" in capsys.readouterr().out


def test_blocks_that_documents_share_count_once(
    model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_cache(str(model), corpus_of(tmp_path, 150), on_disk(cache))
    assert capsys.readouterr().out.startswith(f"{num_entries(cache)} blocks in ")


def test_a_build_stops_at_the_first_block_that_cannot_be_written(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    encoded: list[int] = []
    encode = BlockRunner.prefill_blocks
    monkeypatch.setattr(
        BlockRunner, "prefill_blocks", lambda self, keys: encoded.append(len(keys)) or encode(self, keys)
    )
    monkeypatch.setattr(CacheFolder, "temporary_file", refuse)
    with pytest.raises(UserError, match="does not take all blocks: make room"):
        build_cache(str(model), corpus_of(tmp_path, 30), on_disk(cache))
    assert len(encoded) == 1 and encoded[0] < 5


def test_a_budget_that_is_too_small_is_refused_with_the_needed_size(
    model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_of(tmp_path, 20)
    with pytest.raises(UserError, match="--cache-bytes is 100000: set it to at least") as raised:
        build_cache(str(model), corpus, on_disk(cache, disk="100kB"))
    assert not num_entries(cache)
    needed = int(str(raised.value).split()[-1])
    with pytest.raises(UserError, match="set it to at least"):
        build_cache(str(model), corpus, on_disk(cache, disk=str(needed - 1)))
    build_cache(str(model), corpus, on_disk(cache, disk=str(needed)))
    number = num_entries(cache)
    assert capsys.readouterr().out.startswith(f"{number} blocks in {cache}, {number} of them new")
    with pytest.raises(UserError, match="cannot hold a block"):
        build_cache(str(model), corpus, on_disk(cache, disk="0"))


def test_evicted_blocks_of_other_documents_are_counted(
    model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_cache(str(model), corpus_of(tmp_path, 20), on_disk(cache))
    for entry in CacheFolder(cache).entries():
        os.utime(entry.path, (1, 1))
    others = write_lines(tmp_path / "others.jsonl", [document(i) for i in range(100, 110)])
    capsys.readouterr()
    build_cache(str(model), others, on_disk(cache, disk="150kB"))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert re.fullmatch(r"evicted \d+ other blocks to make room: raise --cache-bytes to keep them\n", err)


def test_a_build_fails_if_its_own_blocks_are_evicted(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cache(str(model), corpus_of(tmp_path, 20), on_disk(cache))
    others = write_lines(tmp_path / "others.jsonl", [document(i) for i in range(100, 110)])
    monkeypatch.setattr(DiskTier, "digests", lambda self: set())  # as if another process had evicted them
    with pytest.raises(UserError, match="of these blocks were evicted again: raise --cache-bytes"):
        build_cache(str(model), others, on_disk(cache, disk="150kB"))
