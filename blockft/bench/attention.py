"""`blockft bench attention`: errors and times of the flex backend compared with the dense-mask reference."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blockft.attention.backends import AttentionMasks, block_flex, block_sdpa
from blockft.attention.layout import AttentionMetadata, Layout, build_metadata
from blockft.attention.mask import build_dense_mask
from blockft.bench.measurement import measure_ms, write_measurement
from blockft.console import PlainConsole
from blockft.errors import UserError
from blockft.outputs import check_writable
from blockft.progress import track

MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""The largest accepted error by dtype: the norm of the difference over the norm of the reference."""

TENSORS = ("output", "dq", "dk", "dv")
"""The compared tensors: the output of attention and the gradients of queries, keys and values."""

NUM_QUERY_HEADS, NUM_KEY_HEADS, HEAD_DIM = 32, 8, 128
"""The attention shape of Llama 3 8B."""


def bench_attention(*, row_len: int, num_layouts: int, out: Path | None) -> None:
    """Compare flex with the dense-mask reference over random layouts: errors and times.

    Prints a table and writes the figures to `out`.

    Raises:
        UserError: there is no GPU (FlexAttention has no backward pass on a CPU); `out` cannot be written.
        RuntimeError: an error exceeds `MAX_RELATIVE_ERROR`.
    """
    if out:
        check_writable(out)
    if not torch.cuda.is_available():
        raise UserError("bench attention needs a GPU: FlexAttention has no backward pass on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    rng = random.Random(0)
    torch.manual_seed(0)
    measured = []
    cases = [(dtype, index) for dtype in MAX_RELATIVE_ERROR for index in range(num_layouts)]
    for dtype, index in track(cases, "layouts", unit="layout"):
        sliding_window = 1024 if index == num_layouts - 1 else None
        measured.append(_compare(rng, row_len, dtype, sliding_window))
    _print_table(measured)
    write_measurement(out, {"row_len": row_len, "measured": measured})
    wrong = [figures for figures in measured if max(figures["errors"].values()) > figures["limit"]]
    if wrong:
        raise RuntimeError(f"flex differs from the dense-mask reference: {wrong[0]}")


def _print_table(measured: list[dict[str, Any]]) -> None:
    table = Table(
        "dtype", "window", "blocks", *TENSORS, "flex ms", "dense ms", title="Errors and times of flex"
    )
    for figures in measured:
        errors = [f"{figures['errors'][name]:.1e}" for name in TENSORS]
        times = [f"{figures[name]:.2f}" for name in ("flex_ms", "dense_ms")]
        table.add_row(figures["dtype"], str(figures["window"]), str(figures["num_blocks"]), *errors, *times)
    PlainConsole().print(table)


def _compare(
    rng: random.Random, row_len: int, dtype: torch.dtype, sliding_window: int | None
) -> dict[str, Any]:
    metadata = _random_row(rng, row_len).to("cuda")
    shapes = [(1, heads, row_len, HEAD_DIM) for heads in (NUM_QUERY_HEADS, NUM_KEY_HEADS, NUM_KEY_HEADS)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    # random weights of the outputs: the gradient of their weighted sum depends on every output
    weights = torch.randn(1, row_len, NUM_QUERY_HEADS, HEAD_DIM, device="cuda", dtype=dtype)
    masks = AttentionMasks(metadata)
    options = {"scaling": HEAD_DIM**-0.5, "sliding_window": sliding_window}

    def run(backend: Callable[..., Any]) -> list[torch.Tensor]:
        output, _ = backend(torch.nn.Module(), *inputs, None, block_masks=masks, **options)
        return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]

    expected = _reference(
        [x.detach().float().requires_grad_() for x in inputs], weights.float(), metadata, sliding_window
    )
    actual = run(block_flex)
    errors = {
        name: float((x.float() - y).norm() / y.norm())
        for name, x, y in zip(TENSORS, actual, expected, strict=True)
    }
    del expected  # frees memory for the measured runs
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "window": sliding_window,
        "num_blocks": len(metadata.block_ids.unique()),
        "limit": MAX_RELATIVE_ERROR[dtype],
        "errors": errors,
        "flex_ms": _median_ms(lambda: run(block_flex)),
        "dense_ms": _median_ms(lambda: run(block_sdpa)),
    }


def _reference(
    inputs: list[torch.Tensor],
    weights: torch.Tensor,
    metadata: AttentionMetadata,
    sliding_window: int | None,
) -> list[torch.Tensor]:
    """Return softmax attention in float32 under the dense mask, and its gradients."""
    q, k, v = inputs
    k_per_query_head, v_per_query_head = (
        x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)
    )
    scores = (q @ k_per_query_head.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~build_dense_mask(metadata, sliding_window), float("-inf"))
    output = (scores.softmax(dim=-1) @ v_per_query_head).transpose(1, 2)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def _random_row(rng: random.Random, row_len: int) -> AttentionMetadata:
    """Return a row of examples with several blocks, some with several questions, and a little padding."""
    layouts: list[Layout] = []
    num_free = row_len - rng.randrange(1, 100)
    while num_free > 400:
        num_final = rng.choice((1, 1, 3))
        lengths = [rng.randrange(20, 300) for _ in range(rng.randrange(1, 12) + num_final)]
        while sum(lengths) > num_free:
            lengths.pop()
        if len(lengths) > num_final:
            layouts.append(Layout(tuple(lengths), num_final))
            num_free -= sum(lengths)
    return build_metadata(layouts, row_len)


def _median_ms(run: Callable[[], Any]) -> float:
    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    median: float = measure_ms(run_and_wait, warmups=3, runs=10)["median"]
    return median
