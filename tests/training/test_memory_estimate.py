"""The estimate of memory agrees with the tensors that training allocates."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

from blockft.model.gradient_checkpointing import checkpoint_layers
from blockft.model.load import build_meta_model
from blockft.model.lora import add_adapter
from blockft.model.random_model import load_shape_config
from blockft.training.layer_memory import measure_layers, measure_loss
from blockft.training.memory_estimate import (
    KINDS,
    ModelMemory,
    RunMemory,
    choose_kind,
    estimate_memory,
    longest_row,
    measure_model,
)
from blockft.training.objectives import label_loss
from blockft.training.tensor_memory import TensorMemory

SIZE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": lambda **size: LlamaConfig(**SIZE | size),
    "qwen3": lambda **size: Qwen3Config(**SIZE | {"head_dim": 16} | size),
    "gemma3": lambda **size: Gemma3TextConfig(**SIZE | {"head_dim": 16, "sliding_window": 100} | size),
    "phi3": lambda **size: Phi3Config(**SIZE | size),
}
ROW_LEN = 1024
LORA_WITH_DROPOUT = {"r": 4, "lora_dropout": 0.1}
LORA_OF_SOME_LAYERS = [
    {"r": 4, "layers_to_transform": [4, 5], "target_modules": ["k_proj", "v_proj", "down_proj"]},
    {"r": 4, "layers_to_transform": [3], "target_modules": ["q_proj", "up_proj"]},
]


def meta_model(family: str, lora: dict[str, Any] | None = None, **size: int) -> PreTrainedModel:
    model: Any = build_meta_model(FAMILIES[family](**size))
    if lora is not None:
        model = add_adapter(model, lora, seed=0).get_base_model()
    return model.to(torch.bfloat16)  # type: ignore[no-any-return]


def sft_loss_bytes() -> float:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return label_loss(SimpleNamespace(logits=logits), torch.zeros(logits.shape[:2], dtype=torch.long), 1)

    return measure_loss(loss, dtype=torch.bfloat16)


class KeepAsFlex(torch.autograd.Function):
    """Keeps what FlexAttention keeps for its backward pass, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q_BHTD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out_BHTD = torch.empty_like(q_BHTD)
        ctx.save_for_backward(q_BHTD, keys, values, out_BHTD, q_BHTD.new_empty(q_BHTD.shape[:3]).float())
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def attend(module: torch.nn.Module, *tensors: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    return KeepAsFlex.apply(*tensors[:3]).transpose(1, 2).contiguous(), None  # type: ignore


AttentionInterface.register("keeps_as_flex", attend)


def measure_backward_peak(family: str, lora: dict[str, Any] | None, kind: str) -> float:
    """Return the peak of what a forward and a backward pass allocate, gradients included."""
    base: Any = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="keeps_as_flex")
    model = base if lora is None else add_adapter(base, lora, seed=0)
    model.to(torch.bfloat16).train()
    checkpoint_layers(base, kind)
    ids, positions = torch.ones(1, ROW_LEN, dtype=torch.long), torch.arange(256)
    with TensorMemory(model.parameters()) as memory:
        outputs = model(input_ids=ids, position_ids=ids, logits_to_keep=positions, use_cache=False)
        loss = label_loss(outputs, torch.ones(1, 256, dtype=torch.long), 256)
        del outputs
        loss.backward()
        return memory.peak_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, LORA_WITH_DROPOUT])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_agrees_with_a_step_of_every_family(
    family: str, lora: dict[str, Any] | None, kind: str
) -> None:
    model = measure_model(meta_model(family, lora), compiled=False, loss_bytes=sft_loss_bytes())
    run = RunMemory(deepspeed={}, num_processes=1, row_len=ROW_LEN, num_labels=256, accumulates=False)
    parts = estimate_memory(model, run, kind).components
    names = ("gradients", "activations", "logits, or the first layer's backward pass")
    expected = sum(parts.get(name, 0) for name in names)
    assert expected == pytest.approx(measure_backward_peak(family, lora, kind), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", LORA_OF_SOME_LAYERS, ids=str)
def test_layers_below_the_first_adapter_keep_nothing(lora: dict[str, Any], kind: str) -> None:
    test_the_estimate_agrees_with_a_step_of_every_family("llama", lora, kind)


def test_a_layer_keeps_what_can_be_counted_by_hand() -> None:
    """Of a Llama layer: the inputs of its matrix products, and for each norm its input in float32."""
    hidden, kv, mlp, heads = SIZE["hidden_size"], 32, SIZE["intermediate_size"], SIZE["num_attention_heads"]
    norm = 4 * hidden + 4 + 2 * hidden  # in float32, a number for each token, normalized
    attention = 2 * (hidden + 2 * kv) + 4 * heads + 2 * hidden
    layer = measure_layers(meta_model("llama"), compiled=False)[0]
    assert layer.kept.per_token == 2 * norm + 2 * 2 * hidden + attention + 4 * 2 * mlp
    assert layer.input.per_token == 2 * hidden


@pytest.mark.parametrize("lora", [None, {"r": 4}, LORA_WITH_DROPOUT])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_layer_keeps_less_than_an_eager_one(family: str, lora: dict[str, Any] | None) -> None:
    model = meta_model(family, lora, num_hidden_layers=1)
    eager, compiled = (measure_layers(model, compiled=compiled)[0] for compiled in (False, True))
    assert compiled.input.per_token < compiled.kept.per_token < eager.kept.per_token
    assert compiled.backward.per_token > 0


def test_a_compiled_layer_keeps_what_can_be_counted_by_hand() -> None:
    """Of a Llama layer: both residual streams, the normalized inputs, what attention and the MLP multiply."""
    hidden, kv, mlp, heads = SIZE["hidden_size"], 32, SIZE["intermediate_size"], SIZE["num_attention_heads"]
    layer = measure_layers(meta_model("llama", num_hidden_layers=1), compiled=True)[0]
    norms = 2 * (2 * hidden + 4 + 2 * hidden)
    attention = 2 * (hidden + 2 * kv) + 4 * heads + 2 * hidden
    # instead of the second residual stream the output of the attention's projection may be kept
    assert layer.kept.per_token == pytest.approx(norms + attention + 3 * 2 * mlp, abs=2 * hidden)


def llama_8b(**lora: Any) -> ModelMemory:
    shape = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    model = meta_model("llama", lora or None, **shape, **heads)
    return measure_model(model, compiled=False, loss_bytes=12.0)


def run_memory(stage: int = 1, num_processes: int = 1, row_len: int = 8192, **zero: Any) -> RunMemory:
    deepspeed = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **zero}}
    return RunMemory(
        deepspeed=deepspeed, num_processes=num_processes, row_len=row_len, num_labels=512, accumulates=True
    )


