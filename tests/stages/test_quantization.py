"""LoRA runs on weights in 4 bits, and runs with 8-bit AdamW: trained, killed, resumed and exported."""

import json
import shutil
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from blockft.errors import UserError
from blockft.inference.engine import Engine
from blockft.model.base_quantization import BASE_QUANTIZATION
from blockft.model.checkpoint import find_checkpoint, load_reference_logits, read_marker
from blockft.model.load import load_model
from blockft.model.nf4 import round_to_nf4
from blockft.run_folder import METRICS
from blockft.stages.evaluate import evaluate
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from blockft.stages.run_plan import build_plan, check_run
from tests import gpu_runs
from tests.commands import all_logged, logged, run_ranks, start_ranks, train
from tests.hold import Hold
from tests.run import toy_recipe
from tests.stages.test_checkpoint_files import count_trained, shard_bytes

pytest.importorskip("bitsandbytes")

NF4 = ("model.quantization=nf4", "train.lora={r: 8, lora_alpha: 16}")
ADAM_8BIT = ("train.optimizer=adamw_8bit",)
STEPS = ("train.num_train_epochs=2", "train.save_steps=4", "train.num_eval_examples=6")
KINDS = {"nf4": NF4, "adamw_8bit": ADAM_8BIT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantization")
    prepare(toy_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run of an adapter on quantised weights."""
    run = folder / "run"
    train(folder / "recipe.yaml", run, *NF4, *STEPS, "train.deepspeed=zero2")
    return run


def test_the_loss_falls_and_no_checkpoint_holds_weights_of_the_base(run: Path) -> None:
    losses = logged(run)
    assert losses[-1] < losses[0] - 0.5
    checkpoint = find_checkpoint(run)
    assert 0 <= shard_bytes(checkpoint) - 12 * count_trained(checkpoint, run) < 2000
    assert all(".lora_" in name for name in load_file(checkpoint / "adapter_model.safetensors"))


def test_the_run_starts_from_the_rounded_weights(run: Path, folder: Path) -> None:
    train(folder / "recipe.yaml", folder / "plain", NF4[1], *STEPS, "train.max_steps=1")
    plain, quantized = (logged(folder / name, "eval_loss_full")[0] for name in ("plain", "run"))
    assert plain != quantized and quantized == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("stage", [0, 1])
def test_every_stage_and_recomputation_give_the_same_losses(run: Path, folder: Path, stage: int) -> None:
    other = folder / f"run-{stage}"
    settings = ("train.gradient_checkpointing=full", "train.torch_compile=false")
    train(folder / "recipe.yaml", other, *NF4, *STEPS, *settings, f"train.deepspeed=zero{stage}")
    assert_close(logged(other), logged(run), rtol=1e-5, atol=0)


def test_two_ranks_give_the_losses_of_one_and_resume_on_one(run: Path, folder: Path) -> None:
    other, settings = folder / "two-ranks", (*NF4, *STEPS, "train.deepspeed=zero2")
    recipe = folder / "recipe.yaml"
    train(recipe, other, *settings, num_ranks=2)
    assert_close(logged(other), logged(run), rtol=1e-5, atol=0)
    shutil.rmtree(find_checkpoint(other))
    train(recipe, other, *settings, "--resume", num_ranks=1)
    assert_close(logged(other), logged(run), rtol=1e-3, atol=0)


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None]).logits[0]
    return logits


def test_a_merged_export_holds_the_quantised_numbers(run: Path, folder: Path) -> None:
    out = export(run, folder / "merged")
    ids, positions, expected = load_reference_logits(find_checkpoint(run))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert_close(logits_of(model, ids)[positions], expected, rtol=1e-5, atol=1e-5)
    base = load_file(folder / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    adapter = load_file(export(run, folder / "adapter", adapter_only=True) / "adapter_model.safetensors")
    part = f"base_model.{name.removesuffix('.weight')}".replace("base_model.", "base_model.model.", 1)
    delta = 2 * adapter[f"{part}.lora_B.weight"] @ adapter[f"{part}.lora_A.weight"]
    assert_close(model.get_parameter(name), round_to_nf4(base[name]) + delta)
    assert "quantised to 4 bits" in (out / "README.md").read_text()


def test_an_adapter_is_read_on_the_numbers_that_it_was_trained_on(run: Path, folder: Path) -> None:
    out = export(run, folder / "adapter-2", adapter_only=True)
    assert json.loads((out / BASE_QUANTIZATION).read_text()) == {"scheme": "nf4", "dtype": "float32"}
    assert "BitsAndBytesConfig" in (out / "README.md").read_text()
    merged = export(run, folder / "merged-2")
    models = [load_model(str(path), backend="sdpa", dtype=torch.float32) for path in (out, merged)]
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert_close(first, second, rtol=1e-6, atol=1e-6)
    messages = [{"role": "user", "content": ["Answer.\n", "a=7\n", "a?"]}]
    answers = []
    for path in (out, merged):
        with Engine.load(path, device="cpu") as engine:
            answers.append(engine.generate(messages=messages, max_new_tokens=3).text)
    assert answers[0] == answers[1]
    report = evaluate(str(out), toy_recipe(folder, f"eval.output_dir={folder}/eval-adapter"))
    assert report


def test_a_checkpoint_opened_as_a_model_has_the_weights_of_its_export(run: Path, folder: Path) -> None:
    paths = (find_checkpoint(run), export(run, folder / "merged-3"))
    first, second = (load_model(str(path), backend="sdpa", dtype=torch.float32) for path in paths)
    for name, weight in first.named_parameters():
        assert_close(weight, second.get_parameter(name), rtol=1e-6, atol=1e-6)


def test_a_run_on_an_adapter_is_refused(run: Path, folder: Path) -> None:
    """It could not be exported."""
    recipe = toy_recipe(folder, f"model.path={find_checkpoint(run)}")
    with pytest.raises(UserError, match="is an adapter, .*merge it into its base model"):
        build_plan(recipe, 1)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"scheme": "int8", "dtype": "float32"}'])
def test_a_malformed_record_of_the_quantisation_is_refused(run: Path, folder: Path, text: str) -> None:
    out = folder / "adapter-3"
    if not out.exists():
        export(run, out, adapter_only=True)
    (out / "digests.json").unlink(missing_ok=True)
    (out / BASE_QUANTIZATION).write_text(text)
    with pytest.raises(UserError, match=rf"^{out / BASE_QUANTIZATION} "):
        load_model(str(out), backend="sdpa", dtype=torch.float32)


def test_a_changed_or_missing_record_of_the_quantisation_is_damage(run: Path, folder: Path) -> None:
    out = export(run, folder / "adapter-4", adapter_only=True)
    (out / BASE_QUANTIZATION).write_text('{"scheme": "nf4", "dtype": "bfloat16"}')
    with pytest.raises(UserError, match=f"is damaged .*{BASE_QUANTIZATION}"):
        load_model(str(out), backend="sdpa", dtype=torch.float32)
    (out / BASE_QUANTIZATION).unlink()
    with pytest.raises(UserError, match=f"is damaged .*{BASE_QUANTIZATION}"):
        load_model(str(out), backend="sdpa", dtype=torch.float32)


def test_a_run_in_16_bits_is_exported_within_its_tolerance(folder: Path) -> None:
    run, settings = folder / "bf16", ("model.dtype=bfloat16", "train.max_steps=2")
    train(folder / "recipe.yaml", run, *NF4, *settings, "train.deepspeed=zero1")
    ids, positions, expected = load_reference_logits(find_checkpoint(run))
    for dtype in ("float32", "bfloat16"):
        out = export(run, folder / f"bf16-to-{dtype}", dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert (logits_of(model, ids)[positions] - expected).norm() / expected.norm() < 1e-2
    adapter = export(run, folder / "bf16-adapter", adapter_only=True, dtype="float32")
    opened = load_model(str(adapter), backend="sdpa", dtype=torch.float32)
    exact = load_model(str(folder / "bf16-to-float32"), backend="sdpa", dtype=torch.float32)
    for first, second in zip(opened.parameters(), exact.parameters(), strict=True):
        assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_8_bit_adam_gives_almost_the_losses_of_adam(folder: Path, stage: int) -> None:
    run = folder / f"adam-8bit-{stage}"
    train(folder / "recipe.yaml", run, *ADAM_8BIT, *STEPS, f"train.deepspeed=zero{stage}")
    if not (folder / "adam").exists():
        train(folder / "recipe.yaml", folder / "adam", *STEPS, "train.deepspeed=zero2")
    losses, expected = logged(run), logged(folder / "adam")
    assert losses != expected
    assert_close(losses, expected, rtol=0.1, atol=0)
    out = export(run, folder / f"adam-8bit-export-{stage}")
    ids, positions, expected = load_reference_logits(find_checkpoint(run))
    logits = logits_of(AutoModelForCausalLM.from_pretrained(out), ids)[positions]
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, stage", [("nf4", 2), *(("adamw_8bit", stage) for stage in range(4))])
def test_a_killed_run_resumes_as_if_never_killed(folder: Path, kind: str, stage: int) -> None:
    settings = (*KINDS[kind], *STEPS, f"train.deepspeed=zero{stage}")
    names = [f"{state}-{kind}-{stage}" for state in ("whole", "killed")]
    whole, killed = (folder / name for name in names)
    train(folder / "recipe.yaml", whole, *settings, num_ranks=2)
    hold = Hold(
        folder / f"hold-{kind}-{stage}", "blockft.training.run_callback:RunCallback.on_step_end", call=6
    )
    arguments = ("train", folder / "recipe.yaml", f"train.output_dir={killed}", *settings)
    ranks = start_ranks(*arguments, num_ranks=2, before=hold)
    hold.wait_until_reached(ranks.is_alive, num_processes=2)
    assert '"step": 5, "loss"' in (killed / METRICS).read_text()
    ranks.send_signal(signal.SIGKILL)
    ranks.wait()
    train(folder / "recipe.yaml", killed, *settings, "--resume", num_ranks=2)
    assert all_logged(killed) == all_logged(whole)


def test_8_bit_adam_is_not_resumed_by_another_number_of_processes(folder: Path) -> None:
    run, settings = folder / "resharded", (*ADAM_8BIT, *STEPS, "train.deepspeed=zero1")
    train(folder / "recipe.yaml", run, *settings, "train.max_steps=4", num_ranks=2)
    before = sorted(path.name for path in run.iterdir())
    done = run_ranks("train", folder / "recipe.yaml", f"train.output_dir={run}", *settings, "--resume")
    assert done.returncode == 2, done.stderr
    assert "was written with number of processes = 2, but now it is 1: " in done.stderr
    assert "train.optimizer=adamw_8bit" in done.stderr
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize(
    ("overrides", "entry"),
    [
        (("train.lora={r: 8, lora_alpha: 16}",), "model.quantization = nf4, but this recipe gives None"),
        ((*NF4, *ADAM_8BIT), "train.optimizer = adamw, but this recipe gives adamw_8bit"),
    ],
)
def test_a_run_is_not_resumed_with_another_quantisation(
    run: Path, folder: Path, overrides: tuple[str, ...], entry: str
) -> None:
    assert read_marker(find_checkpoint(run))["run_signature"]["model.quantization"] == "nf4"
    recipe = toy_recipe(folder, f"train.output_dir={run}", *STEPS, *overrides)
    with pytest.raises(UserError, match=entry):
        check_run(recipe, resume=True, num_processes=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.quantization=nf4",), "trains only an adapter.*: set train.lora$"),
        ((*NF4, "train.deepspeed=zero3"), "does not work under ZeRO-3.*: take zero2$"),
        ((NF4[0], "train.lora={use_dora: true}"), "use_dora needs weights that are not quantised"),
        ((NF4[0], "train.lora={init_lora_weights: pissa}"), "'pissa' changes the weights of the model"),
        ((NF4[0], "train.lora={init_lora_weights: olora}"), "'olora' changes the weights of the model"),
        (
            (NF4[0], "train.lora={target_modules: [q_proj], modules_to_save: [up_proj]}"),
            "modules_to_save names",
        ),
        ((NF4[0], "train.lora={target_modules: [q_proj], modules_to_save: [mlp]}"), "modules_to_save names"),
        ((*ADAM_8BIT, "train.deepspeed=zero2-offload"), "zero2-offload, which has a section optimizer"),
        ((*ADAM_8BIT, "train.deepspeed=zero3-offload"), "zero3-offload, which has a section optimizer"),
        ((*ADAM_8BIT, "train.deepspeed={folder}/adam.json"), "adam.json, which has a section optimizer"),
        (
            (*ADAM_8BIT, "train.deepspeed={folder}/offload.json"),
            "which has zero_optimization.offload_optimizer",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    folder: Path, overrides: tuple[str, ...], message: str
) -> None:
    (folder / "adam.json").write_text('{"optimizer": {"type": "AdamW", "params": {}}}')
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (folder / "offload.json").write_text(
        json.dumps({"zero_force_ds_cpu_optimizer": False, "zero_optimization": offload})
    )
    settings = [override.replace("{folder}", str(folder)) for override in overrides]
    with pytest.raises(UserError, match=message):
        build_plan(toy_recipe(folder, f"train.output_dir={folder}/never", *settings), 1)
    assert not (folder / "never").exists()


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_missing_package_is_named(folder: Path, settings: tuple[str, ...]) -> None:
    with (
        patch("importlib.util.find_spec", return_value=None),
        pytest.raises(UserError, match=r"needs the package bitsandbytes.*blockft\[quantization\]'$"),
    ):
        build_plan(toy_recipe(folder, f"train.output_dir={folder}/never", *settings), 1)


def test_modules_outside_of_the_decoder_layers_can_be_saved(folder: Path) -> None:
    """The norm at the end is not quantised."""
    lora = "train.lora={r: 4, target_modules: [q_proj], modules_to_save: [model.norm]}"
    settings = (NF4[0], lora, "train.max_steps=2", "train.deepspeed=zero1")
    train(folder / "recipe.yaml", folder / "norm", *settings)
    export(folder / "norm", folder / "norm-export")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["true", "false"])
def test_a_quantised_run_on_a_gpu_is_exported(tmp_path: Path, compile: str) -> None:
    prepare(toy_recipe(tmp_path, **gpu_runs.SIZE))
    settings = (*NF4, *STEPS, f"train.torch_compile={compile}", "train.gradient_checkpointing=full")
    train(tmp_path / "recipe.yaml", tmp_path / "run", *settings, *ADAM_8BIT)
    losses = logged(tmp_path / "run")
    assert losses[-1] < losses[0]
    export(tmp_path / "run", tmp_path / "export", dtype="float32")
