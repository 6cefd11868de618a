"""`blockft cache build`: a corpus is encoded once, whoever interrupts it, and `generate` finds all of it."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from blockft.errors import UserError
from blockft.inference.cache_folder import CacheFolder
from blockft.inference.disk_tier import DiskTier
from blockft.inference.runner import BlockRunner
from blockft.stages.build import build
from blockft.stages.cache import verify_cache
from blockft.stages.generate import CacheArguments, generate
from tests.run import save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def document(number: int) -> dict[str, str]:
    return {"title": f"Animal {number}", "text": f"It has {number} legs."}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def corpus_of(tmp_path: Path, number: int) -> Path:
    return write(tmp_path / "corpus.jsonl", [*map(document, range(number - 1)), "A text alone."])


def words(folder: Path, **more: str) -> CacheArguments:
    """As the command line passes them."""
    return CacheArguments(folder=folder, host="0", device="0", **more)


def num_entries(folder: Path) -> int:
    return len(list(CacheFolder(folder).entries())) if (folder / "format.json").exists() else 0


def test_a_second_build_encodes_nothing(
    model: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_of(tmp_path, 70)
    build(str(model), corpus, words(folder))
    first = capsys.readouterr().out
    build(str(model), corpus, words(folder))
    second = capsys.readouterr().out
    before = num_entries(folder)
    assert f" {before} of them encoded now" in first and " 0 of them encoded now" in second
    write(corpus, [document(0), document(1000)])
    build(str(model), corpus, words(folder))
    assert " 1 of them encoded now" in capsys.readouterr().out and num_entries(folder) == before + 1


def test_generate_finds_every_block_of_the_documents(
    model: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(str(model), corpus_of(tmp_path, 9), words(folder))
    capsys.readouterr()
    requests = [
        {"documents": [document(5), document(2), "A text alone."], "question": "How many legs?"},
        {"documents": [document(7)], "question": "Which?"},
    ]
    source = write(tmp_path / "requests.jsonl", requests)
    generate(str(model), str(source), max_new_tokens=2, as_json=True, cache=words(folder))
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert line["sources"] == {"disk": line["blocks"] - 1}


def test_a_build_that_was_killed_goes_on(
    model: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_of(tmp_path, 1500)
    command = [sys.executable, "-m", "blockft", "cache", "build", str(model), str(corpus)]
    process = subprocess.Popen([*command, "--cache", str(folder)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while num_entries(folder) < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it should not have ended by itself"
    kept = num_entries(folder)
    verify_cache(folder, remove=False, as_json=True)
    capsys.readouterr()
    build(str(model), corpus, words(folder))
    whole = num_entries(folder)
    assert 100 <= kept < whole
    assert f" {whole - kept:,} of them encoded now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
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
def test_a_bad_line_is_named(model: Path, tmp_path: Path, folder: Path, line: str, said: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(f"{json.dumps(document(1))}\n\n{line}\n{json.dumps(document(2))}\n")
    with pytest.raises(UserError) as raised:
        build(str(model), corpus, words(folder))
    assert str(raised.value).startswith(f"{corpus}, {said}")


def test_a_corpus_that_is_not_there_is_named(model: Path, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="corpus.jsonl cannot be read"):
        build(str(model), tmp_path / "corpus.jsonl", words(folder))


def test_a_corpus_without_documents_is_refused(model: Path, tmp_path: Path, folder: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n \n")
    with pytest.raises(UserError, match="corpus.jsonl holds no document"):
        build(str(model), corpus, words(folder))


def test_a_corpus_may_come_through_a_pipe(
    model: Path,
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = corpus_of(tmp_path, 9).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text,))
    writer.start()
    build(str(model), pipe, words(folder))
    writer.join()
    number = num_entries(folder)
    assert number > 9 and f"{number} blocks, {number} of them encoded now" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    build(str(model), Path("-"), words(folder))
    assert f"{number} blocks, 0 of them encoded now" in capsys.readouterr().out


def test_blocks_that_documents_share_count_once(
    model: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(str(model), corpus_of(tmp_path, 150), words(folder))
    assert capsys.readouterr().out.startswith(f"{num_entries(folder)} blocks, ")


def test_a_folder_that_does_not_take_a_block_ends_it_at_once(
    model: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
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
        build(str(model), corpus_of(tmp_path, 30), words(folder))
    assert len(encoded) == 1 and encoded[0] < 5


def test_a_budget_that_is_too_small_is_refused_with_the_one_that_is_needed(
    model: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_of(tmp_path, 20)
    with pytest.raises(UserError, match="--cache-bytes is 100000, it should be at least") as raised:
        build(str(model), corpus, words(folder, disk="100kB"))
    assert not num_entries(folder)
    needed = int(str(raised.value).split()[-1])
    with pytest.raises(UserError, match="it should be at least"):
        build(str(model), corpus, words(folder, disk=str(needed - 1)))
    build(str(model), corpus, words(folder, disk=str(needed)))
    number = num_entries(folder)
    assert capsys.readouterr().out.startswith(f"{number} blocks, {number} of them encoded now")
    with pytest.raises(UserError, match="cannot hold a block"):
        build(str(model), corpus, words(folder, disk="0"))


def test_other_blocks_make_way_and_are_counted(
    model: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(str(model), corpus_of(tmp_path, 20), words(folder))
    for entry in CacheFolder(folder).entries():
        os.utime(entry.path, (1, 1))
    others = write(tmp_path / "others.jsonl", [document(i) for i in range(100, 110)])
    capsys.readouterr()
    build(str(model), others, words(folder, disk="150kB"))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[1].endswith("other blocks had to make way: allow more by --cache-bytes")


def test_blocks_that_others_pushed_out_are_no_success(
    model: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(str(model), corpus_of(tmp_path, 20), words(folder))
    others = write(tmp_path / "others.jsonl", [document(i) for i in range(100, 110)])
    monkeypatch.setattr(DiskTier, "digests", lambda self: set())  # as if another process had been there
    with pytest.raises(UserError, match="of these blocks had to make way for others: allow more"):
        build(str(model), others, words(folder, disk="150kB"))
