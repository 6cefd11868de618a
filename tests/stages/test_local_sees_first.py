"""A run whose documents see the first block: losses, answers and export equal the masked forward pass."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from blockft.config.recipe import load_recipe
from blockft.data.encoder import IGNORE_INDEX, Encoder
from blockft.data.prepared import PreparedData, load_prepared
from blockft.errors import UserError
from blockft.inference.engine import Engine
from blockft.model.checkpoint import find_checkpoint
from blockft.model.load import load_config, load_model, load_tokenizer
from blockft.model.masked_forward import masked_logits
from blockft.run_folder import read_metrics, read_sample_answers
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from blockft.stages.run_plan import build_plan, check_run, warn_of_settings
from blockft.training.plan import hold_out_examples
from tests.commands import blockft, train
from tests.run import toy_recipe

SWITCH = "data.local_sees_first=true"
SETTINGS = (
    SWITCH,
    "train.num_eval_examples=6",
    "train.max_steps=3",
    "train.sample_steps=3",
    "train.num_sample_prompts=2",
    "train.sample_max_new_tokens=4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy recipe, its data, a finished run and its export."""
    folder = tmp_path_factory.mktemp("first")
    prepare(toy_recipe(folder, *SETTINGS))
    train(folder / "recipe.yaml", folder / "run", *SETTINGS)
    export(folder / "run", folder / "export")
    return folder


def held_out(prepared: PreparedData) -> list[int]:
    _, indices = hold_out_examples(prepared.examples.columns, 6, seed=0)
    return [int(index) for index in indices]


def test_the_first_block_is_the_instruction_with_the_markup_before_it(folder: Path) -> None:
    example = load_prepared(folder / "data").examples[0]
    tokenizer = load_tokenizer(str(folder / "model"))
    assert tokenizer.decode(example.blocks[0]) == "<|user|>Answer.\n"


@pytest.mark.parametrize("mode", ["block", "full"])
def test_the_held_out_loss_is_that_of_the_export_in_the_masked_forward_pass(folder: Path, mode: str) -> None:
    model = load_model(str(folder / "export"), backend="sdpa", dtype=torch.float32)
    assert model.config.block_attention["local_sees_first"] is True
    prepared = load_prepared(folder / "data")
    examples = [prepared.examples[index] for index in held_out(prepared)]

    def loss(local_sees_first: bool) -> torch.Tensor:
        model.config.block_attention["local_sees_first"] = local_sees_first
        losses = []
        for example in examples:
            with torch.no_grad():
                logits = masked_logits(model, example.input_ids.tolist(), [example.layout_in_mode(mode)])
            labels = torch.from_numpy(example.labels.astype(np.int64))
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none"))
            losses[-1] = losses[-1][labels[1:] != IGNORE_INDEX]
        return torch.cat(losses).mean()

    metrics = [line for line in read_metrics(folder / "run") if f"eval_loss_{mode}" in line][-1]
    found = torch.tensor(metrics[f"eval_loss_{mode}"])
    assert metrics["step"] == 3
    assert_close(found, loss(True), rtol=1e-5, atol=0)
    if mode == "block":
        assert abs(found - loss(False)) > 1e-3
    else:
        assert_close(loss(False), loss(True), rtol=0, atol=0)


def test_sample_answers_are_those_of_the_export_in_the_masked_forward_pass(folder: Path) -> None:
    model = load_model(str(folder / "export"), backend="sdpa", dtype=torch.float32)
    tokenizer, prepared = load_tokenizer(str(folder / "model")), load_prepared(folder / "data")
    examples = {prepared.examples[i].sample_ids[0]: prepared.examples[i] for i in held_out(prepared)}
    records = read_sample_answers(folder / "run")
    assert [record["mode"] for record in records] == ["block", "full"] * 2
    for record in records:
        example = examples[record["sample_id"]]
        ids = example.input_ids[: example.label_spans[0][0]].tolist()
        new_ids: list[int] = []
        while len(new_ids) < 4 and (not new_ids or new_ids[-1] not in Encoder(tokenizer).end_token_ids):
            lengths = (*example.block_lengths[:-1], len(ids) + len(new_ids) - sum(example.block_lengths[:-1]))
            layout = type(example.layout)(lengths)
            layout = layout.full() if record["mode"] == "full" else layout
            with torch.no_grad():
                new_ids.append(int(masked_logits(model, ids + new_ids, [layout], 1)[-1].argmax()))
        assert record["answer"] == tokenizer.decode(new_ids, skip_special_tokens=True)


def test_the_engine_answers_as_the_run_does(folder: Path) -> None:
    """The engine splits a request into the blocks of training, and reads them from its cache."""
    prepared = load_prepared(folder / "data")
    samples = {sample.id: sample for i in held_out(prepared) for sample in prepared.read_samples(i)}
    records = [r for r in read_sample_answers(folder / "run") if r["mode"] == "block"]
    with Engine.load(folder / "export") as engine:
        for record in [*records, *records]:
            messages = [
                {"role": m.role, "content": [*m.content]} for m in samples[record["sample_id"]].messages
            ]
            answer = engine.generate(messages=messages, max_new_tokens=4)
            assert answer.text == record["answer"]
        assert answer.blocks_reused == len(messages[0]["content"]) - 1


def test_an_export_says_that_documents_see_the_first_block(folder: Path) -> None:
    entry = json.loads((folder / "export" / "config.json").read_text())["block_attention"]
    assert entry["local_sees_first"] is True
    assert "also attends to the first block" in (folder / "export" / "README.md").read_text()


