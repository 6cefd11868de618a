import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockft.data.rag import RagPrompt
from blockft.data.sample import Sample, to_record
from blockft.data.sources import Tally, read
from blockft.errors import UserError
from tests.data.toys import rag_sample

PROMPT = RagPrompt(instruction="", document="{title}|{text}", question="{question}")
HOTPOTQA: dict[str, Any] = {
    "_id": "h1",
    "question": "who?",
    "answer": "the fox",
    "type": "bridge",
    "level": "easy",
    "supporting_facts": [["B", 0]],
    "context": [["B", ["One.", " Two."]], ["C", ["Three."]]],
}


def read_all(path: Path, format: str = "samples", **options: Any) -> tuple[list[Sample], Tally]:
    tally = Tally()
    found: Iterator[Sample] = read(format, str(path), tally, prompt=PROMPT, **options)
    return list(found), tally


def write(path: Path, record: Any) -> Path:
    path.write_text(json.dumps(record))
    return path


def test_hotpotqa(tmp_path: Path) -> None:
    (sample,), tally = read_all(write(tmp_path / "h.json", [HOTPOTQA]), "hotpotqa")
    assert sample.blocks == ("C|Three.", "B|One. Two.", "who?")
    assert (sample.id, sample.response, sample.answers) == ("h1", "the fox", ("the fox",))
    assert sample.meta == {"documents": [0, 1], "relevance": [0, 1], "type": "bridge", "level": "easy"}
    assert tally.read == 1


def test_hotpotqa_as_the_hub_spells_it(tmp_path: Path) -> None:
    columns = {
        "supporting_facts": {"title": ["B"], "sent_id": [0]},
        "context": {"title": ["B", "C"], "sentences": [["One.", " Two."], ["Three."]]},
    }
    path = write(tmp_path / "h.json", [HOTPOTQA | columns])
    assert read_all(path, "hotpotqa") == read_all(write(tmp_path / "g.json", [HOTPOTQA]), "hotpotqa")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"answer": 3}, "'answer'"),
        ({"context": "x"}, "'context'"),
        ({"context": [["B", "x"]]}, r"'context\[0\]'"),
        ({"supporting_facts": [1]}, "'supporting_facts'"),
        ({"_id": None}, "'_id'"),
    ],
)
def test_a_bad_record_names_file_line_and_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    path = write(tmp_path / "h.json", [HOTPOTQA, HOTPOTQA | change])
    with pytest.raises(UserError, match=f"{path}, line 1: .*{field}"):
        read_all(path, "hotpotqa")


def test_bad_records_can_be_skipped_and_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    good = json.dumps(to_record(rag_sample()))
    path.write_text(f'{good}\n{{"id": \n{good}\n{{"id": "x"}}\n')
    with pytest.raises(UserError, match=f"{path}, line 2: not JSON"):
        read_all(path)
    samples, tally = read_all(path, skip_bad=True)
    assert samples == [rag_sample(), rag_sample()]
    assert (tally.read, tally.dropped) == (4, {"bad record": 2})
    assert [bad.partition(": ")[0] for bad in tally.bad_records] == [f"{path}, line 2", f"{path}, line 4"]


def test_no_more_records_are_read_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(to_record(rag_sample())) + "\nbroken")
    samples, tally = read_all(path, max_samples=1)
    assert (len(samples), tally.read) == (1, 1)


@pytest.mark.real_data
def test_hotpotqa_as_published() -> None:
    path = Path(os.environ.get("BLOCKFT_REAL_DATA", "../shared/data")) / "hotpotqa_distractor_train.json"
    if not path.exists():
        pytest.skip(f"{path} is not there (set BLOCKFT_REAL_DATA)")
    samples, _ = read_all(path, "hotpotqa")
    records = json.loads(path.read_text(encoding="utf-8"))
    assert [sample.id for sample in samples] == [record["_id"] for record in records]
    for sample, record in zip(samples, records, strict=True):
        assert len(sample.documents) == len(record["context"])
        assert sum(sample.meta["relevance"]) == len({title for title, _ in record["supporting_facts"]})
