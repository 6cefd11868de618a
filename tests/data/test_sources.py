import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockft.config.choices import Format
from blockft.data.columns import Columns
from blockft.data.rag_prompt import RagPrompt
from blockft.data.sample import NO_EVIDENCE, Sample, sample_to_record
from blockft.data.sources import CONSTRUCTED, SOURCE_FORMATS, RecordCounts, read_samples
from blockft.data.sources import source_format as source_format_of
from blockft.errors import UserError
from tests.data.test_qa_formats import MUSIQUE
from tests.data.test_squad import article, rows
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


def read_all(path: Path, format: str = "samples", **options: Any) -> tuple[list[Sample], RecordCounts]:
    counts = RecordCounts()
    return list(read_samples(format, str(path), counts, **{"prompt": PROMPT} | options)), counts


def limited(num_documents: int) -> RagPrompt:
    return replace(PROMPT, num_documents=num_documents)


def write(path: Path, record: Any) -> Path:
    path.write_text(json.dumps(record))
    return path


def test_questions_become_samples(tmp_path: Path) -> None:
    (sample,), counts = read_all(write(tmp_path / "h.json", [HOTPOTQA]), "hotpotqa")
    assert sample.blocks == ("C|Three.", "B|One. Two.", "who?")
    assert (sample.id, sample.source, sample.response) == ("h1", "hotpotqa", "the fox")
    assert sample.answers == ("the fox",)
    assert sample.meta == {
        "documents": [0, 1],
        "relevance": [0, 1],
        "supporting": [1],
        "type": "bridge",
        "level": "easy",
    }
    assert (counts.read, counts.samples) == (1, 1)


def test_every_format_is_described_and_parses_either_questions_or_samples() -> None:
    assert set(SOURCE_FORMATS) == set(Format)
    for name, source_format in SOURCE_FORMATS.items():
        if name == "columns":
            source_format = source_format_of(name, Columns(question="q", answers=("a",)))
        assert (source_format.parse_question is None) != (source_format.parse_samples is None)
        assert source_format.description.endswith(".") and ". " not in source_format.description
        assert source_format.blocks and bool(source_format.record_shapes) == (name != CONSTRUCTED)
        assert all(shape.startswith("{") and shape.endswith("}") for shape in source_format.record_shapes)


def test_parquet_gives_the_same_samples(tmp_path: Path) -> None:
    texts = {name: json.dumps(HOTPOTQA[name]) for name in ("context", "supporting_facts")}
    pq.write_table(pa.Table.from_pylist([HOTPOTQA | texts] * 3), tmp_path / "h.parquet")
    path = write(tmp_path / "h.json", [HOTPOTQA] * 3)
    assert read_all(tmp_path / "h.parquet", "2wikimultihopqa") == read_all(path, "2wikimultihopqa")
    flat = {name: [row[name] for row in rows() + rows("B")] for name in rows()[0]}
    pq.write_table(pa.table(flat), tmp_path / "s.parquet")
    nested = read_all(
        write(tmp_path / "s.json", {"version": "1", "data": [article(), article("B")]}), "squad"
    )
    assert read_all(tmp_path / "s.parquet", "squad") == nested and nested[1].read == 20
    (tmp_path / "s.json").write_text("\n".join(map(json.dumps, rows() + rows("B"))))
    assert read_all(tmp_path / "s.json", "squad") == nested


def fid_record(n: int, answer: str) -> dict[str, Any]:
    context = {"title": f"T{n}", "text": f"Number {n} is {answer}.", "isgold": True}
    return {"question": f"number {n}?", "answers": [answer], "ctxs": [context]}


def test_fid_distractors_come_from_the_whole_source(tmp_path: Path) -> None:
    records = [fid_record(n, answer) for n, answer in enumerate(("red", "blue", "green", "red"))]
    for part, two in (("a", records[:2]), ("b", records[2:])):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, two)))
    samples, counts = read_all(tmp_path, "fid", prompt=limited(3), retriever="bm25", max_samples=3)
    assert [s.id for s in samples] == [f"{tmp_path.stem}-{n}" for n in (1, 2, 3)]
    assert [{text[:2] for text in s.blocks[:-1]} for s in samples] == [
        {"T0", "T1", "T2"},
        {"T1", "T0", "T2"},
        {"T2", "T0", "T1"},
    ]
    for sample in samples:
        assert sample.meta["relevance"] == sorted(sample.meta["relevance"])
        assert sample.meta["supporting"] == [2]
    assert (counts.read, counts.samples) == (3, 3)
    assert read_all(tmp_path, "fid", prompt=limited(3), retriever="bm25", max_samples=3)[0] == samples


