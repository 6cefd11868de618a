"""`blockft bench attention`: what flex computes and how long it takes, side by side with the dense oracle."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from blockft.attention.backends import AttentionMasks, block_flex, block_sdpa
from blockft.attention.layout import AttentionMetadata, Layout, build_metadata
from blockft.attention.mask import build_dense_mask
from blockft.bench.timing import measure_ms, measurement_provenance
from blockft.errors import UserError
from blockft.outputs import check_writable, write_atomic
from blockft.progress import track

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""The largest relative error (norm of the difference over the oracle's norm) that counts as agreement."""


def bench_attention(*, row_len: int, num_layouts: int, out: Path | None) -> None:
    """Compare flex with the dense oracle over random layouts: errors of output and gradients, and times.

    Raises:
        UserError: there is no GPU, on which alone flex has a backward pass; `out` cannot be written.
        RuntimeError: they disagree.
    """
    if out:
        check_writable(out)
    if not torch.cuda.is_available():
        raise UserError("bench attention needs a GPU: FlexAttention has no backward pass on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    rng = random.Random(0)
    lines = []
    table = Table("type", "window", "blocks", "output", "dq", "dk", "dv", "flex ms", "dense ms")
    cases = [(dtype, index) for dtype in LIMITS for index in range(num_layouts)]
    for dtype, index in track(cases, "layouts"):
        window = 1024 if index == num_layouts - 1 else None
        line = _compare(rng, row_len, dtype, window)
        lines.append(line)
        errors = [f"{line['errors'][name]:.1e}" for name in ("output", "dq", "dk", "dv")]
        times = [f"{line[name]:.2f}" for name in ("flex_ms", "dense_ms")]
        table.add_row(line["dtype"], str(window), str(line["num_blocks"]), *errors, *times)
    Console().print(table)
    if out:
        write_atomic(
            out,
            json.dumps(measurement_provenance() | {"row_len": row_len, "measured": lines}, indent=2) + "\n",
        )
    worst = [line for line in lines if max(line["errors"].values()) > line["limit"]]
    if worst:
        raise RuntimeError(f"flex disagrees with the oracle: {worst[0]}")


def _compare(rng: random.Random, row_len: int, dtype: torch.dtype, window: int | None) -> dict[str, Any]:
    metadata = _random_row(rng, row_len).to("cuda")
    shapes = [(1, heads, row_len, 128) for heads in (32, 8, 8)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    weights = torch.randn(1, row_len, 32, 128, device="cuda", dtype=dtype)
    masks, settings = AttentionMasks(metadata), {"scaling": 128**-0.5, "sliding_window": window}

    def run(backend: Callable[..., Any]) -> list[torch.Tensor]:
        out, _ = backend(torch.nn.Module(), *inputs, None, block_masks=masks, **settings)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]

    exact = _reference(
        [x.detach().float().requires_grad_() for x in inputs], weights.float(), metadata, window
    )
    names = ("output", "dq", "dk", "dv")
    got = run(block_flex)
    errors = {
        name: float((a.float() - b).norm() / b.norm()) for name, a, b in zip(names, got, exact, strict=True)
    }
    del exact
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "window": window,
        "num_blocks": len(metadata.block_ids.unique()),
        "limit": LIMITS[dtype],
        "errors": errors,
        "flex_ms": _median_ms(lambda: run(block_flex)),
        "dense_ms": _median_ms(lambda: run(block_sdpa)),
    }


def _reference(
    inputs: list[torch.Tensor], weights: torch.Tensor, metadata: AttentionMetadata, window: int | None
) -> list[torch.Tensor]:
    """Softmax attention in plain float32 arithmetic under the dense mask, and its gradients."""
    q, k, v = inputs
    k_each, v_each = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k_each.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~build_dense_mask(metadata, window), float("-inf"))
    out = (scores.softmax(dim=-1) @ v_each).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def _random_row(rng: random.Random, row_len: int) -> AttentionMetadata:
    """Examples of several blocks, some with several questions, and a little padding."""
    layouts: list[Layout] = []
    free = row_len - rng.randrange(1, 100)
    while free > 400:
        num_final = rng.choice((1, 1, 3))
        lengths = [rng.randrange(20, 300) for _ in range(rng.randrange(1, 12) + num_final)]
        while sum(lengths) > free:
            lengths.pop()
        if len(lengths) > num_final:
            layouts.append(Layout(tuple(lengths), num_final))
            free -= sum(lengths)
    return build_metadata(layouts, row_len)


def _median_ms(run: Callable[[], Any]) -> float:
    def whole() -> None:
        run()
        torch.cuda.synchronize()

    median: float = measure_ms(whole, warmups=3, runs=10)["median"]
    return median
