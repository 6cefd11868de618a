"""Public layouts: the names of the fields are those that were published, the contents are invented."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockft.config.recipe import build_recipe
from blockft.data.layouts import LAYOUTS, Layout, format_columns, suggest_columns
from blockft.data.sample import Sample
from blockft.data.sources import RecordCounts
from blockft.errors import UserError
from blockft.stages.source_settings import read_source

RECORDS: dict[str, list[dict[str, Any]]] = {
    "TriviaQA (`rc`)": [
        {
            "question": "Which river runs through Tarn?",
            "question_id": "tc_1",
            "question_source": "http://quiz.example/",
            "answer": {
                "value": "The Oder",
                "aliases": ["Oder", "River Oder"],
                "normalized_aliases": ["oder", "river oder"],
                "normalized_value": "oder",
                "matched_wiki_entity_name": "",
                "type": "WikipediaEntity",
            },
            "search_results": {
                "title": ["Tarn", "Rivers"],
                "search_context": ["The Oder runs through Tarn.", "Rivers are long."],
                "description": ["a", "b"],
                "filename": ["1.txt", "2.txt"],
                "rank": [0, 1],
                "url": ["http://a.example", "http://b.example"],
            },
            "entity_pages": {
                "title": ["Oder"],
                "wiki_context": ["A river."],
                "doc_source": ["TagMe"],
                "filename": ["Oder.txt"],
            },
        }
    ],
    "MS MARCO 2.1": [
        {
            "query": "how tall is the tower",
            "query_id": 7,
            "query_type": "NUMERIC",
            "answers": ["40 metres", "40 m"],
            "wellFormedAnswers": [],
            "passages": {
                "is_selected": [0, 1],
                "passage_text": ["Towers are tall.", "The tower has 40 metres."],
                "url": ["http://a.example", "http://b.example"],
            },
        },
        {
            "query": "who built it",
            "query_id": 8,
            "query_type": "PERSON",
            "answers": ["No Answer Present."],
            "wellFormedAnswers": [],
            "passages": {
                "is_selected": [0],
                "passage_text": ["Towers are tall."],
                "url": ["http://a.example"],
            },
        },
    ],
    "KILT with passages": [
        {
            "id": "k1",
            "input": "Who wrote the song?",
            "output": [
                {
                    "answer": "Ann Lee",
                    "meta": {"score": 2},
                    "provenance": [
                        {"wikipedia_id": "1", "title": "Song", "text": "Ann Lee wrote it."},
                        {"wikipedia_id": "2", "title": "Ann Lee", "text": "A writer."},
                    ],
                },
                {
                    "answer": "A. Lee",
                    "meta": {"score": 1},
                    "provenance": [{"wikipedia_id": "1", "title": "Song", "text": "Ann Lee wrote it."}],
                },
                {"answer": None, "meta": {"score": 0}, "provenance": []},
            ],
            "meta": {"left_context": ""},
        }
    ],
    "RAFT": [
        {
            "id": "seed_task_0",
            "type": "general",
            "question": "What is the limit?",
            "context": {
                "sentences": [["The limit is 5.", "There is a door.", "Rain falls."]],
                "title": [["placeholder_title"] * 3],
            },
            "oracle_context": "The limit is 5.",
            "cot_answer": "##Reason: It says so. ##Answer: 5",
            "instruction": "<DOCUMENT>The limit is 5.</DOCUMENT>\nWhat is the limit?",
        }
    ],
    "MRQA": [
        {
            "id": "",
            "context": "Mia has a fox. Tom has a dog.",
            "context_tokens": [{"token": "Mia", "offset": 0}],
            "qas": [
                {
                    "qid": "q-1",
                    "question": "Who has a fox?",
                    "answers": ["Mia"],
                    "detected_answers": [{"text": "Mia", "char_spans": [{"start": 0}]}],
                },
                {
                    "qid": "q-2",
                    "question": "Who has a dog?",
                    "answers": ["Tom"],
                    "detected_answers": [{"text": "Tom", "char_spans": [{"start": 15}]}],
                },
            ],
        }
    ],
    "KVLink": [
        {
            "question": "Where is it?",
            "answers": ["Bern", "in Bern"],
            "generated": "It is in Bern.",
            "documents": [
                {"title": "Bern", "text": "It is in Bern.", "score": 1.5},
                {"title": "Rome", "text": "Old.", "score": 0.5},
            ],
        }
    ],
    "FlashRAG, with `corpus` and `retriever`": [
        {
            "id": "test_0",
            "question": "Who found the comet?",
            "golden_answers": ["Ina Orr", "Orr"],
            "metadata": {"type": "person"},
        }
    ],
    "Dolly": [
        {
            "instruction": "Name the colour.",
            "context": "The car is red.",
            "response": "Red",
            "category": "closed_qa",
        },
        {"instruction": "Say hello.", "context": "", "response": "Hello", "category": "general_qa"},
    ],
    "TRL (texts or lists of messages)": [
        {"prompt": "The sky is", "completion": " blue."},
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hey"},
                {"role": "user", "content": "Who?"},
            ],
            "completion": [{"role": "assistant", "content": "The fox"}],
        },
    ],
    "a table (CSV, TSV, parquet)": [
        {
            "q": "Which?",
            "a": "one",
            "passage_1": "It is one.",
            "passage_2": "No.",
            "passage_10": None,
            "n": "x",
        },
        {
            "q": "What?",
            "a": "ten",
            "passage_1": "No.",
            "passage_2": "Yes.",
            "passage_10": "It is ten.",
            "n": "y",
        },
    ],
}
CORPUS = [
    {"title": "Comet", "content": "Ina Orr found the comet."},
    {"title": "Sun", "content": "The sun is warm."},
    {"title": "Who", "content": "Who is who?"},
]
EXPECTED: dict[str, list[tuple[str, tuple[str, ...], str, list[str]]]] = {
    "TriviaQA (`rc`)": [
        (
            "tc_1",
            ("The Oder", "Oder", "River Oder"),
            "The Oder",
            ["Oder|A river.", "Rivers|Rivers are long.", "Tarn|The Oder runs through Tarn."],
        )
    ],
    "MS MARCO 2.1": [
        ("r-1", ("40 metres", "40 m"), "40 metres", ["Towers are tall.", "*The tower has 40 metres."])
    ],
    "KILT with passages": [
        ("k1", ("Ann Lee", "A. Lee"), "Ann Lee", ["Ann Lee|A writer.", "Song|Ann Lee wrote it."])
    ],
    "RAFT": [
        (
            "r-1",
            (),
            "##Reason: It says so. ##Answer: 5",
            ["There is a door.", "Rain falls.", "*The limit is 5."],
        )
    ],
    "MRQA": [
        ("q-1", ("Mia",), "Mia", ["Mia has a fox. Tom has a dog."]),
        ("q-2", ("Tom",), "Tom", ["Mia has a fox. Tom has a dog."]),
    ],
    "KVLink": [("r-1", ("Bern", "in Bern"), "It is in Bern.", ["Rome|Old.", "Bern|It is in Bern."])],
    "FlashRAG, with `corpus` and `retriever`": [
        ("test_0", ("Ina Orr", "Orr"), "Ina Orr", ["Who|Who is who?", "*Comet|Ina Orr found the comet."])
    ],
    "Dolly": [
        ("r-1", (), "Red", ["Name the colour.\n\nThe car is red."]),
        ("r-2", (), "Hello", ["Say hello."]),
    ],
    "TRL (texts or lists of messages)": [
        ("r-1", (), "blue.", ["The sky is"]),
        ("r-2#2", (), "The fox", ["Be brief.", "Hi", "Hey", "Who?"]),
    ],
    "a table (CSV, TSV, parquet)": [
        ("r-1", ("one",), "one", ["No.", "It is one."]),
        ("r-2", ("ten",), "ten", ["It is ten.", "Yes.", "No."]),
    ],
}
"""The id, the answers, the response and the blocks of each sample. A star marks a document that supports."""

NAMES = [layout.name for layout in LAYOUTS]


def read(path: Path, setting: str, *overrides: str) -> tuple[list[Sample], RecordCounts]:
    """Read a source whose settings, apart from its path, are YAML in one line."""
    given = {
        "model": {"path": "m"},
        "data": {
            "output_dir": "o",
            "sources": [{"format": "columns", "path": str(path)}],
            "prompt": {"instruction": "Read.", "document": "{title}|{text}", "question": "{question}"},
        },
        "train": {"output_dir": "t"},
    }
    source = f"data.sources=[{{format: columns, path: {path}{setting and f', {setting}'}}}]"
    recipe = build_recipe(given, [source, *overrides], "test")
    counts = RecordCounts()
    return list(read_source(recipe.data.sources[0], recipe.data, counts)), counts


def shown(sample: Sample) -> tuple[str, tuple[str, ...], str, list[str]]:
    """Return the parts of a sample in the form of `EXPECTED`."""
    supporting = sample.meta.get("supporting", [])
    if sample.documents:
        blocks = ["*" * (d in supporting) + sample.blocks[d].lstrip("|") for d in sample.documents]
    else:
        blocks = list(sample.blocks)
    return sample.id, sample.answers, sample.response, blocks


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    header = [{"header": {"dataset": "x", "split": "dev"}}] if "qas" in records[0] else []
    path.write_text("".join(json.dumps(record) + "\n" for record in [*header, *records]))
    return path


def corpus_setting(layout: Layout, folder: Path) -> tuple[str, list[str]]:
    """Return the settings that a layout with documents apart needs besides its columns."""
    if not layout.corpus:
        return "", []
    corpus = write_records(folder / "corpus.json", CORPUS)
    return f", corpus: {corpus}, retriever: bm25", ["data.num_documents=2"]


def test_every_layout_has_records_here() -> None:
    assert {*RECORDS} == {*EXPECTED} == {*NAMES} and len(NAMES) == 10


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_public_layout_is_read(tmp_path: Path, layout: Layout) -> None:
    path = write_records(tmp_path / "r.jsonl", RECORDS[layout.name])
    more, overrides = corpus_setting(layout, tmp_path)
    fitting = suggest_columns(RECORDS[layout.name][0])
    fitting = fitting.replace(", corpus: FILE_OF_DOCUMENTS, retriever: bm25", "")
    samples, counts = read(path, f"columns: {fitting}{more}", *overrides)
    assert [shown(sample) for sample in samples] == EXPECTED[layout.name]
    assert counts.dropped == ({"no answer": 1} if layout.name == "MS MARCO 2.1" else {})
    assert not counts.bad_records
    # the columns that the documentation shows
    assert read(path, f"columns: {format_columns(layout.columns)}{more}", *overrides) == (samples, counts)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_parquet_gives_the_same_samples(tmp_path: Path, layout: Layout) -> None:
    records = RECORDS[layout.name]
    if layout.name.startswith("TRL"):
        records = records[1:]
    path = write_records(tmp_path / "r.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "r.parquet")
    more, overrides = corpus_setting(layout, tmp_path)
    setting = f"columns: {format_columns(layout.columns)}{more}"
    expected, expected_counts = read(path, setting, *overrides)
    samples, counts = read(tmp_path / "r.parquet", setting, *overrides)
    assert samples == expected and counts.dropped == expected_counts.dropped


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_give_the_same_samples(tmp_path: Path, suffix: str) -> None:
    for name in ("a table (CSV, TSV, parquet)", "Dolly"):
        records, expected = RECORDS[name], EXPECTED[name]
        with (tmp_path / f"r.{suffix}").open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
        columns = next(layout.columns for layout in LAYOUTS if layout.name == name)
        samples, _ = read(tmp_path / f"r.{suffix}", f"columns: {format_columns(columns)}")
        assert [shown(sample) for sample in samples] == expected


def suggestion_of(message: str) -> str:
    """Return the settings that an error offers."""
    start = message.index("columns: {")
    end = message.find(" (data.on_bad_record=skip", start)
    return message[start : end if end >= 0 else None]


@pytest.mark.parametrize("format", ["columns", "fid", "messages", "hotpotqa", "samples"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_the_columns_that_an_error_offers_read_the_file(tmp_path: Path, layout: Layout, format: str) -> None:
    path = write_records(tmp_path / "r.jsonl", RECORDS[layout.name])
    with pytest.raises(UserError) as raised:
        read(path, "", f"data.sources.0.format={format}")
    message = str(raised.value)
    assert "\n" not in message and ("; the record has the fields " in message or layout.name == "MRQA")
    setting = suggestion_of(message)
    if layout.corpus:
        corpus_setting(layout, tmp_path)
        setting = setting.replace("FILE_OF_DOCUMENTS", str(tmp_path / "corpus.json"))
    samples, _ = read(path, setting, "data.num_documents=2")
    assert [sample.response for sample in samples] == [
        response for _, _, response, _ in EXPECTED[layout.name]
    ]


OTHERS: list[tuple[dict[str, Any], str]] = [
    (
        {"user_input": "q?", "retrieved_contexts": ["a b", "c"], "reference": "a", "response": "b"},
        "{question: user_input, documents: retrieved_contexts, answers: reference}",
    ),
    (
        {"Question": "q?", "Answer": "a", "Context": "a b"},
        "{question: Question, documents: Context, answers: Answer}",
    ),
    (
        {
            "id": 3,
            "query": "q?",
            "answer": "a",
            "docs": [{"page_content": "a", "heading": "A", "similarity": 0.5}],
        },
        "{id: id, question: query, documents: docs, title: heading, text: page_content, score: similarity, "
        "answers: answer}",
    ),
    (
        {"question": "q?", "answers": "['a', 'b']", "contexts": "['a c', 'd']"},
        '{question: question, documents: "contexts[]", answers: "answers[]"}',
    ),
    (
        {"question": "q?", "answer": "a", "chunks": [{"body": "a", "is_relevant": True}, {"body": "b"}]},
        "{question: question, documents: chunks, text: body, supporting: is_relevant, answers: answer}",
    ),
    ({"q": "q?", "a": "x", "doc 1": "x", "doc 2": "y"}, '{question: q, documents: "doc *", answers: a}'),
    ({"user": "Hi", "assistant": "Hey"}, "{prompt: user, completion: assistant}"),
    (
        {"chat": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}], "system": "s"},
        "{messages: chat, system: system}",
    ),
    (
        {
            "question": {"text": "q?"},
            "context": {"contexts": ["a b"]},
            "answers": [{"text": "a"}, {"text": "b"}],
        },
        "{question: question.text, documents: context, text: contexts, answers: answers.text}",
    ),
    (
        {"context": "a b", "question": "q?", "answers": "{'text': ['a'], 'answer_start': [0]}"},
        "{question: question, documents: context, answers: answers.text}",
    ),
    (
        {"query": "q?", "answer": ["a"], "positive": ["a b"], "negative": ["c"]},
        "{question: query, documents: [positive, negative], supporting: positive, answers: answer}",
    ),
    (
        {"system_prompt": "s", "question": "Hi", "response": "Hey"},
        "{prompt: question, completion: response, system: system_prompt}",
    ),
    (
        {
            "prompt": '[{"role": "user", "content": "Hi"}]',
            "completion": '[{"role": "assistant", "content": "a"}]',
        },
        '{prompt: "prompt[]", completion: "completion[]"}',
    ),
    (
        {
            "query": "q?",
            "answers": ["a"],
            "positive_passages": [{"text": "a"}],
            "negative_passages": [{"text": "b"}],
        },
        "{question: query, documents: [positive_passages, negative_passages], answers: answers}",
    ),
    (
        {"question": "q?", "golden_answers": ["a"], "retrieval_result": [{"content": "a"}]},
        "{question: question, documents: retrieval_result, text: content, answers: golden_answers}",
    ),
    (
        {"instruction": "i", "input": "n", "output": "a"},
        "{prompt: [instruction, input], completion: output}",
    ),
    ({"a": 1}, ""),
    ({"question": "q?"}, ""),
    ({"question": "q?", "answer": "a", "context": ["a", ["b"]]}, ""),
    ({"question": "q?", "answer": 1.5, "context": "c"}, ""),
]


@pytest.mark.parametrize(("record", "columns"), OTHERS)
def test_columns_of_an_unknown_layout_are_guessed_by_names(
    tmp_path: Path, record: dict[str, Any], columns: str
) -> None:
    assert suggest_columns(record) == columns
    path = write_records(tmp_path / "r.jsonl", [record])
    if columns:
        assert len(read(path, f"columns: {columns}")[0]) == 1
    with pytest.raises(
        UserError, match=r"has the format columns and no columns; the record has the fields \w"
    ):
        read(path, "")


def test_a_record_of_another_format_is_named_with_its_format_and_its_columns(tmp_path: Path) -> None:
    record = {
        "_id": "1",
        "question": "q?",
        "answer": "a",
        "supporting_facts": [["A", 0]],
        "context": [["A", ["a b", "c"]], ["B", ["d"]]],
    }
    path = write_records(tmp_path / "r.jsonl", [record])
    columns = "{question: question, documents: context, supporting: supporting_facts, answers: answer}"
    with pytest.raises(UserError) as raised:
        read(path, "")
    remedy = f"set format to hotpotqa, which reads such records, or add columns: {columns}"
    assert str(raised.value).endswith(remedy)
    ((sample,), _) = read(path, f"columns: {columns}")
    assert len(sample.documents) == 2 and sample.meta["supporting"] == [2]


def test_no_columns_are_offered_that_lose_the_documents_of_the_mapping(tmp_path: Path) -> None:
    path = write_records(tmp_path / "r.jsonl", [{"q": "q?", "d": ["a"], "a": [{"text": "a"}]}])
    with pytest.raises(UserError, match="field 'a' is {'text': 'a'}, it should be a text") as raised:
        read(path, "columns: {question: q, documents: d, answers: a}")
    assert "would fit" not in str(raised.value)


def test_questions_with_several_answers_and_no_documents_need_a_corpus(tmp_path: Path) -> None:
    record = {"question": "q?", "possible_answers": '["a", "b"]'}
    assert suggest_columns(record) == (
        '{question: question, answers: "possible_answers[]"}, corpus: FILE_OF_DOCUMENTS, retriever: bm25'
    )


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (
            {"id": 1, "query": "q?", "golden_answers": ["a"]},
            "{id: id, question: query, answers: golden_answers}",
        ),
        ({"question": "q?", "answer": "a"}, "{question: question, answers: answer}"),
        ({"prompt": "q?", "completion": "a", "answer": "a"}, "{question: prompt, answers: answer}"),
    ],
)
def test_records_beside_a_corpus_are_questions(
    tmp_path: Path, record: dict[str, object], columns: str
) -> None:
    path = write_records(tmp_path / "r.jsonl", [record])
    corpus = write_records(tmp_path / "corpus.jsonl", [{"text": "a is here"}])
    with pytest.raises(UserError) as raised:
        read(path, f"corpus: {corpus}, retriever: bm25")
    assert str(raised.value).endswith(f": add columns: {columns}")


def test_datasets_of_the_hub_give_the_same_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = RECORDS["MS MARCO 2.1"]
    path = write_records(tmp_path / "r.jsonl", records)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: iter(records))
    setting = "columns: {question: query, documents: passages.passage_text, answers: answers}"
    local, counts = read(path, setting)
    found, hub_counts = read(Path("owner/r"), f"split: train, name: v2.1, {setting}")
    assert (found, hub_counts.dropped) == (local, counts.dropped)