def test_a_bad_record_is_bad_for_the_pool_too(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(fid_record(0, "red")) + "\nbroken\n" + json.dumps(fid_record(1, "blue")))
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_all(path, "fid", prompt=limited(3), retriever="bm25", max_samples=1)
    samples, counts = read_all(path, "fid", prompt=limited(3), retriever="bm25", skip_bad=True)
    assert [len(sample.documents) for sample in samples] == [2, 2]
    assert (counts.read, counts.samples, counts.dropped) == (3, 2, {"bad record": 1})


def test_squad_questions_share_sets_of_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", {"data": [article(), article("B")]})
    samples, counts = read_all(path, "squad", prompt=replace(limited(3), shared_context=True))
    contexts = [sample.blocks[:-1] for sample in samples]
    assert contexts == sorted(contexts, key=contexts.index) and len(set(contexts)) < 6
    assert counts.read == 20 == counts.samples + counts.dropped.total()
    assert set(counts.dropped) <= {"answer in another document of its set"}


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("samples", {"retriever": "bm25"}, "samples holds no documents"),
        ("fid", {"retriever": "bm25"}, "set data.num_documents"),
        ("squad", {"retriever": "bm25"}, "set data.num_documents"),
        ("squad", {"retriever": "bm25", "prompt": replace(PROMPT, shared_context=True)}, "set data.num_doc"),
    ],
)
def test_contradicting_options_are_refused_before_reading(
    tmp_path: Path, format: str, options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "x.json", [])
    with pytest.raises(UserError, match=message):
        read_samples(format, str(path), RecordCounts(), **{"prompt": PROMPT} | options)


def test_questions_without_evidence_are_dropped_unless_it_is_not_needed(tmp_path: Path) -> None:
    without = HOTPOTQA | {"context": [["C", ["Three."]]]}
    path = write(tmp_path / "h.json", [HOTPOTQA, without, HOTPOTQA | {"context": []}])
    samples, counts = read_all(path, "hotpotqa")
    assert (len(samples), counts.dropped) == (1, {"no supporting document": 2})
    templated = {"prompt": "- Title: A\nOne.\nWho?", "generated": "x"}
    documents = [{"title": "A", "text": "One.", "hasanswer": False}]
    other = write(tmp_path / "b.jsonl", templated | {"documents": documents})
    assert read_all(other, "blocks")[1].dropped == {"no supporting document": 1}
    assert len(read_all(other, "blocks", needs_evidence=False)[0]) == 1
    asked, counts = read_all(path, "hotpotqa", needs_evidence=False)
    assert [len(sample.documents) for sample in asked] == [2, 1, 0] and not counts.dropped


def test_a_bad_record_of_another_format_in_a_glob_is_recognised(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", HOTPOTQA)
    write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    match = "b.jsonl, line 1: .*; it looks like the format messages .*on_bad_record=skip passes over it"
    with pytest.raises(UserError, match=match):
        read_all(tmp_path, "hotpotqa")


def test_parquet_columns_of_any_type_are_read_or_refused_by_name(tmp_path: Path) -> None:
    rows = {
        "question": pa.array(["who?"], pa.large_string()),
        "answers": pa.array([["fox"]], pa.large_list(pa.large_string())),
        "id": pa.array([262], pa.int16()),
        "target": pa.nulls(1),
        "dataset": pa.array(["x"]).dictionary_encode(),
        "weight": pa.nulls(1, pa.float64()),
        "ctxs": pa.array([[{"title": None, "text": "A fox.", "score": None, "isgold": None}]]),
    }
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table(rows), path)
    (sample,), counts = read_all(path, "fid")
    assert (sample.id, sample.response, len(sample.documents)) == ("262", "fox", 1)
    assert not counts.unknown_fields
    for name, column in (
        ("question", pa.array([b"\xff"], pa.binary())),
        ("id", pa.array([262.0])),
        ("answers", pa.array([[b"fox"]])),
    ):
        pq.write_table(pa.table(rows | {name: column}), path)
        with pytest.raises(UserError, match=f"row 1: field '{name}.* passes over it"):
            read_all(path, "fid")


