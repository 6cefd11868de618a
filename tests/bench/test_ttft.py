"""`blockft bench ttft` on a toy: what its JSON holds, and that it follows from what was measured."""

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
from blockft.bench.ttft import Prompt, bench_ttft, derived_figures, parse_lengths, parse_tiers
from blockft.errors import UserError
from blockft.model.random_model import SHAPES, build_random_model, load_shape_config, weight_bytes
from tests.run import save_model

GIVEN: dict[str, Any] = {
    "lengths": [200, 72],
    "question_len": 10,
    "block_len": 16,
    "tiers": ["host", "disk"],
    "warmups": 1,
    "runs": 3,
    "folder": None,
    "compile": False,
    "out": None,
    "png": None,
}
BANDWIDTH = 1e10


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ttft, "measure_copy_bandwidth", lambda device: BANDWIDTH)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the JSON and the picture of a run."""
    folder = tmp_path_factory.mktemp("ttft")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ttft, "measure_copy_bandwidth", lambda device: BANDWIDTH)
        bench_ttft("tiny", **GIVEN | {"folder": folder, "out": folder / "t.json", "png": folder / "t.png"})
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU, where the host is the nearest tier")
def test_the_json_has_what_it_takes_to_judge_the_figures(measured: Path) -> None:
    result = json.loads((measured / "t.json").read_text())
    for name in ("command", "device", "python", "versions", "commit", "copy_bandwidth_gb_s"):
        assert name in result
    for name in ("question_len", "block_len", "warmups", "runs"):
        assert result[name] == GIVEN[name]
    assert result["model"] == "tiny" and result["dtype"] == "float32" and result["parameters"] > 0
    assert result["agreement"][0]["length"] == 200
    assert result["agreement"][0]["cached_to_masked_sdpa"] < 1e-5
    short, long = result["measured"]
    assert (short["length"], short["num_blocks"]) == (72, 4) and (long["length"], long["num_blocks"]) == (
        200,
        12,
    )
    for line in (short, long):
        for times in (line["full_ms"], line["host_ms"], line["disk_ms"]):
            assert 0 < times["median"] <= times["p95"] and times["runs"] == 3
        assert line["full_ms"]["kernel"] in line["full_ms"]["kernels_tried"]
        saved = 100 * (1 - line["host_ms"]["median"] / line["full_ms"]["median"])
        assert line["ttft_saved_percent"] == pytest.approx(saved)
        assert line["ratio_to_floor"] == pytest.approx(line["host_ms"]["median"] / line["floor_ms"])
    assert (measured / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_disk_tiers_folder_is_gone(measured: Path) -> None:
    assert sorted(path.name for path in measured.iterdir()) == ["t.json", "t.png"]


def test_flops_and_bytes_are_counted_by_hand(measured: Path) -> None:
    """Ma et al. 2025, table 2: 2 x parameters x tokens that are computed."""
    result = json.loads((measured / "t.json").read_text())
    shape = SHAPES["tiny"]
    layers, hidden, heads = shape["num_hidden_layers"], shape["hidden_size"], shape["num_attention_heads"]
    token_bytes = 2 * layers * shape["num_key_value_heads"] * hidden // heads * 4
    for line in result["measured"]:
        length, full, cached = line["length"], 0.0, 0.0
        for position in range(length):
            computed = 2 * result["parameters"]
            attended = 4 * layers * hidden * (position + 1)
            full += computed + attended
            cached += (computed + attended) * (position >= length - 10)
        assert line["flops_saved_percent"] == pytest.approx(100 * (length - 10) / length)
        assert line["flops_saved_with_attention_percent"] == pytest.approx(100 * (1 - cached / full))
        moved = 4 * result["parameters"] + (length - 10) * token_bytes  # its embeddings are the output's, too
        assert line["bytes_moved"] == moved
        assert line["floor_ms"] == pytest.approx(moved / BANDWIDTH * 1000)


@pytest.mark.parametrize(
    ("length", "saved"), [(512, 90.2), (1024, 95.1), (4096, 98.8), (8192, 99.4), (32768, 99.8)]
)
def test_questions_of_50_tokens_save_what_follows_from_the_lengths(length: int, saved: float) -> None:
    prompt = Prompt(torch.arange(length).numpy(), 50, 512)
    model = build_random_model(load_shape_config("tiny"), device=torch.device("meta"), dtype=torch.bfloat16)
    facts = derived_figures(prompt, model, BANDWIDTH)
    assert facts["flops_saved_percent"] == pytest.approx(saved, abs=0.1)


def test_encoding_every_block_is_a_tier_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.json"
    bench_ttft("tiny", **GIVEN | {"lengths": [72], "tiers": ["none", "host"], "out": out})
    (line,) = json.loads(out.read_text())["measured"]
    assert line["none_ms"]["median"] > 0 and "disk_ms" not in line
    table = capsys.readouterr().out
    for word in ("full", "host", "none", "72", "FLOPs"):
        assert word in table


def test_a_model_is_measured_like_a_shape(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    out = tmp_path / "t.json"
    bench_ttft(str(path), **GIVEN | {"lengths": [40], "tiers": ["host"], "out": out})
    result = json.loads(out.read_text())
    assert result["model"] == str(path)
    assert result["parameters"] == AutoModelForCausalLM.from_pretrained(path).num_parameters()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lengths": [72, 10]}, "--lengths has 10, too short for a question of 10 tokens"),
        ({"lengths": [131073]}, "--lengths has 131073, but the model has only 131072 positions"),
    ],
)
def test_lengths_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench_ttft("tiny", **GIVEN | given)


def test_lengths_are_refused_before_any_weight_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_model, "build_random_model", None)
    with pytest.raises(UserError, match="--lengths has 999999, but the model has only 131072 positions"):
        bench_ttft("llama-3-8b", **GIVEN | {"lengths": [999999]})


def test_default_lengths_are_those_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = save_model(tmp_path / "model", max_position_embeddings=80), tmp_path / "t.json"
    monkeypatch.setattr(ttft, "DEFAULT_LENGTHS", [8, 40, 72, 100])
    bench_ttft(str(path), **GIVEN | {"lengths": None, "tiers": ["host"], "out": out})
    assert [line["length"] for line in json.loads(out.read_text())["measured"]] == [40, 72]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "not measured: 8, 100 tokens (the model has 80 positions and the question 10 tokens)"
    with pytest.raises(
        UserError, match="none of the lengths 8, 40, 72, 100 can be measured, .*: set --lengths"
    ):
        bench_ttft(str(path), **GIVEN | {"lengths": None, "question_len": 80})


def test_without_a_terminal_each_length_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = GIVEN | {"lengths": [72, 40], "tiers": ["host"]}
    bench_ttft("tiny", **given)
    said = capsys.readouterr().err.splitlines()
    lines = [re.sub(r"\d+\.\d ms", "x", line) for line in said]
    assert lines == ["40 tokens: full x, host x", "72 tokens: full x, host x"]
    for module in (ttft, progress):
        monkeypatch.setattr(module, "is_enabled", lambda: True)
    bench_ttft("tiny", **given)
    out, err = capsys.readouterr()
    assert "100%" in err and "40 tokens" not in err and "FLOPs" in out and "100%" not in out


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_model, "free_bytes", lambda device: 1000)
    for target in ("tiny", str(save_model(tmp_path / "model"))):
        with pytest.raises(UserError, match=r"the weights of .* take .* kB in .*, but only 1.0 kB are free"):
            bench_ttft(target, **GIVEN)


def test_the_bytes_of_weights_are_known_without_them(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert weight_bytes(model.config, torch.bfloat16) == 2 * model.num_parameters()


@pytest.mark.parametrize("name", ["out", "png"])
def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="file cannot be written: there is no folder"):
        bench_ttft("tiny", **GIVEN | {name: tmp_path / "none" / "file"})


def test_an_unknown_shape_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match="llama-3-8b, llama-3.2-1b, tiny"):
        bench_ttft("llama-9", **GIVEN)


def test_lengths_and_tiers_are_read_from_words() -> None:
    assert parse_lengths("512, 1024") == [512, 1024] and parse_lengths("") is None
    for text, bad in [("512,", "''"), ("4K", "'4K'"), ("-1", "'-1'"), ("5²", "'5²'")]:
        with pytest.raises(UserError, match=f"--lengths has {bad}"):
            parse_lengths(text)
    assert parse_tiers("disk,none") == ["disk", "none"]
    with pytest.raises(UserError, match="--tiers has 'tape', allowed on this machine are .*host, disk, none"):
        parse_tiers("host,tape")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_device_tier() -> None:
    assert parse_tiers("") == ["host", "disk"]
    with pytest.raises(UserError, match="--tiers has 'device'"):
        parse_tiers("device")


def test_warm_ups_do_not_count_and_what_comes_before_takes_no_time() -> None:
    calls: list[str] = []

    def run() -> None:
        calls.append("run")
        time.sleep(0.05 if len(calls) <= 4 else 0.001)

    times = measure_ms(run, warmups=2, runs=5, before=lambda: calls.append("before") or time.sleep(0.03))
    assert calls == ["before", "run"] * 7
    assert times["runs"] == 5 and 1 <= times["median"] <= times["p95"] < 25
