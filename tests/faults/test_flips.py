"""Random damage of prepared data, checkpoints, runs and exports: each one is found and is one sentence.

The damages are seeded: a failure can be repeated.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blockft.config.settings import Recipe
from blockft.data.prepared import load_prepared
from blockft.digest import list_files
from blockft.errors import UserError
from blockft.model.checkpoint import MARKER, complete_checkpoints
from blockft.model.load import load_model, load_tokenizer, verify_model
from blockft.model.model_files import DIGESTS
from blockft.run_folder import DATA, METRICS, RECIPE
from blockft.stages.compare import compare, print_comparison
from blockft.stages.evaluate import evaluate
from blockft.stages.export import export
from blockft.stages.inspect import inspect
from blockft.stages.prepare import prepare
from blockft.stages.prepare_summary import print_summary
from blockft.stages.run_plan import check_run
from tests.commands import blockft, run_ranks, train
from tests.faults.damage import Damage, damage_file, restore
from tests.run import toy_recipe

SETTINGS = ("train.max_steps=4", "train.save_steps=2", "train.deepspeed=zero0")
LORA = "train.lora={r: 4}"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy recipe, its prepared data, a run of two checkpoints and the export of the run."""
    folder = tmp_path_factory.mktemp("flips")
    prepare(toy_recipe(folder))
    train(folder / "recipe.yaml", folder / "run", *SETTINGS)
    export(folder / "run", folder / "export")
    return folder


@pytest.fixture(scope="module")
def two_ranks(toy: Path) -> Path:
    run = toy / "zero2"
    train(toy / "recipe.yaml", run, *SETTINGS, "train.deepspeed=zero2", num_ranks=2)
    return run


@pytest.fixture(scope="module")
def adapter(toy: Path) -> Path:
    run = toy / "lora"
    train(toy / "recipe.yaml", run, *SETTINGS, LORA)
    export(run, toy / "lora-merged")
    export(run, toy / "lora-adapter", adapter_only=True)
    return run


def recipe_of(run: Path, *overrides: str) -> Recipe:
    return toy_recipe(run.parent, *SETTINGS, f"train.output_dir={run}", *overrides)


def damages(folder: Path, seed: int, number: int, names: list[str]) -> Iterator[Damage]:
    """Damage one of the named files, each in its turn, yield, and restore the folder; `number` times."""
    original = folder.with_name(f"{folder.name}.original")
    shutil.copytree(folder, original, symlinks=True)
    try:
        for index in range(number):
            rng = random.Random(f"{seed} {index}")
            yield damage_file(rng, folder, names[index % len(names)], rng.choice(names))
            restore(folder, original)
    finally:
        restore(folder, original)
        shutil.rmtree(original)


def check_found(read: Callable[[], Any], damage: Damage) -> None:
    """Check that reading raises one sentence."""
    with pytest.raises(UserError) as error:
        read()
        pytest.fail(f"{damage.text} is not noticed")
    assert "\n" not in str(error.value), damage.text


def check_prepared(recipe: Recipe, seed: int, number: int) -> None:
    folder = Path(recipe.data.output_dir)
    names = list_files(folder)
    assert len(names) == 3
    for damage in damages(folder, seed, number, names):
        check_found(lambda: load_prepared(folder), damage)
    assert load_prepared(folder).manifest


def check_checkpoints(run: Path, seed: int, number: int, *overrides: str, num_ranks: int = 1) -> None:
    """Damage the newest checkpoint: neither a resumed run nor an export uses it."""
    recipe = recipe_of(run, *overrides)
    older, newest = complete_checkpoints(run)
    for damage in damages(newest, seed, number, list_files(newest)):
        if (newest / MARKER).is_file():
            for read in (
                lambda: check_run(recipe, resume=True, num_processes=num_ranks),
                lambda: export(run, run.parent / "none"),
            ):
                check_found(read, damage)
        else:  # as after an interrupted save
            assert check_run(recipe, resume=True, num_processes=num_ranks)[1] == older
    assert check_run(recipe, resume=True, num_processes=num_ranks)[1] == newest
    assert not (run.parent / "none").exists()


