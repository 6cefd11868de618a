"""The synthetic source of the benchmark of `prepare`: deterministic records that are read as questions."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from blockft.bench import synthetic_source
from blockft.bench.synthetic_source import records, save_tokenizer, write_source
from blockft.data.qa_formats import parse_fid


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_source, "NUM_WORDS", 2_000)
    monkeypatch.setattr(synthetic_source, "VOCABULARY", 1_000)


def test_the_seed_decides_the_records() -> None:
    first = list(records(300, seed=1))
    assert first == list(records(300, seed=1)) and first[:5] != list(records(5, seed=2))
    assert len({record["id"] for record in first}) == 300


def test_a_record_is_a_question_whose_answer_stands_in_a_document() -> None:
    for record in records(20, seed=0):
        question = parse_fid(record)
        assert len(question.documents) == synthetic_source.NUM_DOCUMENTS
        assert all(100 <= len(document.text.split()) <= 150 for document in question.documents)
        assert any(question.answers[0] in document.text.lower() for document in question.documents)


def test_the_tokenizer_is_trained_on_the_source(tmp_path: Path) -> None:
    write_source(tmp_path / "source.jsonl", 10, seed=0)
    save_tokenizer(tmp_path / "tokenizer", tmp_path / "source.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = json.loads((tmp_path / "source.jsonl").read_text().splitlines()[0])["ctxs"][0]["text"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and len(tokenizer) == 1_000
