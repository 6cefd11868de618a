"""`blockft bench agreement` on a toy model: equal answers are counted, different ones listed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockft.config.settings import Recipe
from blockft.errors import UserError
from blockft.inference.answer import Answer
from blockft.inference.engine import Engine
from blockft.stages.bench import bench_agreement
from blockft.stages.evaluate import evaluation_recipe
from tests.run import save_model, save_samples, write_block_attention


@pytest.fixture
def model(tmp_path: Path) -> str:
    save_model(tmp_path / "model")
    save_samples(tmp_path / "questions.jsonl", 5)
    return str(tmp_path / "model")


def recipe_of(model: str) -> Recipe:
    return evaluation_recipe(
        model, str(Path(model).parent / "questions.jsonl"), overrides=["model.dtype=float32"]
    )


def compare(model: str, num_prompts: int = 4, max_new_tokens: int = 5) -> dict[str, Any]:
    out = Path(model).parent / "agreement.json"
    bench_agreement(model, recipe_of(model), num_prompts=num_prompts, max_new_tokens=max_new_tokens, out=out)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_cached_blocks_give_the_answers_of_the_masked_forward_pass(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compare(model)
    assert (result["num_prompts"], result["num_equal"], result["different"]) == (4, 4, [])
    assert result["num_equal_with_another_kernel"] == 4
    assert (result["dtype"], result["max_new_tokens"]) == ("float32", 5)
    assert capsys.readouterr().out.startswith("4 of 4 greedy answers")


def test_blocks_that_see_the_first_block_are_compared_with_a_masked_forward_pass_of_such_blocks(
    model: str,
) -> None:
    write_block_attention(Path(model), local_sees_first=True)
    result = compare(model, 5, max_new_tokens=40)
    assert (result["num_equal"], result["num_equal_with_another_kernel"]) == (5, 5)


def test_local_positions_are_compared_with_a_masked_forward_pass_of_local_positions(model: str) -> None:
    config = Path(model) / "config.json"
    content = json.loads(config.read_text()) | {"block_attention": {"position_scheme": "local"}}
    config.write_text(json.dumps(content))
    assert compare(model, 5, max_new_tokens=40)["num_equal"] == 5


def test_questions_that_are_too_long_are_left_out_and_counted(model: str) -> None:
    questions = Path(model).parent / "questions.jsonl"
    first, *rest = questions.read_text().splitlines()
    sample = json.loads(first)
    sample["messages"][-1]["content"][-1] += " again" * 2000
    questions.write_text("\n".join([json.dumps(sample), *rest]) + "\n")
    result = compare(model, 5)
    assert (result["num_prompts"], result["dropped_records"]) == (4, {"too long": 1})


def test_wrong_answers_are_found(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.generate_ids

    def changed(self: Engine, prompts: Any, **options: Any) -> list[Answer]:
        (answer,) = original(self, prompts, **options)
        wrong_id = (answer.ids[2] + 1) % 50
        return [replace(answer, ids=(*answer.ids[:2], wrong_id, *answer.ids[3:]))]

    monkeypatch.setattr(Engine, "generate_ids", changed)
    result = compare(model)
    assert result["num_equal"] == 0
    first = result["different"][0]
    assert first["step"] == 2 and first["margin"] > 0 and first["source"] == "toy"


def test_more_prompts_than_questions_are_refused(model: str) -> None:
    with pytest.raises(UserError, match="has 5 questions, but --num-prompts is 6"):
        compare(model, 6)


def test_a_file_that_cannot_be_written_is_refused_first(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: it is a folder"):
        bench_agreement("no/model", recipe_of(model), num_prompts=1, max_new_tokens=1, out=tmp_path)