def check_export(folder: Path, seed: int, number: int) -> None:
    names = [name for name in list_files(folder) if name != "README.md"]
    for damage in damages(folder, seed, number, names):
        if not (folder / DIGESTS).is_symlink() and not (folder / DIGESTS).exists():
            continue  # an export without digests is a model folder like any other
        check_found(lambda: verify_model(str(folder)), damage)
        check_found(lambda: load_model(str(folder), backend="sdpa", dtype=torch.float32), damage)
    assert load_model(str(folder), backend="sdpa", dtype=torch.float32)


def test_no_damage_of_prepared_data_is_used(toy: Path) -> None:
    check_prepared(toy_recipe(toy), seed=1, number=90)


def test_no_damage_of_a_checkpoint_is_used(toy: Path) -> None:
    check_checkpoints(toy / "run", seed=2, number=100)


def test_no_damage_of_an_export_is_used(toy: Path) -> None:
    check_export(toy / "export", seed=3, number=60)


def test_no_damage_of_the_files_of_a_run_is_used(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, metrics = toy / "run", toy / "run" / METRICS
    content = metrics.read_bytes()
    for damage in damages(run, 4, 40, [RECIPE, DATA, METRICS]):
        if metrics.is_file() and metrics.read_bytes().startswith(content) and damage.text.startswith(METRICS):
            continue  # lines after those of the checkpoint are never read
        if damage.text == f"{METRICS} removed":
            check_run(recipe_of(run), resume=True, num_processes=1)
            assert "metrics.jsonl is missing" in capsys.readouterr().err
        else:
            check_found(lambda: export(run, toy / "none"), damage)


def test_a_file_that_was_added_is_not_used(toy: Path) -> None:
    recipe = recipe_of(toy / "run")
    (_, newest) = complete_checkpoints(toy / "run")
    shards = next(newest.glob("global_step*"))
    for path, read in (
        (toy / "data" / "samples-00001.jsonl", lambda: load_prepared(toy / "data")),
        (toy / "data" / "examples" / "examples-1.arrow", lambda: load_prepared(toy / "data")),
        (
            shards / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
            lambda: check_run(recipe, resume=True, num_processes=1),
        ),
        (newest / "adapter_model.safetensors", lambda: export(toy / "run", toy / "none")),
        (toy / "export" / "adapter_config.json", lambda: load_tokenizer(str(toy / "export"))),
    ):
        assert not path.exists()
        shutil.copyfile(toy / "model" / "config.json", path)
        check_found(read, Damage(f"{path.name} added"))
        path.unlink()


def test_every_reader_of_prepared_data_finds_damage(toy: Path) -> None:
    recipe, path = toy_recipe(toy), toy / "data" / "samples-00000.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Answer", b"answer", 1))
    for read in (lambda: inspect(toy / "data"), lambda: print_summary(recipe)):
        check_found(read, Damage(path.name))
    dry_run = ["train", toy / "recipe.yaml", f"train.output_dir={toy / 'none'}", "--dry-run"]
    for arguments in (dry_run, ["inspect", toy / "data"]):
        done = blockft(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "damaged" in done.stderr
    path.write_bytes(content)


def test_every_reader_of_an_export_finds_damage(toy: Path) -> None:
    path = toy / "export" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    original = path.read_bytes()
    path.write_bytes(content)
    heldout, documents, out = toy / "heldout.jsonl", toy / "documents.jsonl", toy / "none"
    documents.write_text('{"text": "a=1"}\n')
    teacher = ["train.objective=distill", f"train.teacher={toy / 'export'}"]
    training = ["train", toy / "recipe.yaml", f"train.output_dir={out}"]
    for run, arguments in (
        (blockft, ["generate", toy / "export", "--input", heldout]),
        (blockft, ["eval", toy / "export", toy / "recipe.yaml", f"eval.output_dir={out}"]),
        (blockft, ["cache", "build", toy / "export", documents, "--cache", out]),
        (blockft, [*training, f"model.path={toy / 'export'}", "--dry-run"]),
        (run_ranks, [*training, f"model.path={toy / 'export'}"]),
        (run_ranks, [*training, *teacher]),
    ):
        done = run(*arguments)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and "model.safetensors has changed" in last, done.stderr
        assert "Traceback" not in done.stderr and not out.exists()
    path.write_bytes(original)


def test_no_damage_of_a_checkpoint_of_two_ranks_is_used(two_ranks: Path) -> None:
    check_checkpoints(two_ranks, 5, 50, "train.deepspeed=zero2", num_ranks=2)


def test_no_damage_of_an_adapter_is_used(adapter: Path) -> None:
    check_checkpoints(adapter, 6, 50, LORA)
    check_export(adapter.parent / "lora-merged", 7, 30)
    check_export(adapter.parent / "lora-adapter", 8, 40)


def test_damage_of_a_report_is_no_traceback(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(toy / "model", toy / "recipe.yaml", overrides=[f"eval.output_dir={tmp_path / 'eval'}"])
    shutil.copytree(tmp_path / "eval", tmp_path / "other")
    num_found = 0
    for damage in damages(tmp_path / "eval", 9, 100, ["report.json"]):
        try:
            print_comparison(compare([tmp_path / "eval", tmp_path / "other"]))
        except UserError as error:
            num_found += 1
            assert "\n" not in str(error), damage.text
    assert num_found > 50
    capsys.readouterr()


def test_a_checkpoint_of_an_adapter_that_is_opened_as_a_model_is_verified(adapter: Path) -> None:
    newest = complete_checkpoints(adapter)[-1]
    names = [name for name in list_files(newest) if Path(name).parent == Path() and name != "latest"]
    names.remove("README.md")  # the model card of peft
    assert "adapter_model.safetensors" in names and load_tokenizer(str(newest))
    for damage in damages(newest, 10, 40, names):
        if (newest / MARKER).exists() or (newest / MARKER).is_symlink():
            check_found(lambda: load_model(str(newest), backend="sdpa", dtype=torch.float32), damage)


def test_a_checkpoint_of_all_weights_is_not_accepted_as_a_model(toy: Path) -> None:
    newest = complete_checkpoints(toy / "run")[-1]
    with pytest.raises(
        UserError, match=f"is a checkpoint of a run, not a model: export it with blockft export {newest} FOLD"
    ):
        load_model(str(newest), backend="sdpa", dtype=torch.float32)
    done = run_ranks("train", toy / "recipe.yaml", f"train.output_dir={toy / 'none'}", f"model.path={newest}")
    assert done.returncode == 2 and "not a model: export it" in done.stderr.splitlines()[-1], done.stderr
    assert not (toy / "none").exists()


@pytest.mark.slow  # more of the same
def test_no_damage_of_two_thousand_is_used(toy: Path, two_ranks: Path, adapter: Path) -> None:
    check_prepared(toy_recipe(toy), seed=21, number=500)
    check_checkpoints(toy / "run", 22, 300)
    check_checkpoints(two_ranks, 23, 300, "train.deepspeed=zero2", num_ranks=2)
    check_checkpoints(adapter, 24, 300, LORA)
    for name in ("export", "lora-merged", "lora-adapter"):
        check_export(toy / name, 25, 200)


def test_ranks_end_together_on_a_damaged_checkpoint(two_ranks: Path) -> None:
    """Only the first rank of the host reads the checkpoint; the other one must not wait for it."""
    toy = two_ranks.parent
    shard = next(complete_checkpoints(two_ranks)[-1].glob("global_step*/*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    original = shard.read_bytes()
    shard.write_bytes(content)
    arguments = [
        "train",
        toy / "recipe.yaml",
        f"train.output_dir={two_ranks}",
        *SETTINGS,
        "train.max_steps=5",
    ]
    done = run_ranks(*arguments, "train.deepspeed=zero2", "--resume", num_ranks=2)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("blockft:") == 1 and "checkpoint-2 is undamaged" in done.stderr
    shard.write_bytes(original)
