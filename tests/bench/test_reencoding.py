"""The passes whose times show the cost of re-encoding: their logits are those of the masked forward pass."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from blockft.bench.reencoding import LABELS, measure_reencoding, reencoding_passes
from blockft.bench.ttft import Prompt, bench_ttft
from blockft.inference.block_key import context_keys
from blockft.model.masked_forward import masked_logits
from tests.bench.test_ttft import ARGUMENTS
from tests.tiny import build_model, random_ids


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_each_pass_gives_the_logits_of_its_positions(name: str) -> None:
    prompt = Prompt(random_ids(random.Random(name), 90).numpy(), 10, 16)
    model = build_model(name, "block_cached")
    logits = {
        way: run()
        for way, run in reencoding_passes(model, context_keys(prompt.blocks), prompt.question).items()
    }
    model.set_attn_implementation("block_sdpa")
    expected = {}
    for scheme in ("reencoded", "local"):
        model.config.block_attention = {"version": 1, "position_scheme": scheme}
        expected[scheme] = masked_logits(model, prompt.ids, [prompt.layout], 1)[0].detach()
    assert_close(logits["rotated_keys_ms"], expected["reencoded"], rtol=1e-4, atol=1e-5)
    assert_close(logits["rotated_queries_ms"], expected["reencoded"], rtol=1e-4, atol=1e-5)
    assert_close(logits["no_reencoding_ms"], expected["local"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected["local"], expected["reencoded"], rtol=1e-2)


def test_every_way_is_measured() -> None:
    prompt = Prompt(torch.arange(40).numpy(), 8, 16)
    model = build_model("llama", "block_cached")
    times = measure_reencoding(model, context_keys(prompt.blocks), prompt.question, warmups=1, runs=2)
    assert times.keys() == LABELS.keys()
    assert all(0 < one["median"] <= one["p95"] and one["runs"] == 2 for one in times.values())


def test_the_cost_of_re_encoding_is_a_table_of_bench_ttft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    bench_ttft("tiny", **ARGUMENTS | {"lengths": [72], "tiers": ["host"], "out": out, "reencoding": True})
    (figures,) = json.loads(out.read_text())["measured"]
    assert figures["reencoding"].keys() == LABELS.keys()
    table = capsys.readouterr().out
    assert "tiny: re-encoding, ms" in table and all(label in table for label in LABELS.values())
