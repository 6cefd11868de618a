"""Whole runs of a toy: train, resume, export, eval, generate; laws 8, 9, 10, and what must not get lost."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockft.config.recipe import load_recipe
from blockft.errors import UserError
from blockft.model.checkpoint import (
    MARKER,
    complete_checkpoints,
    consolidate,
    find_checkpoint,
    load_reference_logits,
)
from blockft.outputs import LOSS_PLOT, METRICS, RECIPE, read_metrics
from blockft.stages import export as export_stage
from blockft.stages.evaluate import evaluate
from blockft.stages.export import export
from blockft.stages.plan import build_plan
from blockft.stages.prepare import prepare
from blockft.stages.train import describe
from tests.data.test_squad import article
from tests.run import save_model, toy_recipe


def blockft(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "blockft", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd=Path(__file__).parents[2]
    )


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy recipe whose run is done."""
    folder = tmp_path_factory.mktemp("toy")
    prepare(toy_recipe(folder))
    done = blockft("train", folder / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def exported(toy: Path) -> Path:
    return export(toy / "run", toy / "export")


def test_a_run_leaves_its_recipe_metrics_plot_and_whole_checkpoints(toy: Path) -> None:
    run = toy / "run"
    assert all((run / name).is_file() for name in (RECIPE, METRICS, LOSS_PLOT))
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-4", "checkpoint-5"]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert losses(run)[-1] < losses(run)[0]


def test_law_8_two_ranks_give_the_losses_of_one(toy: Path) -> None:
    done = blockft("train", toy / "recipe.yaml", f"train.output_dir={toy}/run2", "--num-gpus", "2")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((find_checkpoint(toy / "run2") / MARKER).read_text())["facts"]["number of processes"] == 2
    )
    assert_close(losses(toy / "run2"), losses(toy / "run"), rtol=1e-5, atol=0)


def test_law_9_a_resumed_run_gives_the_losses_of_one_never_stopped(toy: Path) -> None:
    """As after a kill between two checkpoints: the newer one has no marker, and the metrics ran ahead."""
    again = toy / "again"
    done = blockft("train", toy / "recipe.yaml", f"train.output_dir={again}", "train.save_steps=2")
    assert done.returncode == 0, done.stderr
    assert losses(again) == losses(toy / "run")
    (again / "checkpoint-5" / MARKER).unlink()
    stray = again / "checkpoint-5" / "global_step5" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    stray.write_bytes(b"of a rank that the resumed run has not")
    with (again / METRICS).open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    done = blockft(
        "train", toy / "recipe.yaml", f"train.output_dir={again}", "train.save_steps=2", "--resume"
    )
    assert done.returncode == 0, done.stderr
    assert losses(again) == losses(toy / "run")
    assert (again / "checkpoint-5" / MARKER).is_file() and not stray.exists()


