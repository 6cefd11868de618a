"""A whole run on toy data: train, resume, export, evaluate, generate, and what is refused."""

import atexit
import json
import re
import resource
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import blockft as blockft_api
from blockft.config.recipe import load_recipe
from blockft.data.prepared import load_prepared
from blockft.data.rag_prompt import Document, RagPrompt
from blockft.errors import UserError
from blockft.inference.engine import Engine
from blockft.model.checkpoint import (
    MARKER,
    complete_checkpoints,
    find_checkpoint,
    load_reference_logits,
)
from blockft.run_folder import LOSS_PLOT, METRICS, RECIPE, read_metrics
from blockft.stages import export as export_stage
from blockft.stages.dry_run import print_dry_run
from blockft.stages.evaluate import evaluate
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from blockft.stages.run_plan import build_plan
from blockft.training.library_internals import consolidate_weights
from blockft.training.plan import RunPlan
from tests.commands import blockft, finish, logged, run_ranks, start, train
from tests.data.test_squad import article
from tests.run import save_model, toy_recipe


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy recipe and its finished run on one rank."""
    folder = tmp_path_factory.mktemp("toy")
    prepare(toy_recipe(folder))
    train(folder / "recipe.yaml", folder / "run")
    return folder


@pytest.fixture(scope="module")
def exported(toy: Path) -> Path:
    return export(toy / "run", toy / "export")


def test_a_run_writes_its_recipe_metrics_plot_and_complete_checkpoints(toy: Path) -> None:
    run = toy / "run"
    assert all((run / name).is_file() for name in (RECIPE, METRICS, LOSS_PLOT))
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-4", "checkpoint-5"]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert logged(run)[-1] < logged(run)[0]


def test_a_run_without_zero_takes_the_steps_of_zero_in_bfloat16(toy: Path) -> None:
    """DeepSpeed has another optimizer class for it, which counts one step too many."""
    for stage in (0, 1):
        overrides = ("model.dtype=bfloat16", f"train.deepspeed=zero{stage}", "train.weight_decay=0.5")
        train(toy / "recipe.yaml", toy / f"bfloat16-{stage}", *overrides)
    assert_close(logged(toy / "bfloat16-0"), logged(toy / "bfloat16-1"), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_products_give_the_run_and_export_of_separate_ones(toy: Path, dtype: str) -> None:
    """Runs on GPUs share the products of adapters."""
    settings = ("train.lora={r: 8, lora_alpha: 16}", "train.num_eval_examples=4", f"model.dtype={dtype}")
    runs = {"separate": None, "shared": share_products_on_cpus}
    for name, before in runs.items():
        train(toy / "recipe.yaml", toy / f"{name}-{dtype}", *settings, before=before)
        export(toy / f"{name}-{dtype}", toy / f"{name}-{dtype}-export")
    losses = [logged(toy / f"{name}-{dtype}", "eval_loss_block") for name in runs]
    assert_close(*losses, rtol=1e-5 if dtype == "float32" else 1e-2, atol=0)


def share_products_on_cpus() -> None:
    RunPlan.shares_products = True  # type: ignore[method-assign, assignment]


def test_two_ranks_started_by_the_command_line_give_the_losses_of_one(toy: Path) -> None:
    """The launcher of DeepSpeed starts the ranks, as for a user."""
    run = toy / "run2"
    finish(start("blockft", "train", toy / "recipe.yaml", f"train.output_dir={run}", "--num-gpus", "2"))
    assert (
        json.loads((find_checkpoint(run) / MARKER).read_text())["run_signature"]["number of processes"] == 2
    )
    assert_close(logged(run), logged(toy / "run"), rtol=1e-5, atol=0)


def test_a_resumed_run_gives_the_losses_of_one_never_stopped(toy: Path) -> None:
    """As after a kill: the newest checkpoint has no marker, and the last metrics line is incomplete."""
    run, options = toy / "again", ["train.save_steps=2"]
    train(toy / "recipe.yaml", run, *options)
    assert logged(run) == logged(toy / "run")
    (run / "checkpoint-5" / MARKER).unlink()
    stray = run / "checkpoint-5" / "global_step5" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    stray.write_bytes(b"a shard of a rank that the resumed run does not have")
    with (run / METRICS).open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    train(toy / "recipe.yaml", run, *options, "--resume")
    assert logged(run) == logged(toy / "run")
    assert (run / "checkpoint-5" / MARKER).is_file() and not stray.exists()


def test_an_export_gives_the_logits_of_its_run(toy: Path, exported: Path) -> None:
    ids, positions, expected = load_reference_logits(find_checkpoint(toy / "run"))
    plain = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        assert_close(plain(input_ids=ids[None]).logits[0, positions], expected, rtol=1e-5, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(toy / "model")
    with torch.no_grad():
        untrained = before(input_ids=ids[None]).logits[0, positions]
    assert not torch.allclose(untrained, expected, atol=1e-2), "the run changed nothing"


def test_an_export_answers_through_plain_transformers(exported: Path) -> None:
    model, tokenizer = (auto.from_pretrained(exported) for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Answer.\na=7\na?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > ids.shape[1]
    # training turns the cache off, the export has the base model's setting
    assert model.config.use_cache and model(ids).past_key_values is not None


def test_an_export_holds_its_model_card_and_how_prompts_were_split(exported: Path) -> None:
    entry = json.loads((exported / "config.json").read_text())["block_attention"]
    # the run saw samples only, whose wording is their own
    assert entry == {
        "version": 1,
        "position_scheme": "reencoded",
        "sink_tokens": 0,
        "local_sees_first": False,
    }
    assert "batch_rows: 4" in (exported / "README.md").read_text()
    assert "content_hash" in (exported / "README.md").read_text()


def test_an_export_of_mixed_data_records_the_wording_of_its_questions(toy: Path) -> None:
    record = {"question": "a?", "answers": ["7"], "ctxs": [{"title": "A", "text": "a is 7."}]}
    (toy / "questions.jsonl").write_text(json.dumps(record) + "\n")
    sources = [
        {"format": "samples", "path": str(toy / "train.jsonl")},
        {"format": "fid", "path": str(toy / "questions.jsonl")},
    ]
    options = [f"data.sources={json.dumps(sources)}", f"data.output_dir={toy / 'mixed-data'}"]
    options += ["data.row_len=256", "data.order=descending", "data.prompt.instruction=Read."]
    prepare(toy_recipe(toy, *options))
    train(toy / "recipe.yaml", toy / "mixed", *options, "train.max_steps=1")
    out = export(toy / "mixed", toy / "mixed-export")
    entry = json.loads((out / "config.json").read_text())["block_attention"]
    assert (entry["documents_in"], entry["order"]) == ("user", "descending")
    assert entry["prompt"]["instruction"] == "Read."
    with Engine.load(out) as engine:
        sample = engine.parse_request({"documents": ["a is 7."], "question": "a?"})
    assert sample.blocks[0] == "Read."


def test_a_run_with_local_positions_says_so_in_its_export(toy: Path) -> None:
    run, options = toy / "local", ["train.max_steps=1", "data.positions=local"]
    train(toy / "recipe.yaml", run, *options)
    assert logged(run)[0] != logged(toy / "run")[0]
    out = export(run, toy / "local-export")
    entry = json.loads((out / "config.json").read_text())["block_attention"]
    assert entry["position_scheme"] == "local"
    done = blockft("train", toy / "recipe.yaml", f"train.output_dir={run}", "train.max_steps=2", "--resume")
    assert done.returncode == 2 and "trained with data.positions = local, but" in done.stderr


def test_a_16_bit_export_is_within_its_tolerance(toy: Path) -> None:
    export(toy / "run", toy / "export16", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(toy / "export16").dtype is torch.bfloat16


def test_an_export_that_differs_from_the_run_never_appears(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_weights(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        weights = consolidate_weights(checkpoint, dtype)
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
        return weights

    monkeypatch.setattr(export_stage, "consolidate_weights", change_weights)
    with pytest.raises(RuntimeError, match="differ"):
        export(toy / "run", toy / "changed")
    assert not [path for path in toy.iterdir() if "changed" in path.name]


def limit_file_size() -> None:
    """Let no file of this process grow beyond 20 kB until the command has ended."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_while_exporting_leaves_nothing(toy: Path) -> None:
    done = run_ranks("export", toy / "run", toy / "full", before=limit_file_size)
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr.splitlines()[-1]
    assert not [path for path in toy.iterdir() if "full" in path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "export"), "exists already"),
        (("nothing", "new"), "not a folder"),
        (("model", "new"), "no complete checkpoint"),
    ],
)
def test_an_impossible_export_is_refused(
    toy: Path, exported: Path, arguments: tuple[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(toy / arguments[0], toy / arguments[1])
    assert not (toy / "new").exists()


def test_an_unknown_type_or_shard_size_is_refused(toy: Path) -> None:
    with pytest.raises(UserError, match="float32"):
        export(toy / "run", toy / "new", dtype="float31")
    with pytest.raises(UserError, match="'lots' is not a size"):
        export(toy / "run", toy / "new", max_shard_size="lots")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exists already"),
        (("train.output_dir={toy}/other", "--resume"), "not a folder"),
        (("train.output_dir={toy}/other", "train.deepspeed=zero9"), "zero2"),
        (("train.output_dir={toy}/other", "data.output_dir={toy}/nothing"), "blockft prepare"),
        (("train.output_dir={toy}/other", "train.batch_rows=3", "--num-gpus", "2"), "multiple of 2"),
        (("model.path={toy}/wide", "--resume"), "trained with model = "),
        (("train.batch_rows=2", "--resume"), "trained with train.batch_rows = "),
        (("train.num_eval_examples=3", "--resume"), "trained with train.num_eval_examples = "),
        (("train.output_dir={toy}/other", "data.row_len=10"), "example of"),
        (("train.output_dir={toy}/other", "model.path=data/demo/model"), "tokenizer"),
        (("train.output_dir={toy}/other", "train.lr_scheduler_type=foo"), "foo"),
        (("train.output_dir={toy}/other", "train.report_to=[foo]"), "foo"),
    ],
)
def test_an_impossible_run_is_refused(toy: Path, arguments: tuple[str, ...], message: str) -> None:
    """In one line, before anything is written."""
    if not (toy / "wide").exists():
        save_model(toy / "wide", hidden_size=64)
    before = sorted(str(path) for path in toy.rglob("*"))
    done = blockft("train", toy / "recipe.yaml", *(argument.format(toy=toy) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert sorted(str(path) for path in toy.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.output_dir={toy}/run", "resume its last checkpoint with --resume"),
        ("train.output_dir={toy}/started", "start it again"),
        ("train.lr_scheduler_type=foo", "'foo' (allowed: linear"),
        ("train.lr_scheduler_type=reduce_lr_on_plateau", "(allowed: linear"),
        ("train.lr_scheduler_kwargs={{min: 1}}", "unexpected keyword argument 'min'"),
        ("train.lr_scheduler_type=cosine_with_min_lr", "min_lr"),
        ("train.report_to=[foo]", "foo"),
        ("model.attention=flex", "needs a GPU"),
        ("train.deepspeed={toy}/started/list.json", "should hold a JSON object"),
        ("train.deepspeed={toy}/started/stage.json", "it should be an object"),
    ],
)
def test_a_dry_run_refuses_the_settings_that_a_run_refuses(toy: Path, override: str, message: str) -> None:
    started = toy / "started"
    started.mkdir(exist_ok=True)
    for name, text in (("recipe.yaml", ""), ("list.json", "[1]"), ("stage.json", '{"zero_optimization": 3}')):
        (started / name).write_text(text)
    overrides = [f"train.output_dir={toy}/dry", override.format(toy=toy)]
    with pytest.raises(UserError, match=re.escape(message)):
        print_dry_run(load_recipe(str(toy / "recipe.yaml"), overrides), 1)


def test_a_run_is_not_accepted_as_a_model(toy: Path) -> None:
    with pytest.raises(
        UserError, match=rf"run is a run, not a model: export it with blockft export {toy}/run FOLDER"
    ):
        evaluate(str(toy / "run"), toy_recipe(toy))


def test_no_example_is_held_out_while_a_copy_of_it_is_trained_on(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps({"data": [article()]}))
    overrides = [
        f"data.sources=[{{format: squad, path: {tmp_path}/squad.json}}]",
        "data.row_len=1024",
        f"data.output_dir={tmp_path}/twice",
        "data.num_copies=2",
        "data.order=shuffled",
        "train.num_eval_examples=2",
    ]
    recipe = load_recipe(str(toy / "recipe.yaml"), overrides)
    prepare(recipe)
    with pytest.raises(UserError, match=r"twice asks every question 2 times \(data.num_copies\)"):
        build_plan(recipe, 1)
    overrides[-1] = "train.num_eval_examples=0"
    recipe = load_recipe(str(toy / "recipe.yaml"), overrides)
    assert build_plan(recipe, 1).manifest["options"]["num_copies"] == 2


def test_a_plan_warns_of_examples_that_are_longer_than_the_context_of_the_model(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(toy / "model", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    recipe = load_recipe(str(toy / "recipe.yaml"), [f"model.path={tmp_path}/short"])
    longest = max(example.layout.num_tokens for example in load_prepared(toy / "data").examples)
    for num_positions, warnings in ((longest, 0), (longest - 1, 1)):
        config["max_position_embeddings"] = num_positions
        (tmp_path / "short" / "config.json").write_text(json.dumps(config))
        build_plan(recipe, 1)
        err = capsys.readouterr().err
        assert err.count(f"has {longest:,} positions, but {tmp_path}/short has") == warnings, err


def test_a_dry_run_writes_nothing(toy: Path) -> None:
    done = blockft("train", toy / "recipe.yaml", f"train.output_dir={toy}/dry", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "5 of 4 rows" in done.stdout and "ZeRO-2" in done.stdout
    assert not (toy / "dry").exists()


def test_a_dry_run_prints_the_next_command_and_how_the_rows_are_padded(toy: Path) -> None:
    overrides = (f"train.output_dir={toy}/dry", "train.batch_rows=7", "train.max_steps=100")
    done = blockft("train", toy / "recipe.yaml", *overrides, "--num-gpus", "1", "--dry-run")
    warning, *_, command = done.stderr.splitlines()
    assert re.fullmatch(
        r"blockft: warning: train.max_steps is 100, but 1 epoch of the data has only \d+ steps?: raise "
        "train.num_train_epochs to train longer",
        warning,
    )
    assert command == f"next: blockft train {toy / 'recipe.yaml'} {' '.join(overrides)} --num-gpus 1"
    assert "padded to a multiple of train.batch_rows 7" in re.sub(r"[\s│]+", " ", done.stdout)


def test_gathering_the_weights_of_a_checkpoint_prints_nothing(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consolidate_weights(find_checkpoint(toy / "run"), torch.float32)
    assert capsys.readouterr() == ("", "")


def test_the_files_of_a_checkpoint_have_the_same_permissions(toy: Path) -> None:
    files = [path for path in find_checkpoint(toy / "run").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode & 0o666 for path in files}) == 1


def test_a_loss_that_is_not_finite_stops_the_run(toy: Path) -> None:
    overrides = (f"train.output_dir={toy}/nan", "train.learning_rate=1e39", "train.max_grad_norm=0")
    done = run_ranks("train", toy / "recipe.yaml", *overrides)
    assert done.returncode == 2 and "learning_rate" in done.stderr.splitlines()[-1]
    assert not complete_checkpoints(toy / "nan")


def train_with_the_api(recipe: Path, run: Path) -> None:
    assert (
        blockft_api.train(load_recipe(str(recipe), [f"train.output_dir={run}", "train.max_steps=2"])) == run
    )
    for thread in threading.enumerate():
        if thread.name.startswith("prefetch"):
            thread.join(600)
            assert not thread.is_alive()


def test_a_process_can_train_twice(toy: Path) -> None:
    """As in a notebook: the first run leaves nothing that changes the second one."""
    recipe, first, second = toy / "recipe.yaml", toy / "first", toy / "second"
    train(recipe, second, "train.max_steps=2", before=partial(train_with_the_api, recipe, first))
    assert logged(first) == logged(second) and len(logged(first)) == 2


def train_with_zero3_and_export(recipe: Path, run: Path, model: Path) -> None:
    overrides = [f"train.output_dir={run}", "train.max_steps=1", "train.deepspeed=zero3"]
    blockft_api.train(load_recipe(str(recipe), overrides))
    blockft_api.export(run, model)


def test_a_process_can_export_after_a_zero3_run(toy: Path) -> None:
    recipe, run, model = toy / "recipe.yaml", toy / "zero3", toy / "zero3-model"
    before = partial(train_with_zero3_and_export, recipe, run, model)
    train(recipe, toy / "after-zero3", "train.max_steps=1", before=before)
    assert (model / "model.safetensors").is_file()


def test_wandb_gets_the_recipe_the_data_the_speed_and_the_loss_plot(toy: Path) -> None:
    overrides = ("train.report_to=[wandb]", "train.max_steps=1")
    train(toy / "recipe.yaml", toy / "tracked", *overrides, WANDB_MODE="offline")
    (run,) = (toy / "tracked" / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    logged_bytes = log.read_bytes()
    # the project and the run bear the names of the recipe and of the run's folder
    for text in (b"recipe/tracked", b"content_hash", b'"batch_rows":4', b"train/tokens_per_s"):
        assert text in logged_bytes, text
    assert list((run / "files").rglob("loss plot*.png"))


def test_eval_scores_both_modes(toy: Path, exported: Path) -> None:
    recipe = toy_recipe(toy)
    assert recipe.eval
    report, out = evaluate(str(exported), recipe), Path(recipe.eval.output_dir)
    assert set(report["modes"]) == {"block", "full"}
    assert report["modes"]["block"]["all"]["questions"] == 10
    assert len((out / "predictions-full.jsonl").read_text().splitlines()) == 10
    with pytest.raises(UserError, match="exists already"):
        evaluate(str(exported), recipe)
    done = blockft("compare", out, "--png", toy / "compared.png")
    assert done.returncode == 0 and "block mode" in done.stdout
    assert (toy / "compared.png").stat().st_size > 0


def test_a_pushed_export_shows_the_scores_of_a_report(
    toy: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(toy, f"eval.output_dir={toy}/scores", "eval.max_samples=2")
    evaluate(str(exported), recipe)
    monkeypatch.setattr(export_stage, "check_push", lambda repo_id: None)
    pushed: list[tuple[Path, str, bool]] = []

    def push_folder(folder: Path, repo_id: str, *, private: bool) -> str:
        assert (folder / "config.json").is_file(), "an export is pushed when it is complete"
        pushed.append((folder, repo_id, private))
        return "https://huggingface.co/me/mine"

    monkeypatch.setattr(export_stage, "push_folder", push_folder)
    out = export(toy / "run", toy / "pushed", report=toy / "scores", push="me/mine")
    assert pushed == [(out, "me/mine", True)]
    card = (out / "README.md").read_text()
    assert "on 2 questions" in card and "| metric | block mode | full mode |" in card
    assert 'from_pretrained("me/mine")' in card and str(toy) not in card.split("## Recipe")[0]
    with pytest.raises(UserError, match="holds no report.json"):
        export(toy / "run", toy / "new", report=toy / "run")
    assert not (toy / "new").exists()


def test_generate_answers_chats_and_has_no_wording_for_documents(toy: Path, exported: Path) -> None:
    source = toy / "prompts.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": ["a=7\n", "a?"]}]}))
    arguments = ("generate", exported, "--input", source, "--max-new-tokens", "3")
    done = blockft(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    # three blocks: the template's opening, the document, the question
    assert [answer["blocks"] for answer in answers] == [3]
    documents = [{"title": "A", "text": "a is 7."}]
    source.write_text(json.dumps({"documents": documents, "question": "What is a?"}))
    done = blockft(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "line 1: the model was trained without a wording for documents" in done.stderr
    with pytest.raises(UserError, match="without a wording for documents"):
        evaluate(str(exported), source, format="fid")
    with Engine.load(exported) as engine, pytest.raises(UserError, match="without a wording for documents"):
        engine.document_keys([Document(title="A", text="a is 7.")])
    with Engine.load(exported, prompt=RagPrompt()) as engine:
        assert engine.generate(documents=["a is 7."], question="a?", max_new_tokens=1).ids
    source.write_text('{"question": "no documents"}\n')
    done = blockft(*arguments)
    assert done.returncode == 2 and "line 1" in done.stderr and "documents" in done.stderr