def test_an_adapter_and_its_checkpoint_say_it_as_well(folder: Path) -> None:
    """A checkpoint with an adapter can be opened as a model, without an export."""
    train(folder / "recipe.yaml", folder / "adapter-run", *SETTINGS, "train.lora={r: 2}")
    out = export(folder / "adapter-run", folder / "adapter", adapter_only=True)
    assert json.loads((out / "block_attention.json").read_text())["local_sees_first"] is True
    checkpoint = find_checkpoint(folder / "adapter-run")
    entries = [load_config(str(path)).block_attention for path in (checkpoint, out, folder / "export")]
    assert entries[0] == entries[1] == entries[2]


def test_a_run_in_full_mode_alone_has_no_copies_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = (*SETTINGS, "data.modes=[full]", f"train.output_dir={folder}/full")
    recipe = load_recipe(str(folder / "recipe.yaml"), overrides)
    plan = build_plan(recipe, 1)
    assert plan.rows.num_copied_tokens == 0
    warn_of_settings(recipe, plan)
    assert "data.local_sees_first has no effect: data.modes lacks block" in capsys.readouterr().err
    train(folder / "recipe.yaml", folder / "full", *overrides)
    out = export(folder / "full", folder / "full-export")
    assert json.loads((out / "config.json").read_text())["block_attention"]["local_sees_first"] is False


def test_a_dry_run_and_prepare_count_the_copies(folder: Path) -> None:
    arguments = (folder / "recipe.yaml", *SETTINGS)
    done = blockft("train", *arguments, f"train.output_dir={folder}/dry", "--dry-run", COLUMNS="200")
    plan = build_plan(load_recipe(str(folder / "recipe.yaml"), SETTINGS), 1)
    num_copied = plan.rows.num_copied_tokens
    assert f"{num_copied:,} tokens ({num_copied / plan.rows.num_tokens:.1%})" in done.stdout
    done = blockft("prepare", *arguments, f"data.output_dir={folder}/again")
    assert "of the tokens are copies of first blocks" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.local_sees_first=false"], "was prepared with data.local_sees_first true.*recipe has false"),
        (["data.row_len=60"], r"holds an example of \d+ tokens, copies of its first block included"),
    ],
)
def test_data_that_do_not_fit_are_refused(folder: Path, overrides: list[str], message: str) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"), [*SETTINGS, *overrides])
    with pytest.raises(UserError, match=message) as error:
        build_plan(recipe, 1)
    assert "\n" not in str(error.value)


def test_data_for_full_mode_alone_are_prepared_without_copies(folder: Path) -> None:
    """Copies would make samples too long that full mode takes."""
    row_len = max(load_prepared(folder / "data").examples.columns.lengths)
    overrides = ["data.modes=[full]", f"data.row_len={row_len}"]
    folders = [Path(f"{folder}/full-data-{switch}") for switch in (True, False)]
    for switch, output in zip((True, False), folders, strict=True):
        settings = [*SETTINGS, f"data.local_sees_first={switch}", f"data.output_dir={output}"]
        prepare(load_recipe(str(folder / "recipe.yaml"), [*settings, *overrides]))
    with_switch, without = map(load_prepared, folders)
    assert len(with_switch.examples) == len(without.examples) == len(load_prepared(folder / "data").examples)
    assert with_switch.manifest["content_hash"] == without.manifest["content_hash"]
    assert with_switch.manifest["options"]["local_sees_first"] is False
    block = load_recipe(str(folder / "recipe.yaml"), [*SETTINGS, f"data.output_dir={folders[0]}"])
    with pytest.raises(UserError, match=r"prepared with data.local_sees_first false.*recipe has true"):
        build_plan(block, 1)


def test_full_mode_trains_on_data_of_either_kind(folder: Path) -> None:
    overrides = [*SETTINGS, "data.modes=[full]", "data.local_sees_first=false"]
    build_plan(load_recipe(str(folder / "recipe.yaml"), overrides), 1)


def test_positions_from_0_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="data has local_sees_first with positions local.*set positions"):
        load_recipe(str(folder / "recipe.yaml"), [SWITCH, "data.positions=local"])


def test_a_run_is_not_resumed_without_the_switch(folder: Path) -> None:
    """Full mode takes data of either kind, so the run signature must tell the runs apart."""
    train(folder / "recipe.yaml", folder / "again-run", *SETTINGS, "data.modes=[full]")
    overrides = [*SETTINGS, "data.modes=[full]", "data.local_sees_first=false", "train.max_steps=4"]
    recipe = load_recipe(str(folder / "recipe.yaml"), [*overrides, f"train.output_dir={folder}/again-run"])
    with pytest.raises(UserError, match=r"trained with data\.local_sees_first = True, but .* False"):
        check_run(recipe, resume=True, num_processes=1)


def test_training_such_a_model_without_the_switch_is_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"model.path={folder}/export"
    for switch, warns in (("true", False), ("false", True)):
        overrides = [model, f"data.local_sees_first={switch}", f"data.output_dir={tmp_path}/{switch}"]
        recipe = toy_recipe(folder, *overrides)
        prepare(recipe)
        capsys.readouterr()
        warn_of_settings(recipe, build_plan(recipe, 1))
        assert ("was trained with local_sees_first true" in capsys.readouterr().err) is warns
