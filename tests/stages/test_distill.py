"""Whole runs of a toy in which a teacher has a say: its own full view, or another model."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from blockft.config.recipe import load_recipe
from blockft.config.settings import Recipe
from blockft.errors import UserError
from blockft.model.checkpoint import MARKER
from blockft.outputs import METRICS, read_metrics
from blockft.stages.plan import build_plan, check_run
from blockft.stages.prepare import prepare
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import Distillation
from blockft.training.trainer import BlockTrainer
from tests.run import save_model, toy_recipe
from tests.stages.test_run import blockft
from tests.tiny import build_model

DISTILL = "train.objective=distill"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    prepare(toy_recipe(folder))
    return folder


def losses(toy: Path, run: str, *words: str) -> list[float]:
    """Those that a run logs."""
    done = blockft("train", toy / "recipe.yaml", f"train.output_dir={toy}/{run}", DISTILL, *words)
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in read_metrics(toy / run) if "loss" in line]


def test_a_model_teaches_itself_on_any_number_of_ranks(toy: Path) -> None:
    """Under ZeRO-3, too, where the teacher's pass gathers the weights once more (law 8)."""
    alone = losses(toy, "alone", "train.num_train_epochs=3")
    assert alone[-1] < alone[0] - 0.5
    apart = losses(toy, "apart", "train.num_train_epochs=3", "train.deepspeed=zero3", "--num-gpus", "2")
    assert_close(apart, alone, rtol=1e-5, atol=0)


def test_the_block_view_comes_to_say_what_a_frozen_teacher_says(toy: Path) -> None:
    words = (f"train.teacher={toy}/model", "train.learning_rate=1e-3", "train.num_train_epochs=4")
    block = losses(toy, "block", *words, "data.modes=[block]")
    assert 1e-3 < block[-1] < 0.8 * block[0]


def test_a_frozen_teacher_is_whole_on_every_rank(toy: Path) -> None:
    """Under ZeRO-3, and of another shape than the student."""
    words = (f"train.teacher={save_model(toy / 'wide', hidden_size=64)}",)
    alone = losses(toy, "wide-alone", *words)
    apart = losses(toy, "wide-apart", *words, "train.deepspeed=zero3", "--num-gpus", "2")
    assert_close(apart, alone, rtol=1e-5, atol=0)


def test_law_9_a_resumed_run_is_taught_on(toy: Path) -> None:
    """By the same teacher: not by another one, nor by other weights at the same place."""
    teacher = shutil.copytree(toy / "model", toy / "teacher")
    words = (f"train.teacher={teacher}", "train.save_steps=2")
    expected = losses(toy, "again", *words)
    (toy / "again" / "checkpoint-5" / MARKER).unlink()
    with (toy / "again" / METRICS).open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    assert losses(toy, "again", *words, "--resume") == expected
    again = [f"train.output_dir={toy}/again", "train.num_train_epochs=2"]
    taught = [DISTILL, f"train.teacher={teacher}"]
    for asked, said in (
        ([DISTILL], "another train.teacher "),
        ([*taught, "train.teacher_weight=0.5"], "another train.teacher_weight"),
        ([], r"another train.objective \(distill\) than is asked for \(sft\)"),
    ):
        with pytest.raises(UserError, match=said):
            check_run(load_recipe(str(toy / "recipe.yaml"), [*again, *asked]), resume=True, num_processes=1)
    shutil.copytree(save_model(toy / "other", hidden_size=64), teacher, dirs_exist_ok=True)
    done = blockft("train", toy / "recipe.yaml", *again, DISTILL, *words, "--resume")
    assert done.returncode == 2 and "another model as train.teacher" in done.stderr.splitlines()[-1]


def test_what_a_model_teaches_itself_is_its_full_view_without_dropout(toy: Path) -> None:
    """`BlockTrainer` asks for it in evaluation mode, and lets no gradient through."""
    model = build_model("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rows = build_plan(load_recipe(str(toy / "recipe.yaml"), [DISTILL]), 1).rows
    row = {name: x % 97 if name == "input_ids" else x for name, x in rows[0].items()}
    assert row["is_block_view"].any() and not torch.equal(row["block_ids"], row["full_block_ids"])
    trainer = SimpleNamespace(model=model.train())
    own, taught_by = (BlockTrainer._targets(trainer, model, row, Distillation(t, 1.0)) for t in (None, model))
    assert model.training and not own.teacher_logits.requires_grad
    with torch.no_grad():
        expected = model.eval()(**build_model_inputs(row, model.config, full=True)).logits
        block = model(**build_model_inputs(row, model.config)).logits
    assert torch.equal(own.teacher_logits, expected) and not torch.allclose(block, expected)
    assert torch.equal(own.is_taught[0], row["is_block_view"]) and taught_by.is_taught.all()


def gib(said: str) -> float:
    found = re.search(r"([\d.]+) GiB", said)
    assert found
    return float(found[1])


def test_a_dry_run_counts_the_teacher(toy: Path) -> None:
    words = ("train", toy / "recipe.yaml", f"train.output_dir={toy}/dry", "--dry-run", DISTILL)
    large = shutil.copytree(toy / "model", toy / "large", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"intermediate_size": 10**7}))
    taught, alone = blockft(*words, f"train.teacher={large}"), blockft(*words)
    assert taught.returncode == alone.returncode == 0 and " teach" in taught.stdout
    assert gib(taught.stdout) - gib(alone.stdout) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([DISTILL, "data.output_dir={toy}/unsplit"], "nothing to teach"),
        ([DISTILL, "train.teacher={toy}/odd"], "'gpt2' is not supported"),
        (["train.teacher=model"], "set distill"),
        (["train.teacher_weight=0.5"], "set distill"),
        ([DISTILL, "train.teacher_weight=0"], "above 0"),
        ([DISTILL, "train.teacher_weight=1.5"], "at most 1"),
        ([DISTILL, "data.modes=[block]"], "train on both"),
        ([DISTILL, "data.modes=[full]"], "train on both"),
        ([DISTILL, "train.teacher=nowhere/to/be/found"], "nowhere/to/be/found"),
        ([DISTILL, "train.teacher=data/demo/model"], "another tokenizer"),
    ],
)
def test_teachers_that_cannot_be(toy: Path, words: list[str], said: str) -> None:
    recipe: Recipe = load_recipe(str(toy / "recipe.yaml"), [word.format(toy=toy) for word in words])
    if not (toy / "odd").exists():
        (toy / "odd").mkdir()
        (toy / "odd" / "config.json").write_text('{"model_type": "gpt2"}')
        source = toy / "unsplit.jsonl"
        message = '{"role": "user", "content": ["a?"]}'
        source.write_text(f'{{"id": "1", "source": "toy", "messages": [{message}], "response": "7"}}\n')
        words = [f"data.output_dir={toy}/unsplit", f"data.sources.0.path={source}"]
        prepare(load_recipe(str(toy / "recipe.yaml"), words))
    with pytest.raises(UserError, match=said):
        build_plan(recipe, 1)
