"""`blockft bench ttft` on a toy model: its JSON, table and plot, and the figures derived from lengths."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import blockft.bench.benchmark_model as benchmark_model
import blockft.bench.ttft as ttft
from blockft import progress
from blockft.bench.measurement import measure_ms
from blockft.bench.ttft import Prompt, bench_ttft, derived_figures, draw_ttft, parse_lengths, parse_tiers
from blockft.errors import UserError
from blockft.model.random_model import SHAPES, build_random_model, load_shape_config, weight_bytes
from tests.run import save_model, write_block_attention

ARGUMENTS: dict[str, Any] = {
    "lengths": [200, 72],
    "question_len": 10,
    "block_len": 16,
    "tiers": ["host", "disk"],
    "warmups": 1,
    "runs": 3,
    "folder": None,
    "compile": False,
    "reencoding": False,
    "out": None,
    "png": None,
}
BANDWIDTH = 1e10


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ttft, "measure_copy_bandwidth", lambda device: BANDWIDTH)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the JSON and the plot of a run."""
    folder = tmp_path_factory.mktemp("ttft")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ttft, "measure_copy_bandwidth", lambda device: BANDWIDTH)
        bench_ttft(
            "tiny", **ARGUMENTS | {"folder": folder, "out": folder / "t.json", "png": folder / "t.png"}
        )
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiers of a CPU")
def test_the_json_holds_provenance_arguments_and_figures(measured: Path) -> None:
    result = json.loads((measured / "t.json").read_text())
    for name in ("command", "device", "python", "versions", "commit", "copy_bandwidth_gb_s"):
        assert name in result
    for name in ("question_len", "block_len", "warmups", "runs"):
        assert result[name] == ARGUMENTS[name]
    assert result["model"] == "tiny" and result["dtype"] == "float32" and result["parameters"] > 0
    assert result["agreement"][0]["length"] == 200
    assert result["agreement"][0]["cached_to_masked_sdpa"] < 1e-5
    short, long = result["measured"]
    assert (short["length"], short["num_blocks"]) == (72, 4) and (long["length"], long["num_blocks"]) == (
        200,
        12,
    )
    for figures in (short, long):
        for times in (figures["full_ms"], figures["host_ms"], figures["disk_ms"]):
            assert 0 < times["median"] <= times["p95"] and times["runs"] == 3
        assert figures["full_ms"]["kernel"] in figures["full_ms"]["kernels_tried"]
        saved = 100 * (1 - figures["host_ms"]["median"] / figures["full_ms"]["median"])
        assert figures["ttft_saved_percent"] == pytest.approx(saved)
        assert figures["ratio_to_floor"] == pytest.approx(figures["host_ms"]["median"] / figures["floor_ms"])
    assert (measured / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sees_first", [True, False])
def test_blocks_are_measured_as_the_model_was_trained(tmp_path: Path, sees_first: bool) -> None:
    """The logits over cached blocks are those of the masked forward pass of the same model."""
    model = write_block_attention(save_model(tmp_path / "model"), local_sees_first=sees_first)
    bench_ttft(str(model), **ARGUMENTS | {"lengths": [72], "tiers": ["host", "none"], "out": tmp_path / "t"})
    result = json.loads((tmp_path / "t").read_text())
    assert result["local_sees_first"] is sees_first
    assert result["agreement"][0]["cached_to_masked_sdpa"] < 1e-5


def test_the_folder_of_the_disk_tier_is_removed(measured: Path) -> None:
    assert sorted(path.name for path in measured.iterdir()) == ["t.json", "t.png"]


def test_flops_and_bytes_equal_a_count_token_by_token(measured: Path) -> None:
    """Ma et al. 2025, table 2: 2 x parameters x computed tokens."""
    result = json.loads((measured / "t.json").read_text())
    shape = SHAPES["tiny"]
    layers, hidden, heads = shape["num_hidden_layers"], shape["hidden_size"], shape["num_attention_heads"]
    token_bytes = 2 * layers * shape["num_key_value_heads"] * hidden // heads * 4
    for figures in result["measured"]:
        length, full, cached = figures["length"], 0.0, 0.0
        for position in range(length):
            computed = 2 * result["parameters"]
            attended = 4 * layers * hidden * (position + 1)
            full += computed + attended
            cached += (computed + attended) * (position >= length - 10)
        assert figures["flops_saved_percent"] == pytest.approx(100 * (length - 10) / length)
        assert figures["flops_saved_with_attention_percent"] == pytest.approx(100 * (1 - cached / full))
        moved = 4 * result["parameters"] + (length - 10) * token_bytes  # tied embeddings are read
        assert figures["bytes_moved"] == moved
        assert figures["floor_ms"] == pytest.approx(moved / BANDWIDTH * 1000)


@pytest.mark.parametrize(
    ("length", "saved"), [(512, 90.2), (1024, 95.1), (4096, 98.8), (8192, 99.4), (32768, 99.8)]
)
def test_a_question_of_50_tokens_saves_the_flops_of_the_paper(length: int, saved: float) -> None:
    prompt = Prompt(torch.arange(length).numpy(), 50, 512)
    model = build_random_model(load_shape_config("tiny"), device=torch.device("meta"), dtype=torch.bfloat16)
    figures = derived_figures(prompt, model, BANDWIDTH)
    assert figures["flops_saved_percent"] == pytest.approx(saved, abs=0.1)


def test_tier_none_computes_every_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.json"
    bench_ttft("tiny", **ARGUMENTS | {"lengths": [72], "tiers": ["none", "host"], "out": out})
    (figures,) = json.loads(out.read_text())["measured"]
    assert figures["none_ms"]["median"] > 0 and "disk_ms" not in figures
    table = capsys.readouterr().out
    for word in ("full", "host", "none", "72", "FLOPs"):
        assert word in table


def test_a_saved_model_is_measured_like_a_shape(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    out = tmp_path / "t.json"
    bench_ttft(str(path), **ARGUMENTS | {"lengths": [40], "tiers": ["host"], "out": out})
    result = json.loads(out.read_text())
    assert result["model"] == str(path)
    assert result["parameters"] == AutoModelForCausalLM.from_pretrained(path).num_parameters()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [72, 10]}, "--lengths has 10, too short for a question of 10 tokens"),
        ({"lengths": [131073]}, "--lengths has 131073, but the model has only 131072 positions"),
    ],
)
def test_wrong_lengths_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_ttft("tiny", **ARGUMENTS | arguments)


