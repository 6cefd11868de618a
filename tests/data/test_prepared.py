from pathlib import Path

import pytest

from blockft.data import prepared
from blockft.data.encoder import Encoder
from blockft.data.prepared import PreparedWriter, load_prepared
from blockft.data.shared_context import merge_shared_contexts
from blockft.errors import UserError
from tests.data.toys import rag_sample


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


def test_an_incomplete_or_missing_folder_is_never_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="incomplete"):
        load_prepared(tmp_path)
    with pytest.raises(UserError, match="blockft prepare"):
        load_prepared(tmp_path / "none")
