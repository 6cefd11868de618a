"""What an evaluation asks: which questions of which sources, of which model."""

import json
from pathlib import Path
from typing import Any

import pytest

from blockft.config.recipe import build_recipe
from blockft.config.settings import Recipe
from blockft.errors import UserError
from blockft.stages import questions
from blockft.stages.questions import model_revision, read_questions, recipe_for_questions


def save_questions(path: Path, num_questions: int, *, without_answers: tuple[int, ...] = ()) -> str:
    records: list[dict[str, Any]] = [
        {
            "id": str(i),
            "source": path.stem,
            "messages": [{"role": "user", "content": ["?"]}],
            "response": "x",
            "answers": [] if i in without_answers else ["x"],
        }
        for i in range(num_questions)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def settings(paths: list[str], *overrides: str) -> Recipe:
    given = {
        "model": {"path": "owner/base"},
        "data": {"output_dir": "o", "sources": [{"format": "samples", "path": "p"}]},
        "train": {"output_dir": "o"},
        "eval": {"output_dir": "o", "sources": [{"format": "samples", "path": path} for path in paths]},
    }
    return build_recipe(given, overrides, "test")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("8", "aaabbbcc"), ("4", "aabc"), ("11", "aaaaabbbbcc"), ("null", "a" * 10 + "bbbbcc")],
)
def test_a_limit_takes_from_every_source(tmp_path: Path, limit: str, expected: str) -> None:
    paths = [save_questions(tmp_path / f"{name}.jsonl", n) for name, n in (("a", 10), ("b", 4), ("c", 2))]
    samples, _ = read_questions(settings(paths, f"eval.max_samples={limit}"))
    assert "".join(sample.source for sample in samples) == expected
    assert [sample.id for sample in samples if sample.source == "a"] == list("0123456789")[
        : expected.count("a")
    ]


def test_reports_of_models_that_differ_in_size_do_not_share_a_folder(tmp_path: Path) -> None:
    data = save_questions(tmp_path / "dev.v1.jsonl", 1)
    outs = [recipe_for_questions(f"meta/Llama-3.{x}B", data).eval for x in ("1-8", "2-3")]
    names = [Path(out.output_dir).name for out in outs if out]
    assert names == [f"meta-Llama-3.{x}B-{tmp_path.name}-dev.v1" for x in ("1-8", "2-3")]


def test_questions_without_answers_are_skipped_if_bad_records_are(tmp_path: Path) -> None:
    path = save_questions(tmp_path / "a.jsonl", 5, without_answers=(1, 3))
    with pytest.raises(UserError, match=r"question 1 of a has no answers .*data.on_bad_record=skip"):
        read_questions(settings([path]))
    samples, dropped = read_questions(settings([path], "data.on_bad_record=skip"))
    assert [sample.id for sample in samples] == ["0", "2", "4"] and dropped == {"no answers": 2}
    path = save_questions(tmp_path / "a.jsonl", 2, without_answers=(0, 1))
    with pytest.raises(UserError, match=r"hold no question \(no answers: 2\)"):
        read_questions(settings([path], "data.on_bad_record=skip"))


def test_chats_hold_no_answers(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": turns}))
    recipe = recipe_for_questions("owner/base", str(tmp_path / "c.jsonl"), format="messages")
    with pytest.raises(UserError, match=r"c\.jsonl is in the format messages, which holds no answers"):
        read_questions(recipe)


def test_a_revision_is_of_one_model(tmp_path: Path) -> None:
    recipe = settings([], "model.revision=v2")
    assert model_revision("owner/base", recipe) == "v2"
    assert model_revision(str(tmp_path), recipe) is None, "a folder has none"
    assert model_revision("owner/export", settings([])) is None
    with pytest.raises(UserError, match="model.revision is 'v2', of 'owner/base', but 'owner/export'"):
        model_revision("owner/export", recipe)


def test_the_wording_is_that_of_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def load_config(path: str, revision: str | None = None) -> None:
        opened.append((path, revision))

    monkeypatch.setattr(questions, "load_config", load_config)
    (tmp_path / "h.json").write_text("[]")
    recipe_for_questions("owner/export", str(tmp_path / "h.json"), ["model.revision=v2"], format="hotpotqa")
    assert opened == [("owner/export", "v2")]
