import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from blockft.data.encoder import IGNORE_INDEX, Encoder
from blockft.data.prepared import (
    MANIFEST,
    ExampleColumns,
    Examples,
    build_shard_batch,
    find_foreign_file,
    finish_folder,
    load_prepared,
    shard_files,
    write_shard,
)
from blockft.data.sample import Message, Sample
from blockft.data.shared_context import merge_shared_contexts
from blockft.digest import dump_with_digest
from blockft.errors import UserError
from tests.data.toys import rag_sample

SAMPLES, EXAMPLES_FILE = shard_files(0)


def write_folder(folder: Path, encoder: Encoder, *sources: list[list[Sample]], **entries: Any) -> None:
    """Write a prepared folder whose sources have one shard for each list of samples."""
    number = 0
    for shards in sources:
        for samples in shards:
            write_shard(folder, number, [build_shard_batch(samples, encoder.encode(samples))])
            number += 1
    finish_folder(folder, {"sources": [{"shards": len(shards)} for shards in sources], **entries})


def test_examples_are_read_back_as_written(tmp_path: Path, encoder: Encoder) -> None:
    samples = [rag_sample(f"Question {i}?", (f"doc {i // 2}",), id=f"é{i}") for i in range(14)]
    written = list(merge_shared_contexts(iter(encoder.encode(samples)), 500))
    assert len(written) == 7
    cuts = ((0, 3), (3, 4), (4, 4), (4, 7))
    batches = [build_shard_batch(samples[2 * i : 2 * j], written[i:j]) for i, j in cuts]
    write_shard(tmp_path, 0, batches[:2])
    write_shard(tmp_path, 1, batches[2:])
    finish_folder(tmp_path, {"fact": 1, "sources": [{"shards": 1}, {"shards": 0}, {"shards": 1}]})
    found = load_prepared(tmp_path)
    assert found.manifest["fact"] == 1 and len(found.manifest["content_hash"]) == 64
    for read, example in zip(found.examples, written, strict=True):
        assert read.input_ids.tolist() == example.input_ids.tolist()
        assert read.labels.tolist() == example.labels.tolist()
        assert (read.layout, read.sample_ids) == (example.layout, example.sample_ids)
    lines = [line for path in sorted(tmp_path.glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert [json.loads(line)["id"] for line in lines] == [sample.id for sample in samples]
    assert found.examples[-1].sample_ids == written[-1].sample_ids
    assert [example.sample_ids for example in found.examples[2:5]] == [e.sample_ids for e in written[2:5]]
    for index in (7, -8):
        with pytest.raises(IndexError):
            found.examples[index]


def test_columns_describe_the_examples(tmp_path: Path, encoder: Encoder) -> None:
    with_blocks, without = rag_sample("Who?", ("a", "b")), rag_sample("Who?", (), id="none")
    without = replace(without, messages=(Message(role="user", content=("Who is it?",)),))
    shared = [rag_sample(f"Question {i}?", ("one",)) for i in range(3)]
    (merged,) = merge_shared_contexts(iter(encoder.encode(shared)), 500)
    write_shard(
        tmp_path, 0, [build_shard_batch([with_blocks, without], encoder.encode([with_blocks, without]))]
    )
    write_shard(tmp_path, 1, [build_shard_batch(shared, [merged])])
    finish_folder(tmp_path, {"sources": [{"shards": 1}, {"shards": 1}]})
    examples = load_prepared(tmp_path).examples
    columns = examples.columns
    assert columns.lengths.tolist() == [len(example) for example in examples]
    assert columns.num_labels.tolist() == [int((e.labels != IGNORE_INDEX).sum()) for e in examples]
    assert columns.num_blocks.tolist() == [len(example.block_lengths) for example in examples] == [5, 1, 6]
    assert columns.has_local_blocks.tolist() == [e.layout != e.layout.full() for e in examples]
    assert columns.has_local_blocks.tolist()[:2] == [True, False]
    assert columns.max_token_ids.tolist() == [int(example.input_ids.max()) for example in examples]
    assert columns.sources.tolist() == [0, 0, 1]
    in_memory = ExampleColumns.of_examples([*examples])
    for field in fields(columns):
        if field.name != "sources":
            assert np.array_equal(getattr(in_memory, field.name), getattr(columns, field.name))


def test_opening_reads_no_token_ids(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of token ids are read when an example is, so that memory does not grow with their number."""
    write_folder(tmp_path, encoder, [[rag_sample("Who?" * 2_000)] * 200])
    size = (tmp_path / shard_files(0)[1]).stat().st_size
    assert size > 4_000_000
    allocated = pa.total_allocated_bytes()
    before = mapped_bytes(tmp_path)
    examples = Examples(tmp_path, [1])
    assert before == 0 and mapped_bytes(tmp_path) < size / 20
    assert pa.total_allocated_bytes() - allocated < size / 20
    for example in examples:
        example.input_ids.sum()
    assert mapped_bytes(tmp_path) > size / 2


def mapped_bytes(folder: Path) -> int:
    """Return how much of the mapped files of a folder is in memory."""
    total, is_below = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[:1] in "0123456789abcdef" and "-" in line.split()[0]:
            is_below = str(folder) in line
        elif is_below and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def damage_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace(old, new))


def flip_bit(path: Path, index: int) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a token": (lambda folder: flip_bit(folder / EXAMPLES_FILE, 2000), "00000.arrow has changed"),
    "the end of the examples": (
        lambda folder: flip_bit(folder / EXAMPLES_FILE, -1),
        "00000.arrow has changed",
    ),
    "shorter examples": (lambda folder: os.truncate(folder / EXAMPLES_FILE, 100), "100 bytes instead of"),
    "no examples": (lambda folder: (folder / EXAMPLES_FILE).unlink(), "00000.arrow is missing"),
    "a sample": (lambda folder: flip_bit(folder / SAMPLES, 30), "samples-00000.jsonl has changed"),
    "no samples": (lambda folder: (folder / SAMPLES).unlink(), "samples-00000.jsonl is missing"),
    "an option": (lambda folder: damage_manifest(folder, "user", "system"), "manifest.json has changed"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json is not a JSON object"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json is not JSON"),
    "no text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), "manifest.json is not JSON"),
    "no manifest": (lambda folder: (folder / MANIFEST).write_text(""), "manifest.json is not JSON"),
    "no keys": (lambda folder: (folder / MANIFEST).write_text("{}"), "manifest.json has no digest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_never_read(damage: str, tmp_path: Path, encoder: Encoder) -> None:
    sample = rag_sample("Question?", ("doc",))
    write_folder(tmp_path, encoder, [[sample]], documents_in="user")
    (tmp_path / ".DS_Store").touch()
    load_prepared(tmp_path)
    do_damage, reason = DAMAGES[damage]
    do_damage(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} is damaged .*{reason}.*prepare again with --overwrite"):
        load_prepared(tmp_path)


def test_examples_that_are_cut_while_they_are_mapped_are_an_error(tmp_path: Path, encoder: Encoder) -> None:
    """A read of what is no longer there would end the process with SIGBUS, without a word."""
    write_folder(tmp_path, encoder, [[rag_sample("Question?", ("doc",))]], documents_in="user")
    examples = load_prepared(tmp_path).examples
    expected, file = examples[0].input_ids.tolist(), tmp_path / EXAMPLES_FILE
    content = file.read_bytes()
    file.rename(tmp_path / "old")
    file.write_bytes(b"new")
    assert examples[0].input_ids.tolist() == expected, "another file of the same name is not the mapped one"
    (tmp_path / "old").rename(file)
    os.truncate(file, 100)
    with pytest.raises(UserError, match=rf"00000.arrow was cut to 100 bytes instead of {len(content)} while"):
        examples[0]
    file.unlink()


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(dump_with_digest({"version": 2}))
    with pytest.raises(UserError, match="has version 2 of the format, this blockft reads version 4"):
        load_prepared(tmp_path)
    # prepare may replace it
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "examples.arrow").touch()
    assert find_foreign_file(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["samples-00001.jsonl", "examples/00001.arrow", "examples/b.arrow", "notes.md"]
)
def test_a_file_that_was_added_is_named(name: str, tmp_path: Path) -> None:
    finish_folder(tmp_path, {"sources": []})
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name} was added .*: move that file elsewhere$"):
        load_prepared(tmp_path)


def test_an_incomplete_or_missing_folder_is_never_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="incomplete"):
        load_prepared(tmp_path)
    with pytest.raises(UserError, match="blockft prepare"):
        load_prepared(tmp_path / "none")
