"""The counted operations are those that torch counts, and those of a plain loop over layouts."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.attention.mask import build_dense_mask
from blockft.attention.pairs import LayoutArrays
from blockft.model.decoder_layers import layer_windows
from blockft.model.lora import add_adapter
from blockft.training.flops import ModelFlops
from blockft.training.peak_flops import find_peak_flops, sum_peak_flops
from tests.tiny import CONFIGS, build_model, random_ids, random_layout
from tests.training.test_objectives import build_rows, make_examples

NUM_TOKENS, NUM_LABELS = 24, 5


def count_by_torch(model: Any) -> tuple[int, int]:
    """Return the operations of linear layers and of attention in a step, in which all T x T pairs count."""
    ids = random_ids(random.Random(0), NUM_TOKENS)
    metadata = build_metadata([Layout((NUM_TOKENS,))])
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model(
            input_ids=ids[None],
            position_ids=metadata.position_ids,
            block_masks=AttentionMasks(metadata),
            logits_to_keep=torch.arange(NUM_LABELS),
            use_cache=False,
        ).logits
        logits.sum().backward()
    counts = {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}
    attention = counts.pop("aten.bmm")
    assert set(counts) <= {"aten.mm", "aten.addmm"}
    return sum(counts.values()), attention


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_of_a_full_step_are_those_that_torch_counts(name: str) -> None:
    model = build_model(name).train()
    flops = ModelFlops.of_model(model)
    linear, attention = count_by_torch(model)
    assert flops.per_token * NUM_TOKENS + flops.per_label * NUM_LABELS == linear
    assert sum(flops.per_pair.values()) * NUM_TOKENS**2 == attention
    assert flops.per_pair.keys() == set(layer_windows(model.config))


@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 4},
        {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_operations_of_an_adapter_are_those_that_torch_counts(arguments: dict[str, Any]) -> None:
    model = add_adapter(build_model("llama"), arguments, seed=0).train()
    # the gradient of the input of the first layer is counted, too
    model.enable_input_require_grads()
    flops = ModelFlops.of_model(model)
    linear, attention = count_by_torch(model)
    assert flops.per_token * NUM_TOKENS + flops.per_label * NUM_LABELS == linear
    assert sum(flops.per_pair.values()) * NUM_TOKENS**2 == attention


def test_layers_below_the_first_adapter_have_no_backward_pass() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    arguments = {"r": 4, "layers_to_transform": [1], "target_modules": names}
    model = add_adapter(build_model("llama"), arguments, seed=0).train()
    flops = ModelFlops.of_model(model)
    linear, attention = count_by_torch(model)
    assert sum(flops.per_pair.values()) * NUM_TOKENS**2 == attention
    # the frozen products of the first adapted layer need no gradient of that layer's input: q, k, v and A
    first, rank = model.get_base_model().base_model.layers[1], 4
    inputs = (first.self_attn.q_proj, first.self_attn.k_proj, first.self_attn.v_proj)
    unneeded = sum(2 * (p.base_layer.weight.numel() + rank * p.base_layer.in_features) for p in inputs)
    assert flops.per_token * NUM_TOKENS + flops.per_label * NUM_LABELS == linear + unneeded * NUM_TOKENS


@pytest.mark.parametrize(("reencoded", "sees_first"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_operations_of_examples_are_those_of_a_plain_loop(
    name: str, reencoded: bool, sees_first: bool
) -> None:
    rng = random.Random(1)
    layouts = [random_layout(rng, rng.randint(9, 50), rng.randint(1, 8)) for _ in range(30)]
    num_labels = [rng.randint(0, 5) for _ in layouts]
    model = build_model(name)
    flops = ModelFlops.of_model(model)
    head_dim = model.config.head_dim
    in_layers = sum(w.numel() for n, w in model.named_parameters() if w.ndim == 2 and ".layers." in n)
    head = model.get_output_embeddings().weight.numel()

    def count(layout: Layout, labels: int) -> int:
        pairs = sum(
            int(build_dense_mask(build_metadata([layout], reencoded=reencoded), window).sum())
            for window in layer_windows(model.config)
        )
        return 6 * in_layers * layout.num_row_tokens + 6 * head * labels + 12 * 4 * head_dim * pairs

    block, full = flops.count(
        LayoutArrays.of(layouts), np.array(num_labels), reencoded=reencoded, local_sees_first=sees_first
    )
    layouts = [replace(layout, local_sees_first=sees_first) for layout in layouts]
    pairs = list(zip(layouts, num_labels, strict=True))
    assert block.tolist() == [count(layout, labels) for layout, labels in pairs]
    assert full.tolist() == [count(layout.full(), labels) for layout, labels in pairs]


def test_operations_of_a_batch_are_those_of_its_examples() -> None:
    examples = make_examples(12)
    rows = build_rows(examples, row_len=64, batch_rows=4, epochs=2)
    flops = ModelFlops.of_model(build_model("llama"))
    block, full = flops.count(LayoutArrays.of(e.layout for e in examples), rows._columns.num_labels)
    batches = rows.sum_by_batch(block, full)
    expected = []
    for epoch in rows.epochs:
        by_row = [
            sum((block if epoch.is_block[i] else full)[epoch.examples[i]] for i in row) for row in epoch.rows
        ]
        expected += [sum(by_row[i : i + 4]) for i in range(0, len(by_row), 4)]
    assert batches.tolist() == expected and len(batches) == len(rows) // 4


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA B200", 2250),
    ],
)
def test_the_peak_of_a_card_is_found_by_its_name(name: str, tflops: float) -> None:
    assert find_peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100-SXM2-16GB",
        "",
    ],
)
def test_parts_of_cards_and_unknown_cards_have_no_peak(name: str) -> None:
    assert find_peak_flops(name) is None


@pytest.mark.parametrize(
    ("name", "dtype", "tflops", "message"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4, ""),
        ("NVIDIA H200", torch.float32, None, "16-bit numbers"),
        ("NVIDIA New 9000", torch.bfloat16, None, "the peak of the card NVIDIA New 9000"),
    ],
)
def test_a_run_without_a_known_peak_says_so_once(
    name: str,
    dtype: torch.dtype,
    tflops: float | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert sum_peak_flops(dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))
    stderr = capsys.readouterr().err
    assert stderr.count("utilization is left out") == bool(message) and message in stderr


def test_a_cpu_has_no_peak_and_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is present")
    assert sum_peak_flops(torch.bfloat16) is None and capsys.readouterr().err == ""
