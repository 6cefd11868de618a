"""Whole runs of a toy in which a teacher has a say: its own full view, or another model."""

from pathlib import Path

import pytest
from torch.testing import assert_close

from blockft.config import Recipe
from blockft.errors import UserError
from blockft.model.checkpoint import MARKER
from blockft.recipe import load_recipe
from blockft.rundir import METRICS, read_metrics
from blockft.stages.plan import make_plan
from blockft.stages.prepare import prepare
from tests.run import save_model, toy_recipe
from tests.stages.test_run import blockft

DISTILL = "train.objective=distill"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    prepare(toy_recipe(folder))
    return folder


def losses(toy: Path, run: str, *words: str) -> list[float]:
    """Those that a run logs."""
    done = blockft("train", toy / "recipe.yaml", f"train.out={toy}/{run}", DISTILL, *words)
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in read_metrics(toy / run) if "loss" in line]


def test_a_model_teaches_itself_on_any_number_of_ranks(toy: Path) -> None:
    """Under ZeRO-3, too, where the teacher's pass gathers the weights once more (law 8)."""
    alone = losses(toy, "alone", "train.epochs=3")
    assert alone[-1] < alone[0] - 0.5
    apart = losses(toy, "apart", "train.epochs=3", "train.deepspeed=zero3", "--num-gpus", "2")
    assert_close(apart, alone, rtol=1e-5, atol=0)
    weighted = losses(toy, "weighted", "train.max_steps=1", "train.teacher_weight=0.5")
    assert weighted[0] > alone[0]


def test_a_frozen_teacher_has_a_say_in_every_view(toy: Path) -> None:
    """Who is taught by its own first weights has nothing to learn in the full view, all in the block view."""
    words = (f"train.teacher={toy}/model", "train.learning_rate=1e-3")
    assert losses(toy, "full", *words, "data.views=[full]", "train.max_steps=1") == [0]
    block = losses(toy, "block", *words, "data.views=[block]", "train.epochs=4")
    assert 1e-3 < block[-1] < 0.8 * block[0]


def test_law_9_a_resumed_run_is_taught_on(toy: Path) -> None:
    words = (f"train.teacher={toy}/model", "train.save_steps=2")
    expected = losses(toy, "again", *words)
    (toy / "again" / "checkpoint-5" / MARKER).unlink()
    with (toy / "again" / METRICS).open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    assert losses(toy, "again", *words, "--resume") == expected
    done = blockft("train", toy / "recipe.yaml", f"train.out={toy}/again", DISTILL, "--resume")
    assert done.returncode == 2 and "another train.teacher" in done.stderr


def test_a_dry_run_counts_the_teacher(toy: Path) -> None:
    words = ("train", toy / "recipe.yaml", f"train.out={toy}/dry", "--dry-run", DISTILL)
    done = blockft(*words, f"train.teacher={save_model(toy / 'wide', hidden_size=64)}")
    assert done.returncode == 0 and " teach" in done.stdout
    assert " teach" not in blockft(*words).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.teacher=model"], "set distill"),
        (["train.teacher_weight=0.5"], "set distill"),
        ([DISTILL, "train.teacher_weight=0"], "above 0"),
        ([DISTILL, "train.teacher_weight=1.5"], "at most 1"),
        ([DISTILL, "data.views=[block]"], "train on both"),
        ([DISTILL, "data.views=[full]"], "train on both"),
        ([DISTILL, "train.teacher=nowhere/to/be/found"], "nowhere/to/be/found"),
        ([DISTILL, "train.teacher=data/demo/model"], "another tokenizer"),
    ],
)
def test_teachers_that_cannot_be(toy: Path, words: list[str], said: str) -> None:
    recipe: Recipe = load_recipe(str(toy / "recipe.yaml"), words)
    with pytest.raises(UserError, match=said):
        make_plan(recipe, 1)
