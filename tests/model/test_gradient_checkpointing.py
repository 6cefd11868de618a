"""Gradient checkpointing recomputes the layers it should, and changes no loss and no gradient."""

import random

import pytest
import torch

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import build_metadata
from blockft.model.decoder_layers import attention_windows
from blockft.model.gradient_checkpointing import EVERY, checkpoint_layers, list_checkpointed
from blockft.model.lora import add_adapter
from tests.tiny import build_model, random_ids, random_layout


def train_once(
    name: str, kind: str, *, adapter: bool = False, compiled: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of a row of random tokens."""
    base = build_model(name)
    if compiled:
        torch._dynamo.reset()
        for layer in base.base_model.get_submodule("layers").children():
            layer.compile(dynamic=False, backend="aot_eager")
    checkpoint_layers(base, kind)
    model = add_adapter(base, {"r": 4, "lora_dropout": 0.2}, seed=0) if adapter else base
    model.train()
    rng = random.Random(0)
    metadata = build_metadata([random_layout(rng, 40, 4)], 48)
    masks = AttentionMasks(metadata).build("block_sdpa", attention_windows(base.config))
    torch.manual_seed(1)  # of the adapter's dropout
    logits = model(
        input_ids=random_ids(rng, 48)[None],
        position_ids=metadata.position_ids,
        block_masks=masks,
        use_cache=False,
    ).logits
    loss = logits.square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_kind_gives_the_same_loss_and_gradients(name: str, adapter: bool, compiled: bool) -> None:
    """Also with dropout, whose random numbers are drawn again, and in compiled layers."""
    loss, gradients = train_once(name, "none", adapter=adapter, compiled=compiled)
    assert gradients
    for kind in ("selective", "full"):
        other_loss, other_gradients = train_once(name, kind, adapter=adapter, compiled=compiled)
        assert other_loss == loss
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "num_runs"), [("none", (1, 1)), ("selective", (2, 1)), ("full", (2, 2))])
def test_a_kind_recomputes_the_layers_that_it_names(kind: str, num_runs: tuple[int, int]) -> None:
    model = build_model("llama").train()
    checkpoint_layers(model, "full")
    checkpoint_layers(model, kind)  # the last call counts
    runs = [0, 0]
    for index, layer in enumerate(model.base_model.get_submodule("layers").children()):

        def count(*_: object, index: int = index) -> None:
            runs[index] += 1

        layer.get_submodule("self_attn").register_forward_pre_hook(count)
    metadata = build_metadata([random_layout(random.Random(0), 16, 2)])
    masks = AttentionMasks(metadata).build("block_sdpa", [None])
    ids = random_ids(random.Random(0), 16)[None]
    model(input_ids=ids, block_masks=masks, use_cache=False).logits.sum().backward()
    assert tuple(runs) == num_runs
    assert list_checkpointed(kind, 2) == tuple(run == 2 for run in num_runs)


def test_kinds_are_ordered_by_recomputation() -> None:
    counts = [sum(list_checkpointed(kind, 9)) for kind in EVERY]
    assert counts == sorted(counts) == [0, 5, 9]
