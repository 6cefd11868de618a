import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from blockft.data.columns import Columns, build_columns
from blockft.data.corpus import read_corpus
from blockft.data.rag_prompt import RagPrompt
from blockft.data.sample import Sample
from blockft.data.sources import RecordCounts, read_samples
from blockft.errors import UserError

MAPPING = build_columns({"question": "question", "answers": "golden_answers"})
CORPUS = [
    {"id": "1", "title": "Comet", "content": "Ina Orr found the comet."},
    {"id": "2", "title": "Sun", "content": "The sun is warm."},
    {"id": "3", "title": "Comets", "content": "A comet is cold."},
    {"id": "4", "title": "Empty", "content": ""},
]
QUESTIONS = [
    {"question": "Who found the comet?", "golden_answers": ["Ina Orr"]},
    {"question": "What is the sun?", "golden_answers": ["warm"]},
    {"question": "Is the comet cold?", "golden_answers": ["nobody knows"]},
]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(
    tmp_path: Path, corpus: str | Path, mapping: Columns = MAPPING, records: Any = QUESTIONS, **options: Any
) -> tuple[list[Sample], RecordCounts]:
    path = write(tmp_path / "q.jsonl", records)
    prompt = RagPrompt(instruction="", document="{title}|{text}", question="{question}", num_documents=2)
    counts = RecordCounts()
    given: dict[str, Any] = {"retriever": "bm25", "prompt": prompt} | options
    return list(
        read_samples("columns", str(path), counts, columns=mapping, corpus=str(corpus), **given)
    ), counts


def test_questions_get_the_best_documents_and_those_with_the_answer_support_it(tmp_path: Path) -> None:
    samples, counts = read(tmp_path, write(tmp_path / "corpus.jsonl", CORPUS))
    assert [sample.blocks for sample in samples] == [
        ("Sun|The sun is warm.", "Comet|Ina Orr found the comet.", "Who found the comet?"),
        ("Comets|A comet is cold.", "Sun|The sun is warm.", "What is the sun?"),
    ]
    assert [sample.meta["supporting"] for sample in samples] == [[1], [1]]
    assert counts.read == 3 and counts.dropped == {"no retrieved document contains the answer": 1}
    assert counts.drop_examples == {"no retrieved document contains the answer": ["q-3: Is the comet cold?"]}
    asked, counts = read(tmp_path, tmp_path / "corpus.jsonl", needs_evidence=False)
    assert len(asked) == 3 and not counts.dropped and len(asked[2].documents) == 2


def test_documents_of_a_question_stay_and_the_corpus_gives_distractors(tmp_path: Path) -> None:
    records = [QUESTIONS[0] | {"docs": [{"title": "Own", "text": "Orr, Ina."}]}, QUESTIONS[1] | {"docs": []}]
    mapping = build_columns(
        {
            "question": "question",
            "answers": "golden_answers",
            "documents": "docs",
            "text": ["text", "content"],
        }
    )
    samples, counts = read(tmp_path, write(tmp_path / "corpus.jsonl", CORPUS), mapping, records)
    assert {*samples[0].blocks[:-1]} == {"Own|Orr, Ina.", "Sun|The sun is warm."}
    # the second question has no documents of its own
    assert samples[1].blocks[-2] == "Sun|The sun is warm." and not counts.dropped


def test_a_corpus_is_a_file_a_folder_or_a_glob_of_any_kind(tmp_path: Path) -> None:
    expected = [
        document.text for document in read_corpus(str(write(tmp_path / "c.jsonl", CORPUS)), MAPPING, None)
    ]
    assert expected == [record["content"] for record in CORPUS[:3]]
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder / "a.jsonl", CORPUS[:1])
    (folder / "b.tsv").write_text("id\ttext\ttitle\n2\tThe sun is warm.\tSun\n")
    with pa.output_stream(str(folder / "c.jsonl.zst"), compression="zstd") as file:
        file.write("".join(json.dumps({"contents": r["content"]}) + "\n" for r in CORPUS[2:]).encode())
    for path in (folder, f"{folder}/*"):
        assert [document.text for document in read_corpus(str(path), MAPPING, None)] == expected


def test_the_columns_name_the_fields_of_a_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"body": {"t": "One."}, "name": "A", "text": "no"}])
    mapping = build_columns({"question": "q", "answers": "a", "title": "name", "text": "body.t"})
    (document,) = read_corpus(str(path), mapping, None)
    assert (document.title, document.text) == ("A", "One.")


def test_a_bad_document_is_an_error_or_skipped_and_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [CORPUS[0], {"id": "x", "txt": "One."}, {"text": 1.5}, *CORPUS[1:]])
    with pytest.raises(
        UserError, match=r"corpus .*c\.jsonl, line 2: field text or contents or content of columns\.text"
    ):
        read(tmp_path, path)
    with pytest.raises(UserError, match=r"did you mean txt\?"):
        read(tmp_path, path)
    samples, counts = read(tmp_path, path, skip_bad=True)
    assert len(samples) == 2 and [bad.partition(":")[0] for bad in counts.bad_records] == [
        f"corpus {path}, line {line}" for line in (2, 3)
    ]
    assert "bad record" not in counts.dropped


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("none.jsonl", r"corpus .*none\.jsonl does not exist: no file, folder or match of a glob$"),
        ("folder", r"corpus folder .* holds no file that ends in"),
        ("owner/name", "corpus owner/name does not exist"),
        ("empty.jsonl", "holds no documents"),
    ],
)
def test_a_corpus_that_holds_nothing_is_refused(tmp_path: Path, corpus: str, message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    path = corpus if "/" in corpus else tmp_path / corpus
    with pytest.raises(UserError, match=message):
        read(tmp_path, path)


def test_a_corpus_needs_the_number_of_documents(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", CORPUS)
    with pytest.raises(UserError, match="set data.num_documents"):
        read(tmp_path, corpus, prompt=RagPrompt())
