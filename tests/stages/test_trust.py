"""A checkpoint that somebody else wrote never runs code: its digests are right, and a pickle is not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockft.digest import digest_files, list_files
from blockft.errors import UserError
from blockft.model.checkpoint import MARKER, find_checkpoint, mark_complete, read_marker
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from tests.commands import blockft, train
from tests.run import toy_recipe


class Payload:
    """Unpickles as the creation of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy recipe and its run, which was stopped before its end."""
    folder = tmp_path_factory.mktemp("trust")
    prepare(toy_recipe(folder))
    train(folder / "recipe.yaml", folder / "run", "train.max_steps=2", "train.save_steps=2")
    return folder


def sign(checkpoint: Path) -> None:
    """Write the digests of a checkpoint's present files, as its author would."""
    marker = read_marker(checkpoint)
    (checkpoint / MARKER).unlink()
    names = ("step", "run_signature", "eval_losses", "eval_due", "answers_due", "unlogged", "metrics")
    files = digest_files(checkpoint, list_files(checkpoint))
    mark_complete(checkpoint, **{name: marker[name] for name in names}, files=files)


def optimizer_states(checkpoint: Path) -> Path:
    return next(checkpoint.rglob("*optim_states.pt"))


def model_states(checkpoint: Path) -> Path:
    return next(checkpoint.rglob("*model_states.pt"))


@pytest.mark.parametrize(
    "find",
    [
        optimizer_states,
        model_states,
        lambda checkpoint: checkpoint / "scheduler.pt",
        lambda checkpoint: next(checkpoint.glob("rng_state*.pth")),
        lambda checkpoint: checkpoint / "global_step2" / "zero_pp_rank_7_mp_rank_00_optim_states.pt",
    ],
)
def test_a_pickle_that_would_run_code_is_refused(
    toy: Path, tmp_path: Path, find: Callable[[Path], Path]
) -> None:
    run, evil = tmp_path / "run", tmp_path / "evil"
    shutil.copytree(toy / "run", run)
    checkpoint = find_checkpoint(run)
    path = find(checkpoint)
    content = torch.load(path, weights_only=False) if path.exists() else {}
    torch.save({"content": content, "extra": Payload(evil)}, path)
    sign(checkpoint)
    with pytest.raises(UserError, match=rf"{path.name} could run code when it is loaded \(posix\.mkdir"):
        export(run, tmp_path / "export")
    recipe = ["train", toy / "recipe.yaml", f"train.output_dir={run}"]
    done = blockft(*recipe, "--resume")
    assert done.returncode == 2 and f"{path.name} could run code when it is loaded" in done.stderr
    assert not evil.exists() and not (tmp_path / "export").exists()


def test_shards_outside_of_the_checkpoint_are_refused(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy / "run", run)
    checkpoint = find_checkpoint(run)
    shutil.move(checkpoint / "global_step2", tmp_path / "elsewhere")
    (checkpoint / "latest").write_text("../../elsewhere")
    sign(checkpoint)
    with pytest.raises(UserError, match="should name a folder of the checkpoint"):
        export(run, tmp_path / "export")
    done = blockft("train", toy / "recipe.yaml", f"train.output_dir={run}", "--resume")
    assert done.returncode == 2 and "should name a folder of the checkpoint" in done.stderr


def test_a_pickle_behind_a_link_is_refused(toy: Path, tmp_path: Path) -> None:
    """Shards in a linked folder are in no list of files, but DeepSpeed finds them."""
    run, evil = tmp_path / "run", tmp_path / "evil"
    shutil.copytree(toy / "run", run)
    checkpoint = find_checkpoint(run)
    torch.save(Payload(evil), path := optimizer_states(checkpoint))
    shutil.move(path.parent, tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    sign(checkpoint)
    with pytest.raises(UserError, match=rf"{path.name} could run code when it is loaded"):
        export(run, tmp_path / "export")
    done = blockft("train", toy / "recipe.yaml", f"train.output_dir={run}", "--resume")
    assert done.returncode == 2 and f"{path.name} could run code when it is loaded" in done.stderr
    assert not evil.exists()


def test_a_signed_checkpoint_without_such_a_pickle_is_exported(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy / "run", run)
    sign(find_checkpoint(run))
    assert (export(run, tmp_path / "export") / "config.json").is_file()
