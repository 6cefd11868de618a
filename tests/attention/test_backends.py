"""Attention in real models: one block is causal, backends match the reference, packing changes nothing."""

import random
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch.testing import assert_close
from transformers import PreTrainedModel

from blockft.attention import backends
from blockft.attention.backends import AttentionMasks, block_flex, block_sdpa
from blockft.attention.layout import AttentionMetadata, Layout, build_metadata
from blockft.attention.mask import build_dense_mask
from tests.tiny import CONFIGS, WINDOW, build_model, random_ids, random_layout

config: Any = torch.compiler.config  # torch adds `patch` to the module without a type
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def forward(model: PreTrainedModel, ids: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    return model(
        input_ids=ids[None],
        position_ids=metadata.position_ids,
        block_masks=AttentionMasks(metadata),
        use_cache=False,
    ).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_block_is_plain_causal_attention(name: str) -> None:
    ids = random_ids(random.Random(name), 4 * WINDOW)
    plain = build_model(name, attention="eager")(input_ids=ids[None], use_cache=False).logits[0]
    assert_close(forward(build_model(name), ids, build_metadata([Layout((4 * WINDOW,))])), plain, **CLOSE)


def attend_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata, window: int | None
) -> torch.Tensor:
    """Return softmax attention under the dense mask; groups of query heads share a key head: (B, T, H, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~build_dense_mask(metadata, window), float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def random_batch(seed: int, row_len: int) -> AttentionMetadata:
    rng = random.Random(seed)
    rows = [
        build_metadata(
            [
                random_layout(
                    rng,
                    rng.randint(9, row_len // 4),
                    rng.randint(3, 6),
                    rng.randint(1, 3),
                    local_sees_first=has_copies,
                )
            ]
            * 2,
            row_len,
        )
        for has_copies in (False, True)
    ]
    return AttentionMetadata(
        *(torch.cat(parts) for parts in zip(*(row.as_tuple() for row in rows), strict=True))
    )


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("seed", range(3))
def test_sdpa_matches_outputs_and_gradients_of_the_reference(seed: int, window: int | None) -> None:
    metadata = random_batch(seed, 64)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, heads, 64, 8, requires_grad=True) for heads in (6, 2, 2))
    out, _ = block_sdpa(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        scaling=8**-0.5,
        sliding_window=window,
        block_masks=AttentionMasks(metadata),
    )
    expected = attend_reference(q, k, v, metadata, window)
    assert_close(out, expected, **CLOSE)
    weights = torch.randn_like(out)
    for got, expected_gradient in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        assert_close(got, expected_gradient, **CLOSE)


@pytest.mark.parametrize("window", [None, 50])
def test_flex_matches_outputs_of_the_reference(window: int | None) -> None:
    """On a CPU, FlexAttention has no backward pass. `make test-gpu` compares gradients."""
    metadata = random_batch(11, 256)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 256, 16) for heads in (6, 2, 2))
    out, _ = block_flex(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        scaling=0.25,
        sliding_window=window,
        block_masks=AttentionMasks(metadata),
    )
    assert_close(out, attend_reference(q, k, v, metadata, window), **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_changes_no_logit_and_no_gradient(name: str) -> None:
    rng, model = random.Random(name), build_model(name)
    layouts = [random_layout(rng, 21, 4), random_layout(rng, 30, 6, num_final=2), Layout((5,))]
    ids = [random_ids(rng, layout.num_tokens) for layout in layouts]

    def gradients(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = run()
        logits.logsumexp(dim=-1).mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone_logits, alone_grads = gradients(
        lambda: torch.cat(
            [forward(model, i, build_metadata([lo])) for i, lo in zip(ids, layouts, strict=True)]
        )
    )
    padding = random_ids(rng, 8)
    packed_logits, packed_grads = gradients(
        lambda: forward(model, torch.cat([*ids, padding]), build_metadata(layouts, row_len=64))[:56]
    )
    assert_close(packed_logits, alone_logits, **CLOSE)
    for got, expected in zip(packed_grads, alone_grads, strict=True):
        assert_close(got, expected, **CLOSE)


def test_questions_that_share_a_context_have_the_logits_of_separate_questions() -> None:
    rng, model = random.Random(5), build_model("gemma3")
    shared = Layout((8, 9, 5, 6), num_final=2)
    context, first, second = random_ids(rng, 28).split((17, 5, 6))
    got = forward(model, torch.cat((context, first, second)), build_metadata([shared]))
    alone = forward(model, torch.cat((context, second)), build_metadata([Layout((8, 9, 6))]))
    assert_close(got[22:], alone[17:], **CLOSE)


@pytest.mark.parametrize("attention", ["block_sdpa", "block_flex"])
def test_missing_block_masks_raise(attention: str) -> None:
    model = build_model("llama", attention)
    ids = random_ids(random.Random(0), 8)[None]
    with pytest.raises(ValueError, match="block_masks"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="block_masks"):
        model(input_ids=ids, block_mask=AttentionMasks(build_metadata([Layout((8,))])))


def test_masks_of_another_length_raise() -> None:
    model, masks = build_model("llama"), AttentionMasks(build_metadata([Layout((7,))]))
    with pytest.raises(ValueError, match="describe"):
        model(input_ids=random_ids(random.Random(0), 8)[None], block_masks=masks)


def test_what_is_compiled_once_is_never_run_without_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the limit of shapes FlexAttention would compute all scores as one dense matrix."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    monkeypatch.setattr(backends, "RECOMPILE_LIMIT", 2)
    with config.patch(recompile_limit=2):
        compiled = backends._compile_once.__wrapped__(double)
        for length in (2, 3):
            assert_close(compiled(torch.ones(length)), torch.full((length,), 2.0))
        with pytest.raises(Exception, match="fullgraph"):
            compiled(torch.ones(4))


@pytest.mark.parametrize(("before", "after"), [(8, backends.RECOMPILE_LIMIT), (500, 500)])
def test_a_larger_limit_of_shapes_stays(before: int, after: int) -> None:
    with config.patch(recompile_limit=before):
        backends.allow_recompiles()
        assert config.recompile_limit == after


def test_compiled_code_does_not_depend_on_measured_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also that of the backward pass, which PyTorch compiles later and on a GPU in another thread."""
    is_deterministic: list[bool] = []
    run = GraphLowering.run

    def record(graph: GraphLowering, *arguments: Any) -> Any:
        is_deterministic.append(inductor_config.deterministic)
        return run(graph, *arguments)

    monkeypatch.setattr(GraphLowering, "run", record)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # code that is kept is not compiled again
    x = torch.ones(3, requires_grad=True)
    total = backends._compile_once.__wrapped__(lambda x: (x * x).sum())(x)
    backward = Thread(target=total.backward)
    backward.start()
    backward.join()
    assert is_deterministic == [True, True]
    assert_close(x.grad, torch.full((3,), 2.0))
