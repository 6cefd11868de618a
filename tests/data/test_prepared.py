import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockft.data import prepared
from blockft.data.encoder import Encoder
from blockft.data.prepared import EXAMPLES, MANIFEST, PreparedWriter, load_prepared
from blockft.data.shared_context import merge_shared_contexts
from blockft.digest import dump_with_digest
from blockft.errors import UserError
from tests.data.toys import rag_sample

SAMPLES = "samples-00000.jsonl"


def test_examples_are_read_back_as_written(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "BATCH_EXAMPLES", 3)
    monkeypatch.setattr(prepared, "SHARD_SAMPLES", 4)
    samples = [rag_sample(f"Question {i}?", (f"doc {i // 2}",)) for i in range(14)]
    written = list(merge_shared_contexts(iter(encoder.encode(samples)), 500))
    with PreparedWriter(tmp_path) as writer:
        for sample in samples:
            writer.add_sample(sample)
        for example in written:
            writer.add_example(example)
        writer.finish({"fact": 1})
    found = load_prepared(tmp_path)
    assert found.manifest["fact"] == 1 and len(found.manifest["content_hash"]) == 64
    assert len(found.examples) == len(written) == 7
    for read, example in zip(found.examples, written, strict=True):
        assert read.input_ids.tolist() == example.input_ids.tolist()
        assert read.labels.tolist() == example.labels.tolist()
        assert (read.layout, read.sample_ids) == (example.layout, example.sample_ids)
    assert [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("*.jsonl"))] == [4, 4, 4, 2]
    assert found.examples[-1].sample_ids == written[-1].sample_ids
    with pytest.raises(IndexError):
        found.examples[7]


def damage_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace(old, new))


def flip_bit(path: Path, index: int) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a token": (lambda folder: flip_bit(folder / EXAMPLES, 2000), "examples.arrow has changed"),
    "the end of the examples": (lambda folder: flip_bit(folder / EXAMPLES, -1), "examples.arrow has changed"),
    "shorter examples": (lambda folder: os.truncate(folder / EXAMPLES, 100), "100 bytes instead of"),
    "no examples": (lambda folder: (folder / EXAMPLES).unlink(), "examples.arrow is missing"),
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
    with PreparedWriter(tmp_path) as writer:
        writer.add_sample(sample)
        writer.add_example(*encoder.encode([sample]))
        writer.finish({"documents_in": "user"})
    (tmp_path / ".DS_Store").touch()
    load_prepared(tmp_path)
    do_damage, reason = DAMAGES[damage]
    do_damage(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} is damaged .*{reason}.*prepare again with --overwrite"):
        load_prepared(tmp_path)


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(dump_with_digest({"version": 1}))
    with pytest.raises(UserError, match="has version 1 of the format, this blockft reads version 2"):
        load_prepared(tmp_path)


@pytest.mark.parametrize("name", ["samples-00001.jsonl", "examples/b.arrow", "notes.md"])
def test_a_file_that_was_added_is_named(name: str, tmp_path: Path) -> None:
    with PreparedWriter(tmp_path) as writer:
        writer.finish({})
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name} was added .*: move that file elsewhere$"):
        load_prepared(tmp_path)


def test_an_incomplete_or_missing_folder_is_never_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="incomplete"):
        load_prepared(tmp_path)
    with pytest.raises(UserError, match="blockft prepare"):
        load_prepared(tmp_path / "none")
