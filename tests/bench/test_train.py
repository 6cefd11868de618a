"""`blockft bench train` on a toy: every way finds the same loss, and one that does not is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import blockft.bench.benchmark_model as benchmark_model
import blockft.bench.train as stage
from blockft.bench.train import CPU_VARIANTS, bench_train
from blockft.errors import UserError
from blockft.model.random_model import load_shape_config, weight_bytes

GIVEN: dict[str, Any] = {
    "row_len": 700,
    "sample_len": 200,
    "num_documents": 3,
    "warmups": 0,
    "runs": 2,
    "out": None,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU, where flex cannot train")
def test_every_way_reads_the_same_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_train("tiny", **GIVEN | {"out": tmp_path / "t.json"})
    result = json.loads((tmp_path / "t.json").read_text())
    assert (result["samples"], result["dtype"], result["sample_len"]) == (3, "float32", 200)
    lines = result["measured"]
    assert [(line["packed"], line["checkpointing"]) for line in lines] == [
        (way.packed, way.checkpointing) for way in CPU_VARIANTS
    ]
    for line in lines:
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5) and line["loss"] > 1
        assert line["tokens_per_s"] == pytest.approx(600_000 / line["ms"]["median"])
        assert line["ratio"] == pytest.approx(line["tokens_per_s"] / lines[0]["tokens_per_s"])
    assert "packed row" in capsys.readouterr().out


def test_another_loss_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    collate = stage.collate_row

    def wrong(examples: Any, row_len: int, pad_id: int) -> dict[str, torch.Tensor]:
        mode = "full" if len(examples) > 1 else "block"
        return collate([(example, mode) for example, _ in examples], row_len, pad_id)

    monkeypatch.setattr(stage, "collate_row", wrong)
    with pytest.raises(RuntimeError, match="packed row"):
        bench_train("tiny", **GIVEN)


def test_a_loss_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = stage.label_loss
    monkeypatch.setattr(stage, "label_loss", lambda *given: loss(*given) * float("nan"))
    with pytest.raises(RuntimeError, match="loss is nan"):
        bench_train("tiny", **GIVEN)


def test_a_model_for_which_there_is_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * weight_bytes(load_shape_config("tiny"), torch.float32)
    monkeypatch.setattr(benchmark_model, "free_bytes", lambda device: needed - 1)
    with pytest.raises(UserError, match="the weights of tiny with 3 more numbers per weight take"):
        bench_train("tiny", **GIVEN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_len": 140000, "row_len": 140000}, "but tiny has only 131072 positions"),
        ({"sample_len": 701}, "--sample-len is 701, but a row has only 700 tokens"),
        ({"sample_len": 66}, "too short for 3 documents"),
        ({"out": Path("no/such/file.json")}, "no/such"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_train("tiny", **GIVEN | given)
