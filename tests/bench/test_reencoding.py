"""The passes whose times show the cost of re-encoding: their logits are those of the masked forward pass."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from blockft.attention.layout import Layout
from blockft.bench.reencoding import (
    LABELS,
    CopiedContextAttention,
    Pass,
    measure_reencoding,
    reencoding_passes,
)
from blockft.bench.ttft import Prompt, bench_ttft
from blockft.inference.block_key import context_keys
from blockft.inference.rotate_queries import MAX_GRAPH_TOKENS, QueryRotationRunner
from blockft.model.decoder_layers import compile_layers
from blockft.model.masked_forward import masked_logits
from blockft.model.supported import local_sees_first
from tests.bench.test_ttft import ARGUMENTS
from tests.tiny import build_model, random_ids


def open_passes(model: PreTrainedModel, prompt: Prompt, **options: bool) -> dict[str, Pass]:
    keys = context_keys(prompt.blocks, local_sees_first=local_sees_first(model.config))
    return reencoding_passes(model, keys, prompt.question, **{"use_graphs": False, **options})


def random_prompt(name: str, length: int = 90, question_len: int = 10, block_len: int = 16) -> Prompt:
    return Prompt(random_ids(random.Random(name), length).numpy(), question_len, block_len)


def check_logits(model: PreTrainedModel, prompt: Prompt, passes: dict[str, Pass]) -> None:
    """Compare the passes, run twice, with the masked forward pass at their positions."""
    logits = [{name: run().clone() for name, run in passes.items()} for _ in range(2)]
    model.set_attn_implementation("block_sdpa")
    expected = {}
    for scheme in ("reencoded", "local"):
        model.config.block_attention = {"version": 1, "position_scheme": scheme}
        expected[scheme] = masked_logits(model, prompt.ids, [prompt.layout], 1)[0].detach()
    assert not torch.allclose(expected["local"], expected["reencoded"], rtol=1e-2)
    for run in logits:
        assert list(run) == list(LABELS)
        assert_close(run["no_reencoding_ms"], expected["local"], rtol=1e-4, atol=1e-5)
        assert_close(run["rotated_keys_ms"], expected["reencoded"], rtol=1e-4, atol=1e-5)
        assert_close(run["rotated_queries_ms"], expected["reencoded"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window", "phi3-partial"])
def test_each_pass_gives_the_logits_of_its_positions(name: str) -> None:
    prompt, model = random_prompt(name), build_model(name, "block_cached")
    check_logits(model, prompt, open_passes(model, prompt))


def test_questions_that_are_padded_to_the_size_of_a_graph_give_the_same_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(QueryRotationRunner, "padded_len", lambda self, num_prompts, num_queries: 16)
    for name in ("llama", "gemma3"):
        prompt, model = random_prompt(name), build_model(name, "block_cached")
        check_logits(model, prompt, open_passes(model, prompt))


def test_a_repeated_block_and_blocks_that_see_the_first_one() -> None:
    model = build_model("llama", "block_cached")
    model.config.block_attention = {"version": 1, "local_sees_first": True}
    ids = random_ids(random.Random(1), 60)
    ids[16:32] = ids[32:48]
    prompt = Prompt(ids.numpy(), 12, 16)
    passes = open_passes(model, prompt)
    logits = {name: passes[name]() for name in ("rotated_keys_ms", "rotated_queries_ms")}
    model.set_attn_implementation("block_sdpa")
    expected = masked_logits(model, prompt.ids, [Layout((16, 16, 16, 12))], 1)[0].detach()
    for got in logits.values():
        assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_rotated_keys_differ_from_none_by_the_rotation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They attend to the same copies: without the rotation they give the same bits."""
    prompt, model = random_prompt("llama"), build_model("llama", "block_cached")
    passes = open_passes(model, prompt)
    none, rotated = (passes[name]() for name in ("no_reencoding_ms", "rotated_keys_ms"))
    assert not torch.equal(none, rotated)
    attend = CopiedContextAttention.attend

    def attend_unrotated(self: CopiedContextAttention, *arguments: object) -> torch.Tensor:
        object.__setattr__(self, "layer_rotations", None)
        return attend(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CopiedContextAttention, "attend", attend_unrotated)
    assert torch.equal(passes["rotated_keys_ms"](), none)


def test_every_way_is_measured() -> None:
    prompt = Prompt(torch.arange(40).numpy(), 8, 16)
    model = build_model("llama", "block_cached")
    keys = context_keys(prompt.blocks)
    times = measure_reencoding(model, keys, prompt.question, warmups=1, runs=2, is_compiled=False)
    assert times.keys() == LABELS.keys()
    assert all(0 < one["median"] <= one["p95"] and one["runs"] == 2 for one in times.values())


def test_the_cost_of_re_encoding_is_a_table_of_bench_ttft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    bench_ttft("tiny", **ARGUMENTS | {"lengths": [72], "tiers": ["host"], "out": out, "reencoding": True})
    result = json.loads(out.read_text())
    assert result["measured"][0]["reencoding"].keys() == LABELS.keys()
    assert result["reencoding"].startswith("time of the first pass over blocks in the device's memory")
    table = capsys.readouterr().out
    assert "tiny: re-encoding, ms" in table and all(label in table for label in LABELS.values())


@pytest.mark.gpu  # CUDA graphs
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-partial"])
def test_captured_passes_give_the_logits_of_eager_ones(name: str) -> None:
    model, prompt = build_model(name, "block_cached").cuda(), random_prompt(name, 300, 20, 64)
    eager, captured = (open_passes(model, prompt, use_graphs=use_graphs) for use_graphs in (False, True))
    for way in LABELS:
        expected = eager[way]().clone()
        for _ in range(2):
            # a graph pads its questions, so products of another size add in another order
            assert_close(captured[way](), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu  # compiled for a GPU, FlashAttention
def test_compiled_passes_in_16_bits_give_the_logits_of_eager_ones() -> None:
    model, prompt = build_model("llama", "block_cached").to("cuda", torch.bfloat16), random_prompt("llama")
    expected = {name: run().float() for name, run in open_passes(model, prompt).items()}
    compile_layers(model)
    captured = open_passes(model, prompt, use_graphs=True, is_compiled=True)
    for name, run in captured.items():
        error = (run().float() - expected[name]).norm() / expected[name].norm()
        assert error < 2e-2, name
    assert (expected["no_reencoding_ms"] - expected["rotated_keys_ms"]).norm() > 0


@pytest.mark.gpu  # CUDA graphs
def test_a_question_that_is_too_long_for_a_graph_is_measured_without_one() -> None:
    model = build_model("llama", "block_cached").cuda()
    prompt = random_prompt("long", MAX_GRAPH_TOKENS + 200, MAX_GRAPH_TOKENS + 1, 64)
    keys = context_keys(prompt.blocks)
    times = measure_reencoding(model, keys, prompt.question, warmups=1, runs=2, is_compiled=False)
    assert all(0 < one["median"] <= one["p95"] for one in times.values())