@pytest.mark.parametrize(
    ("stage", "num_processes", "bytes_per_weight"),
    [(0, 1, 20), (1, 1, 22), (2, 1, 22), (3, 1, 22), (1, 4, 2 + 20 / 4), (2, 4, 2 + 20 / 4)],
)
def test_the_states_of_a_short_row_are_those_that_deepspeed_was_seen_to_allocate(
    stage: int, num_processes: int, bytes_per_weight: float
) -> None:
    model, run = llama_8b(), run_memory(stage, num_processes, row_len=1, sub_group_size=10**12)
    components = estimate_memory(model, run, "full").components
    states = sum(components[name] for name in ("weights", "optimizer states", "gradients"))
    states += components.get("gradients in float32", 0)
    assert states / model.num_trained == pytest.approx(bytes_per_weight, rel=0.01)


def test_offloaded_states_are_in_the_memory_of_the_host() -> None:
    offload = {"device": "cpu"}
    model = llama_8b()
    estimate = estimate_memory(model, run_memory(2, 2, offload_optimizer=offload), "full")
    assert "optimizer states" not in estimate.components and "gradients" not in estimate.components
    assert estimate.host_bytes == pytest.approx((12 + 2) / 2 * model.num_trained, rel=0.01)


def test_the_kind_with_the_least_recomputation_that_fits_is_chosen() -> None:
    model, run = llama_8b(r=32), run_memory()
    peaks = [estimate_memory(model, run, kind).peak_bytes for kind in KINDS]
    assert peaks == sorted(peaks, reverse=True)
    assert choose_kind(model, run, 1e15) == "none"
    assert choose_kind(model, run, peaks[0]) == "selective"
    assert choose_kind(model, run, peaks[1]) == "full"
    assert choose_kind(model, run, peaks[2]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_row_is_the_last_one_that_fits(kind: str) -> None:
    model, run = llama_8b(r=32), run_memory()
    longest = longest_row(model, run, kind, 80e9)
    assert (
        longest % 1024 == 0
        and choose_kind(model, run.with_row_len(longest), 80e9) in KINDS[: 1 + KINDS.index(kind)]
    )
    usable = 0.95 * (80e9 - 1.5 * 2**30)
    assert estimate_memory(model, run.with_row_len(longest), kind).peak_bytes <= usable
    assert estimate_memory(model, run.with_row_len(longest + 1024), kind).peak_bytes > usable
    assert longest_row(model, run, kind, 10e9) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_the_estimate_agrees_with_the_measured_peak_of_a_model_on_a_gpu(compiled: bool) -> None:
    """That of `bench train`, whose optimizer keeps 4 bytes by weight, without copies in float32."""
    file = Path(__file__).parents[2] / "data" / "results" / "train-llama-3.2-1b-h100.json"
    result = json.loads(file.read_text())
    (measured,) = [
        variant
        for variant in result["measured"]
        if variant["packed"] and not variant["checkpointing"] and variant["compiled"] is compiled
    ]
    meta = build_meta_model(load_shape_config(result["model"])).to(torch.bfloat16)  # type: ignore[arg-type]
    model = measure_model(meta, compiled=compiled, loss_bytes=sft_loss_bytes())
    assert model.num_trained == result["parameters"]
    run = RunMemory(
        deepspeed={},
        num_processes=1,
        row_len=result["row_len"],
        num_labels=32 * result["samples"],
        accumulates=False,
        moment_bytes=0,  # 4 bytes are counted for the copy in float32, which this optimizer does not have
    )
    assert estimate_memory(model, run, "none").peak_bytes == pytest.approx(measured["peak_bytes"], rel=0.1)


def test_quantised_weights_need_half_a_byte_and_one_matrix_of_full_size() -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 14336}
    meta = meta_model("llama", {"r": 4}, **shape)
    plain, quantised = (
        measure_model(meta, compiled=False, loss_bytes=12.0, quantized=quantized)
        for quantized in (False, True)
    )
    matrices = 6 * (2 * 4096 * 4096 + 2 * 4096 * 2048 + 3 * 4096 * 14336)
    saved = plain.frozen_bytes - quantised.frozen_bytes
    assert saved == pytest.approx((2 - 0.516) * matrices, rel=1e-3)
    assert quantised.temporary_bytes == (2 + 4) * 4096 * 14336 and plain.temporary_bytes == 0
