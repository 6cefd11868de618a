"""The flex backend on a GPU matches the dense-mask reference in outputs and gradients."""

import json
from pathlib import Path

import pytest
import torch

from blockft.bench.attention import bench_attention
from blockft.errors import UserError


@pytest.mark.gpu
def test_flex_matches_the_reference_in_outputs_and_gradients(tmp_path: Path) -> None:
    bench_attention(row_len=1024, num_layouts=2, out=tmp_path / "flex.json")
    for figures in json.loads((tmp_path / "flex.json").read_text())["measured"]:
        assert max(figures["errors"].values()) <= figures["limit"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="GPU"):
        bench_attention(row_len=1024, num_layouts=1, out=None)


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: it is a folder"):
        bench_attention(row_len=1024, num_layouts=1, out=tmp_path)
