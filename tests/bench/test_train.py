"""`blockft bench train` on a toy model: every variant must compute the same loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import blockft.bench.benchmark_model as benchmark_model
import blockft.bench.train as benchmark
from blockft.bench.train import CPU_VARIANTS, bench_train
from blockft.errors import UserError
from blockft.model.random_model import load_shape_config, weight_bytes

ARGUMENTS: dict[str, Any] = {
    "row_len": 700,
    "sample_len": 200,
    "num_documents": 3,
    "lora_r": None,
    "warmups": 0,
    "runs": 2,
    "out": None,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the variants of a CPU")
def test_every_variant_computes_the_same_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_train("tiny", **ARGUMENTS | {"out": tmp_path / "t.json"})
    result = json.loads((tmp_path / "t.json").read_text())
    assert (result["samples"], result["dtype"], result["sample_len"]) == (3, "float32", 200)
    first, *_ = measured = result["measured"]
    assert [(figures["packed"], figures["checkpointing"]) for figures in measured] == [
        (variant.packed, variant.checkpointing) for variant in CPU_VARIANTS
    ]
    for figures in measured:
        assert figures["loss"] == pytest.approx(first["loss"], rel=1e-5) and figures["loss"] > 1
        assert figures["tokens_per_s"] == pytest.approx(600_000 / figures["ms"]["median"])
        assert figures["ratio"] == pytest.approx(figures["tokens_per_s"] / first["tokens_per_s"])
    assert "packed row" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the variants of a CPU")
def test_adapters_with_and_without_shared_products_compute_the_same_loss(tmp_path: Path) -> None:
    bench_train("tiny", **ARGUMENTS | {"out": tmp_path / "t.json", "lora_r": 4})
    result = json.loads((tmp_path / "t.json").read_text())
    measured = result["measured"]
    assert [figures["shared_products"] for figures in measured] == [False, False, False, True]
    assert {round(figures["loss"], 4) for figures in measured} == {round(measured[0]["loss"], 4)}
    assert result["trained_parameters"] < 0.5 * result["parameters"]
    # without a gradient for the weights a step needs fewer operations
    bench_train("tiny", **ARGUMENTS | {"out": tmp_path / "full.json"})
    full = json.loads((tmp_path / "full.json").read_text())
    assert result["flops_per_step"] < full["flops_per_step"]


def test_different_losses_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    collate = benchmark.collate_row

    def wrong(examples: Any, row_len: int, pad_id: int) -> dict[str, torch.Tensor]:
        mode = "full" if len(examples) > 1 else "block"
        return collate([(example, mode) for example, _ in examples], row_len, pad_id)

    monkeypatch.setattr(benchmark, "collate_row", wrong)
    with pytest.raises(RuntimeError, match="packed row"):
        bench_train("tiny", **ARGUMENTS)


def test_a_nan_loss_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = benchmark.label_loss
    monkeypatch.setattr(benchmark, "label_loss", lambda *arguments: loss(*arguments) * float("nan"))
    with pytest.raises(RuntimeError, match="loss is nan"):
        bench_train("tiny", **ARGUMENTS)


def test_a_model_that_exceeds_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * weight_bytes(load_shape_config("tiny"), torch.float32)
    monkeypatch.setattr(benchmark_model, "free_bytes", lambda device: needed - 1)
    with pytest.raises(UserError, match="the weights of tiny with 3 more numbers per weight take"):
        bench_train("tiny", **ARGUMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_len": 140000, "row_len": 140000}, "but tiny has only 131072 positions"),
        ({"sample_len": 701}, "--sample-len is 701, but a row has only 700 tokens"),
        ({"sample_len": 66}, "too short for 3 documents"),
        ({"out": Path("no/such/file.json")}, "no/such"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_train("tiny", **ARGUMENTS | arguments)
