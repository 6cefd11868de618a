"""Whole runs on toy data that distil a teacher: the model itself in full mode, or another model."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from blockft.config.recipe import load_recipe
from blockft.errors import UserError
from blockft.model.checkpoint import MARKER
from blockft.run_folder import METRICS
from blockft.stages.prepare import prepare
from blockft.stages.run_plan import build_plan, check_run
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import Distillation
from blockft.training.trainer import BlockTrainer
from tests.commands import blockft, logged, run_ranks, train
from tests.run import save_model, toy_recipe
from tests.tiny import build_model

DISTILL = "train.objective=distill"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    prepare(toy_recipe(folder))
    return folder


def losses(toy: Path, run: str, *overrides: str, num_ranks: int = 1) -> list[float]:
    """Train with a teacher and return the losses that the run logs."""
    train(toy / "recipe.yaml", toy / run, DISTILL, *overrides, num_ranks=num_ranks)
    return logged(toy / run)


def test_a_model_that_teaches_itself_has_the_same_losses_on_one_rank_and_on_two(toy: Path) -> None:
    """Also under ZeRO-3, where the teacher's forward pass gathers the sharded weights once more."""
    one_rank = losses(toy, "self-1", "train.num_train_epochs=3")
    assert one_rank[-1] < one_rank[0] - 0.5
    zero3 = ("train.num_train_epochs=3", "train.deepspeed=zero3")
    assert_close(losses(toy, "self-2", *zero3, num_ranks=2), one_rank, rtol=1e-5, atol=0)


def test_block_mode_learns_the_distribution_of_a_frozen_teacher(toy: Path) -> None:
    settings = (f"train.teacher={toy}/model", "train.learning_rate=1e-3", "train.num_train_epochs=4")
    block = losses(toy, "block", *settings, "data.modes=[block]")
    assert 1e-3 < block[-1] < 0.8 * block[0]


def test_a_frozen_teacher_is_not_sharded_under_zero_3(toy: Path) -> None:
    """The teacher has another shape than the student."""
    teacher = f"train.teacher={save_model(toy / 'wide', hidden_size=64)}"
    one_rank = losses(toy, "wide-1", teacher)
    two_ranks = losses(toy, "wide-2", teacher, "train.deepspeed=zero3", num_ranks=2)
    assert_close(two_ranks, one_rank, rtol=1e-5, atol=0)


def test_a_run_resumes_with_the_same_teacher_only(toy: Path) -> None:
    """Another teacher is refused, and so are other weights at the same path."""
    teacher = shutil.copytree(toy / "model", toy / "teacher")
    settings = (f"train.teacher={teacher}", "train.save_steps=2")
    expected = losses(toy, "again", *settings)
    (toy / "again" / "checkpoint-5" / MARKER).unlink()
    with (toy / "again" / METRICS).open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    assert losses(toy, "again", *settings, "--resume") == expected
    again = [f"train.output_dir={toy}/again", "train.num_train_epochs=2"]
    distill = [DISTILL, f"train.teacher={teacher}"]
    for overrides, message in (
        ([DISTILL], "trained with train.teacher = "),
        ([*distill, "train.teacher_weight=0.5"], "trained with train.teacher_weight = "),
        ([], "trained with train.objective = distill, but this recipe gives sft"),
    ):
        recipe = load_recipe(str(toy / "recipe.yaml"), [*again, *overrides])
        with pytest.raises(UserError, match=message):
            check_run(recipe, resume=True, num_processes=1)
    shutil.copytree(save_model(toy / "other", hidden_size=64), teacher, dirs_exist_ok=True)
    done = run_ranks("train", toy / "recipe.yaml", *again, DISTILL, *settings, "--resume")
    assert (
        done.returncode == 2
        and "trained with fingerprint of train.teacher = " in done.stderr.splitlines()[-1]
    )


def test_a_model_teaches_itself_with_its_full_mode_logits_without_dropout(toy: Path) -> None:
    """`BlockTrainer` computes them in evaluation mode and without a gradient."""
    model = build_model("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rows = build_plan(load_recipe(str(toy / "recipe.yaml"), [DISTILL]), 1).rows
    row = {name: x % 97 if name.endswith("input_ids") else x for name, x in rows[0].items()}
    assert row["is_block_mode"].any() and not torch.equal(row["block_ids"], row["full_block_ids"])
    trainer = SimpleNamespace(model=model.train())
    targets, of_other_teacher = (
        BlockTrainer._compute_targets(trainer, model, row, Distillation(teacher, 1.0))
        for teacher in (None, model)
    )
    assert model.training and not targets.teacher_logits.requires_grad
    with torch.no_grad():
        expected = model.eval()(**build_model_inputs(row, model.config, full=True)).logits
        block = model(**build_model_inputs(row, model.config)).logits
    assert torch.equal(targets.teacher_logits, expected) and not torch.allclose(block, expected)
    assert torch.equal(targets.is_taught[0], row["is_block_mode"]) and of_other_teacher.is_taught.all()


def test_a_dry_run_counts_the_teacher(toy: Path) -> None:
    arguments = ("train", toy / "recipe.yaml", f"train.output_dir={toy}/dry", "--dry-run", DISTILL)
    large = shutil.copytree(toy / "model", toy / "large", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"intermediate_size": 10**7}))
    with_teacher, without = blockft(*arguments, f"train.teacher={large}"), blockft(*arguments)
    assert with_teacher.returncode == without.returncode == 0 and " teach" in with_teacher.stdout
    assert re.search(r"weights of the teacher *│ *[\d.]+ [KMG]iB", with_teacher.stdout)
    assert "weights of the teacher" not in without.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
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
        ([DISTILL, "train.teacher=data/demo/model"], "have different tokenizers"),
    ],
)
def test_an_impossible_teacher_is_refused(toy: Path, overrides: list[str], message: str) -> None:
    overrides = [override.format(toy=toy) for override in overrides]
    if not (toy / "odd").exists():
        (toy / "odd").mkdir()
        (toy / "odd" / "config.json").write_text('{"model_type": "gpt2"}')
        source = toy / "unsplit.jsonl"
        chat = '{"role": "user", "content": ["a?"]}'
        source.write_text(f'{{"id": "1", "source": "toy", "messages": [{chat}], "response": "7"}}\n')
        unsplit = [f"data.output_dir={toy}/unsplit", f"data.sources.0.path={source}"]
        prepare(load_recipe(str(toy / "recipe.yaml"), unsplit))
    with pytest.raises(UserError, match=message):
        build_plan(load_recipe(str(toy / "recipe.yaml"), overrides), 1)