def test_wrong_lengths_are_refused_before_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_model, "build_random_model", None)
    with pytest.raises(UserError, match="--lengths has 999999, but the model has only 131072 positions"):
        bench_ttft("llama-3-8b", **ARGUMENTS | {"lengths": [999999]})


def test_the_default_lengths_are_those_that_fit_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = save_model(tmp_path / "model", max_position_embeddings=80), tmp_path / "t.json"
    monkeypatch.setattr(ttft, "DEFAULT_LENGTHS", [8, 40, 72, 100])
    bench_ttft(str(path), **ARGUMENTS | {"lengths": None, "tiers": ["host"], "out": out})
    assert [line["length"] for line in json.loads(out.read_text())["measured"]] == [40, 72]
    remarks = capsys.readouterr().err.splitlines()
    assert remarks[0] == "not measured: 8, 100 tokens (the model has 80 positions and the question 10 tokens)"
    with pytest.raises(
        UserError, match="none of the lengths 8, 40, 72, 100 can be measured, .*: set --lengths"
    ):
        bench_ttft(str(path), **ARGUMENTS | {"lengths": None, "question_len": 80})


def test_without_a_terminal_each_length_is_a_line_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ARGUMENTS | {"lengths": [72, 40], "tiers": ["host"]}
    bench_ttft("tiny", **arguments)
    lines = [re.sub(r"\d+\.\d ms", "x", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["40 tokens: full x, host x", "72 tokens: full x, host x"]
    for module in (ttft, progress):
        monkeypatch.setattr(module, "is_enabled", lambda: True)
    bench_ttft("tiny", **arguments)
    out, err = capsys.readouterr()
    assert "100%" in err and "40 tokens" not in err and "FLOPs" in out and "100%" not in out


def test_weights_that_exceed_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_model, "free_bytes", lambda device: 1000)
    for target in ("tiny", str(save_model(tmp_path / "model"))):
        with pytest.raises(UserError, match=r"the weights of .* take .* KiB in .*, but only 1000 B are free"):
            bench_ttft(target, **ARGUMENTS)


def test_weight_bytes_are_computed_from_the_configuration(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert weight_bytes(model.config, torch.bfloat16) == 2 * model.num_parameters()


@pytest.mark.parametrize("name", ["out", "png"])
def test_unwritable_files_are_refused_before_the_measurement(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="file cannot be written: there is no folder"):
        bench_ttft("tiny", **ARGUMENTS | {name: tmp_path / "none" / "file"})


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="llama-3-8b, llama-3.2-1b, tiny"):
        bench_ttft("llama-9", **ARGUMENTS)


def test_lengths_and_tiers_are_parsed_from_text() -> None:
    assert parse_lengths("512, 1024") == [512, 1024] and parse_lengths("") is None
    for text, wrong in [("512,", "''"), ("4K", "'4K'"), ("-1", "'-1'"), ("5²", "'5²'")]:
        with pytest.raises(UserError, match=f"--lengths has {wrong}"):
            parse_lengths(text)
    assert parse_tiers("disk,none") == ["disk", "none"]
    with pytest.raises(UserError, match="--tiers has 'tape' .on this machine allowed: .*host, disk, none"):
        parse_tiers("host,tape")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_device_tier() -> None:
    assert parse_tiers("") == ["host", "disk"]
    with pytest.raises(UserError, match="--tiers has 'device'"):
        parse_tiers("device")


def test_warmups_and_the_before_function_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run() -> None:
        calls.append("run")
        now[0] += 0.05 if len(calls) <= 4 else 0.002

    def prepare() -> None:
        calls.append("before")
        now[0] += 0.03

    times = measure_ms(run, warmups=2, runs=5, before=prepare)
    assert calls == ["before", "run"] * 7
    assert times["runs"] == 5 and times["median"] == pytest.approx(2) and times["p95"] == pytest.approx(2)


def test_the_plot_labels_each_measured_time() -> None:
    times = {"median": 2.0, "p95": 3.0, "runs": 3}
    measured = [
        {"length": length, "full_ms": times, "host_ms": times, "floor_ms": 1.0} for length in (64, 128)
    ]
    axes = draw_ttft("tiny", measured).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["full prefill", "blocks on the host", "memory floor"]
    assert axes.get_title() == "Time to first token of tiny"