def test_law_10_an_export_gives_the_runs_logits(toy: Path, exported: Path) -> None:
    ids, expected = load_reference_logits(find_checkpoint(toy / "run"))
    plain = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        assert_close(plain(input_ids=ids[None]).logits[0], expected, rtol=1e-5, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(toy / "model")
    with torch.no_grad():
        assert not torch.allclose(before(input_ids=ids[None]).logits[0], expected, atol=1e-2), (
            "nothing learnt"
        )


def test_an_export_answers_through_plain_transformers(exported: Path) -> None:
    model, tokenizer = (auto.from_pretrained(exported) for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Answer.\na=7\na?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > ids.shape[1]
    # as the base's, whatever training set
    assert model.config.use_cache and model(ids).past_key_values is not None


def test_an_export_carries_its_card_and_how_prompts_were_cut(exported: Path) -> None:
    entry = json.loads((exported / "config.json").read_text())["block_attention"]
    assert entry["version"] == 1 and entry["position_scheme"] == "reencoded"
    assert "batch_rows: 4" in (exported / "README.md").read_text()
    assert "content_hash" in (exported / "README.md").read_text()


def test_a_run_without_reencoding_says_so_in_its_export(toy: Path) -> None:
    words = ("train", toy / "recipe.yaml", f"train.output_dir={toy}/local", "train.max_steps=1")
    done = blockft(*words, "data.positions=local")
    assert done.returncode == 0, done.stderr
    assert losses(toy / "local")[0] != losses(toy / "run")[0]
    out = export(toy / "local", toy / "local-export")
    entry = json.loads((out / "config.json").read_text())["block_attention"]
    assert entry["position_scheme"] == "local"
    done = blockft(*words, "train.max_steps=2", "--resume")
    assert done.returncode == 2 and "another data.positions (local)" in done.stderr


def test_a_16_bit_export_is_within_its_tolerance(toy: Path) -> None:
    export(toy / "run", toy / "export16", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(toy / "export16").dtype is torch.bfloat16


def test_an_export_that_differs_from_the_run_never_appears(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        weights = consolidate(checkpoint, dtype)
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
        return weights

    monkeypatch.setattr(export_stage, "consolidate", spoilt)
    with pytest.raises(RuntimeError, match="differ"):
        export(toy / "run", toy / "spoilt")
    assert not [path for path in toy.iterdir() if "spoilt" in path.name]


def test_a_full_disk_while_exporting_leaves_nothing(toy: Path) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-m", "blockft", "export", str(toy / "run"), str(toy / "full")],
        capture_output=True,
        text=True,
        preexec_fn=small_disk,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr.splitlines()[-1]
    assert not [path for path in toy.iterdir() if "full" in path.name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "export"), "exists already"),
        (("nothing", "new"), "no folder"),
        (("model", "new"), "no whole checkpoint"),
    ],
)
def test_exports_that_cannot_be(toy: Path, exported: Path, arguments: tuple[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        export(toy / arguments[0], toy / arguments[1])
    assert not (toy / "new").exists()


def test_an_unknown_export_type_is_refused(toy: Path) -> None:
    with pytest.raises(UserError, match="float32"):
        export(toy / "run", toy / "new", dtype="float31")
    with pytest.raises(UserError, match="'lots' is no size"):
        export(toy / "run", toy / "new", max_shard_size="lots")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "exists already"),
        (("train.output_dir={toy}/other", "--resume"), "no folder"),
        (("train.output_dir={toy}/other", "train.deepspeed=zero9"), "zero2"),
        (("train.output_dir={toy}/other", "data.output_dir={toy}/nothing"), "blockft prepare"),
        (("train.output_dir={toy}/other", "train.batch_rows=3", "--num-gpus", "2"), "multiple of 2"),
        (("model.path={toy}/wide", "--resume"), "another model"),
        (("train.batch_rows=2", "--resume"), "another train.batch_rows"),
        (("train.num_eval_examples=3", "--resume"), "another train.num_eval_examples"),
        (("train.output_dir={toy}/other", "data.row_len=10"), "example of"),
        (("train.output_dir={toy}/other", "model.path=data/demo/model"), "tokenizer"),
        (("train.output_dir={toy}/other", "train.lr_scheduler_type=foo"), "foo"),
        (("train.output_dir={toy}/other", "train.report_to=[foo]"), "foo"),
    ],
)
def test_runs_that_cannot_be(toy: Path, words: tuple[str, ...], said: str) -> None:
    if not (toy / "wide").exists():
        save_model(toy / "wide", hidden_size=64)
    before = sorted(str(path) for path in toy.rglob("*"))
    done = blockft("train", toy / "recipe.yaml", *(word.format(toy=toy) for word in words))
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert sorted(str(path) for path in toy.rglob("*")) == before


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.output_dir={toy}/run", "go on from its last checkpoint with --resume"),
        ("train.output_dir={toy}/begun", "begin it anew"),
        ("train.lr_scheduler_type=foo", "'foo' (allowed: linear"),
        ("train.lr_scheduler_type=reduce_lr_on_plateau", "(allowed: linear"),
        ("train.lr_scheduler_kwargs={{min: 1}}", "unexpected keyword argument 'min'"),
        ("train.lr_scheduler_type=cosine_with_min_lr", "min_lr"),
        ("train.report_to=[foo]", "foo"),
        ("model.attention=flex", "needs a GPU"),
        ("train.deepspeed={toy}/begun/list.json", "should hold a JSON object"),
        ("train.deepspeed={toy}/begun/stage.json", "should hold a JSON object"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(toy: Path, word: str, said: str) -> None:
    begun = toy / "begun"
    begun.mkdir(exist_ok=True)
    for name, text in (("recipe.yaml", ""), ("list.json", "[1]"), ("stage.json", '{"zero_optimization": 3}')):
        (begun / name).write_text(text)
    words = [f"train.output_dir={toy}/dry", word.format(toy=toy)]
    with pytest.raises(UserError, match=re.escape(said)):
        describe(load_recipe(str(toy / "recipe.yaml"), words), 1)


def test_a_run_is_no_model(toy: Path) -> None:
    with pytest.raises(UserError, match=rf"run is a run, not a model: blockft export {toy}/run FOLDER"):
        evaluate(str(toy / "run"), toy_recipe(toy))


def test_nothing_is_held_out_that_another_copy_teaches(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps({"data": [article()]}))
    words = [f"data.sources=[{{format: squad, path: {tmp_path}/squad.json}}]", "data.row_len=1024"]
    words += [
        f"data.output_dir={tmp_path}/twice",
        "data.num_copies=2",
        "data.order=shuffled",
        "train.num_eval_examples=2",
    ]
    recipe = load_recipe(str(toy / "recipe.yaml"), words)
    prepare(recipe)
    with pytest.raises(UserError, match=r"twice asks every question 2 times \(data.num_copies\)"):
        build_plan(recipe, 1)
    recipe.train.num_eval_examples = 0
    assert build_plan(recipe, 1).manifest["options"]["num_copies"] == 2


def test_a_dry_run_writes_nothing(toy: Path) -> None:
    done = blockft("train", toy / "recipe.yaml", f"train.output_dir={toy}/dry", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "5 of 4 rows" in done.stdout and "ZeRO-2" in done.stdout
    assert not (toy / "dry").exists()


def test_a_loss_that_is_not_finite_stops_the_run(toy: Path) -> None:
    done = blockft(
        "train",
        toy / "recipe.yaml",
        f"train.output_dir={toy}/nan",
        "train.learning_rate=1e39",
        "train.max_grad_norm=0",
    )
    assert done.returncode == 2 and "learning_rate" in done.stderr.splitlines()[-1]
    assert not complete_checkpoints(toy / "nan")


def test_wandb_works_offline(toy: Path) -> None:
    words = (f"train.output_dir={toy}/tracked", "train.report_to=[wandb]", "train.max_steps=1")
    done = blockft("train", toy / "recipe.yaml", *words, WANDB_MODE="offline", WANDB_DIR=str(toy))
    assert done.returncode == 0, done.stderr
    assert list((toy / "wandb").glob("offline-run-*"))


def test_eval_scores_both_modes(toy: Path, exported: Path) -> None:
    recipe = toy_recipe(toy)
    out = evaluate(str(exported), recipe)
    report = json.loads((out / "report.json").read_text())
    assert set(report["modes"]) == {"block", "full"}
    assert report["modes"]["block"]["all"]["questions"] == 10
    assert len((out / "predictions-full.jsonl").read_text().splitlines()) == 10
    with pytest.raises(UserError, match="exists already"):
        evaluate(str(exported), recipe)
    done = blockft("compare", out, "--png", toy / "compared.png")
    assert done.returncode == 0 and "block eval" in done.stdout
    assert (toy / "compared.png").stat().st_size > 0


def test_generate_reads_both_kinds_of_prompt(toy: Path, exported: Path) -> None:
    prompts: list[dict[str, Any]] = [
        {"documents": [{"title": "A", "text": "a is 7."}], "question": "What is a?"},
        {"messages": [{"role": "user", "content": ["a=7\n", "a?"]}]},
    ]
    source = toy / "prompts.jsonl"
    source.write_text("\n".join(map(json.dumps, prompts)))
    words = ("generate", exported, "--input", source, "--max-new-tokens", "3")
    done = blockft(*words, "--json")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    # the template's opening, the instruction, the document, the question
    assert [answer["blocks"] for answer in answers] == [4, 3]
    source.write_text('{"question": "no documents"}\n')
    done = blockft(*words)
    assert done.returncode == 2 and "line 1" in done.stderr and "documents" in done.stderr
