"""Leaks between `data.sources` and `eval.sources`, as `blockft prepare` finds and reports them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockft.config.choices import Format, Order
from blockft.config.settings import EvalSettings, Recipe, Source
from blockft.data.prepared import load_prepared
from blockft.stages.prepare import prepare

Make = Callable[..., Recipe]


def passages(*names: str) -> list[dict[str, Any]]:
    return [{"title": name, "text": f"{name} lives here.", "isgold": i == 0} for i, name in enumerate(names)]


def fid(id: str, question: str, *names: str) -> dict[str, Any]:
    return {"id": id, "question": question, "answers": [names[0]], "ctxs": passages(*names)}


def hotpot(id: str, question: str, *names: str) -> dict[str, Any]:
    return {
        "_id": id,
        "question": question,
        "answer": names[0],
        "supporting_facts": [[names[0], 0]],
        "context": [[name, [f"{name} lives here."]] for name in names],
    }


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def leaks_of(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Return a function that prepares a recipe; it returns the manifest and what stderr says."""

    def prepared(
        training: list[Source], evaluation: list[Source], max_samples: int | None = None, **data: Any
    ) -> tuple[dict[str, Any], str]:
        recipe = make_recipe(sources=training, **data)
        recipe.eval = EvalSettings(
            output_dir=str(tmp_path / "eval"), sources=evaluation, max_samples=max_samples
        )
        return load_prepared(prepare(recipe, overwrite=True)).manifest, capsys.readouterr().err

    return prepared


LeaksOf = Callable[..., tuple[dict[str, Any], str]]


def found(manifest: dict[str, Any]) -> list[list[tuple[Any, ...]]]:
    return [
        [
            (
                leak["training_source"],
                leak["questions"],
                leak["documents"],
                [(example["evaluation"], example["training"]) for example in leak["examples"]],
            )
            for leak in entry["found"]
        ]
        for entry in manifest["leaks"]
    ]


def test_leaks_between_formats_files_and_orders_are_reported_once_for_each_pair(
    leaks_of: LeaksOf, tmp_path: Path
) -> None:
    train = write(
        tmp_path / "train.jsonl",
        [
            fid("f1", "Who lives here?", "Ada", "Bob"),
            fid("f2", "Where is it?", "Eve", "Max"),
            fid("f3", "What else?", "Ada", "Max"),
        ],
    )
    asked = [
        hotpot("h1", "who lives  HERE", "Zoe", "Ann"),
        hotpot("h2", "Another one?", "Max", "Eve"),
        hotpot("h3", "A third one?", "Ada", "Zoe"),
    ]
    dev = write(tmp_path / "dev.jsonl", asked)
    pq.write_table(
        pa.Table.from_pylist(
            [
                {**record, "context": json.dumps(record["context"]), "supporting_facts": "[]"}
                for record in asked
            ]
        ),
        tmp_path / "dev.parquet",
    )
    manifest, printed = leaks_of(
        [Source(format=Format.fid, path=train)],
        [
            Source(format=Format.hotpotqa, path=dev),
            Source(format=Format.two_wiki, path=str(tmp_path / "dev.parquet")),
            Source(format=Format.hotpotqa, path=dev, skip_samples=2),
        ],
        order=Order.shuffled,
    )
    pair = (0, 1, 1, [("h1", "f1"), ("h2", "f2")])
    assert found(manifest) == [[pair], [pair], []]
    assert [entry["samples"] for entry in manifest["leaks"]] == [3, 3, 1]
    warnings = printed.splitlines()
    assert len(warnings) == 2
    shared = f"also holds 1 question and 1 set of documents of eval.sources.0 ({dev}), which has 3 questions"
    assert f"data.sources.0 ({train}) {shared}" in warnings[0]
    assert "h1 and f1, h2 and f2" in warnings[0]


def test_parts_of_one_file_share_exactly_the_records_that_both_read(
    leaks_of: LeaksOf, tmp_path: Path
) -> None:
    path = write(tmp_path / "all.jsonl", [fid(f"f{i}", f"Question {i}?", f"N{i}", "Bob") for i in range(10)])
    source = {"format": Format.fid, "path": path}
    manifest, printed = leaks_of(
        [Source(**source, max_samples=6)],
        [Source(**source, skip_samples=6), Source(**source, skip_samples=5)],
    )
    assert found(manifest) == [[], [(0, 1, 1, [("f5", "f5")])]]
    assert printed.count("warning") == 1
    manifest, printed = leaks_of(
        [Source(**source, max_samples=6)], [Source(**source), Source(**source, skip_samples=6)], max_samples=4
    )
    assert found(manifest) == [[(0, 2, 2, [("f0", "f0"), ("f1", "f1")])], []]
    assert [entry["samples"] for entry in manifest["leaks"]] == [2, 2]


def test_a_chat_that_asks_an_evaluation_question_is_found(leaks_of: LeaksOf, tmp_path: Path) -> None:
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who lives here?\n\n"}],
        [{"role": "user", "content": "Something else"}],
    ]
    answer = {"role": "assistant", "content": "Ada"}
    train = write(tmp_path / "chats.jsonl", [{"messages": [*chat, answer]} for chat in chats])
    dev = write(tmp_path / "dev.jsonl", [fid("f1", "Who lives here?", "Ada", "Bob")])
    manifest, _ = leaks_of(
        [Source(format=Format.messages, path=train)], [Source(format=Format.fid, path=dev)]
    )
    assert found(manifest) == [[(0, 1, 0, [("f1", "chats-1")])]]


def test_duplicates_in_training_are_counted_and_kept(leaks_of: LeaksOf, tmp_path: Path) -> None:
    records = [
        fid("f1", "Who?", "Ada", "Bob"),
        fid("f2", "who", "Bob", "Ada"),
        fid("f3", "Who?", "Eve", "Max"),
    ]
    first = write(tmp_path / "a.jsonl", records)
    second = write(tmp_path / "b.jsonl", records[:1])
    sources = [Source(format=Format.fid, path=path) for path in (first, second)]
    manifest, printed = leaks_of(sources, [], order=Order.shuffled, num_copies=2)
    assert manifest["duplicates"] == {"questions": 3, "questions_and_documents": 2}
    assert manifest["num_samples"] == 8 and manifest["leaks"] == [] and printed == ""


def test_an_evaluation_source_that_cannot_be_read_is_a_warning(leaks_of: LeaksOf, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [fid("f1", "Who?", "Ada", "Bob")])
    broken = write(tmp_path / "dev.jsonl", [fid("f1", "Who?", "Ada", "Bob"), {"question": "[red]"}])
    manifest, printed = leaks_of(
        [Source(format=Format.fid, path=train)],
        [Source(format=Format.fid, path=path) for path in (str(tmp_path / "none.jsonl"), broken)],
    )
    assert ["not_read" in entry for entry in manifest["leaks"]] == [True, True]
    assert "none.jsonl does not exist" in manifest["leaks"][0]["not_read"]
    assert found(manifest) == [[], [(0, 1, 1, [("f1", "f1")])]]
    assert "eval.sources.0 is not compared with the training data: source" in printed
    assert "eval.sources.1 is not compared with the training data after 1 question: " in printed
    assert "dev.jsonl, line 2" in printed
