"""Law 2 on a GPU: flex agrees with the dense oracle, output and gradients."""

import json
from pathlib import Path

import pytest
import torch

from blockft.bench.attention import bench_attention
from blockft.errors import UserError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has its backward pass on a GPU only")
def test_law_2_flex_agrees_with_the_oracle_and_its_gradients(tmp_path: Path) -> None:
    bench_attention(row_len=1024, num_layouts=2, out=tmp_path / "flex.json")
    for line in json.loads((tmp_path / "flex.json").read_text())["measured"]:
        assert max(line["errors"].values()) <= line["limit"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="GPU"):
        bench_attention(row_len=1024, num_layouts=1, out=None)


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: it is a folder"):
        bench_attention(row_len=1024, num_layouts=1, out=tmp_path)