def test_every_record_gives_a_sample_or_is_dropped_for_a_reason(tmp_path: Path) -> None:
    records = [MUSIQUE, MUSIQUE | {"answerable": False}, MUSIQUE | {"answer": 1}]
    samples, counts = read_all(write(tmp_path / "m.json", records), "musique", skip_bad=True)
    assert (counts.read, counts.samples, len(samples)) == (3, 1, 1)
    assert counts.dropped == {"no answer": 1, "bad record": 1}


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


@pytest.mark.parametrize("format", ["samples", "squad", "alpaca"])
def test_the_error_of_a_bad_first_record_asks_for_the_format(tmp_path: Path, format: str) -> None:
    where, remedy = r"\(--format, sources\[\].format\)", r" \(data.on_bad_record=skip passes over it\)$"
    path = write(tmp_path / "h.json", [HOTPOTQA])
    with pytest.raises(UserError, match=f"line 1: .*; it looks like the format hotpotqa {where}{remedy}"):
        read_all(path, format)
    write(path, [{"a": 1}])
    with pytest.raises(UserError, match=rf"line 1: .*; is it in the format {format} {where}\?{remedy}"):
        read_all(path, format)


def test_a_gzipped_source_gives_the_same_samples(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(fid_record(n, "red")) for n in range(3))
    (tmp_path / "f.jsonl").write_text(text)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert read_all(tmp_path / "f.jsonl", "fid") == read_all(tmp_path / "f.jsonl.gz", "fid")


def test_bad_records_can_be_skipped_and_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    good = json.dumps(sample_to_record(rag_sample()))
    path.write_text(f'{good}\n{{"id": \n{good}\n{{"id": "x"}}\n')
    with pytest.raises(
        UserError, match=rf"{path}, line 2: not JSON .*\(data.on_bad_record=skip passes over it\)"
    ):
        read_all(path)
    samples, counts = read_all(path, skip_bad=True)
    assert samples == [rag_sample(), rag_sample()]
    assert (counts.read, counts.dropped) == (4, {"bad record": 2})
    assert [bad.partition(": ")[0] for bad in counts.bad_records] == [f"{path}, line 2", f"{path}, line 4"]


def test_the_first_records_that_are_dropped_for_a_reason_are_listed(tmp_path: Path) -> None:
    records = [
        fid_record(n, "red") | {"id": f"id{n}", "question": f"what?\n{'very ' * 99}"} for n in range(6)
    ]
    for record in records[1:]:
        record["ctxs"][0]["isgold"] = False
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    samples, counts = read_all(path, "fid")
    examples = counts.drop_examples[NO_EVIDENCE]
    assert len(samples) == 1 and counts.dropped == {NO_EVIDENCE: 5} and len(examples) == 3
    for number, example in enumerate(examples, start=2):
        assert example.startswith(f"{path}, line {number}: ") and f"id{number - 1}" in example
        assert "what? very" in example and len(example) < 240 and "\n" not in example
    again = RecordCounts()
    again.merge(counts)
    again.merge(counts)
    assert again.drop_examples == counts.drop_examples and again.dropped == {NO_EVIDENCE: 10}


def test_at_most_max_samples_records_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(sample_to_record(rag_sample())) + "\nbroken")
    samples, counts = read_all(path, max_samples=1)
    assert (len(samples), counts.read) == (1, 1)


@pytest.mark.parametrize("format", ["fid", "squad", "messages"])
def test_skip_and_max_samples_divide_a_file_into_disjoint_parts(tmp_path: Path, format: str) -> None:
    path = tmp_path / "all.jsonl"
    chat = [{"messages": [{"role": r, "content": f"{n}"} for r in ("user", "assistant")]} for n in range(5)]
    records: list[Any] = {
        "fid": [fid_record(n, "red") for n in range(5)],
        "squad": [article()],
        "messages": chat,
    }[format]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {} if format == "messages" else {"retriever": "bm25", "prompt": limited(3)}
    everything, counts = read_all(path, format, **options)
    (first, one), (second, two) = (
        read_all(path, format, **options, **part) for part in ({"max_samples": 2}, {"skip_samples": 2})
    )
    assert first + second == everything and len(first) == 2
    assert (one.read, two.read) == (2, counts.read - 2)
    few, last = read_all(path, format, **options, skip_samples=1, max_samples=2)
    assert few == everything[1:3] and last.read == 2
    assert read_all(path, format, **options, skip_samples=counts.read) == ([], RecordCounts())


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
