"""Shared products give the outputs and gradients of the separate ones, eager and compiled."""

import copy
import random
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.model.checkpoint import compute_reference_logits
from blockft.model.lora import add_adapter
from blockft.model.shared_input import share_products
from tests.tiny import CONFIGS, build_model, random_ids

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, metadata = random_ids(random.Random(0), 24), build_metadata([Layout((7, 9, 8))])
    outputs = model(
        input_ids=ids[None],
        position_ids=metadata.position_ids,
        block_masks=AttentionMasks(metadata).build("block_sdpa", [None]),
        use_cache=False,
    )
    loss = outputs.logits.square().mean()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def adapted(name: str, **arguments: Any) -> Any:
    model = add_adapter(build_model(name).train(), {"r": 4, "lora_alpha": 12, **arguments}, seed=1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # peft begins with 0, which hides its gradient for A
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_products_equal_separate_ones(name: str) -> None:
    separate = adapted(name)
    shared = copy.deepcopy(separate)
    num_groups = share_products(shared.get_base_model())
    # Phi-3 has these products in one matrix each
    assert (num_groups == 0) == name.startswith("phi3")
    (loss, gradients), (expected, expected_gradients) = (
        loss_and_gradients(shared),
        loss_and_gradients(separate),
    )
    assert_close(loss, expected, **CLOSE)
    assert_close(gradients, expected_gradients, **CLOSE)
    assert shared.state_dict().keys() == separate.state_dict().keys()


def test_ranks_may_differ_within_a_group() -> None:
    separate = adapted("llama", target_modules=ALL_LINEAR, rank_pattern={"k_proj": 2, "up_proj": 7})
    shared = copy.deepcopy(separate)
    assert share_products(shared.get_base_model()) == 2 * separate.config.num_hidden_layers
    assert_close(loss_and_gradients(shared)[1], loss_and_gradients(separate)[1], **CLOSE)


@pytest.mark.parametrize(
    "arguments",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"target_modules": ["q_proj", "v_proj", "up_proj"]}],
    ids=["dropout", "dora", "an adapter of a part of the group"],
)
def test_other_adapters_are_left_alone(arguments: dict[str, Any]) -> None:
    assert share_products(adapted("llama", **arguments).get_base_model()) == 0


def test_a_model_without_an_adapter_is_left_alone() -> None:
    assert share_products(build_model("llama")) == 0


def test_adapters_can_be_disabled_and_merged() -> None:
    model = adapted("llama")
    x = torch.randn(3, model.config.hidden_size)
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    base = q_proj.base_layer(x)
    share_products(model.get_base_model())
    with model.disable_adapter():
        assert torch.equal(q_proj(x), base)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    assert torch.equal(twin.get_base_model().model.layers[0].self_attn.q_proj(x), base)
    merged = twin.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_passes_use_separate_products(dtype: torch.dtype) -> None:
    """The logits that an export is compared with widen the weights of each module while it computes."""
    separate = adapted("llama").to(dtype)
    shared = copy.deepcopy(separate)
    share_products(shared.get_base_model())
    ids = random_ids(random.Random(0), 24)
    expected = compute_reference_logits(separate, ids)
    assert torch.equal(compute_reference_logits(shared, ids), expected)
    assert shared.training and shared.dtype == dtype


def test_compiled_layers_share_products_and_code() -> None:
    separate = adapted("llama")
    shared = copy.deepcopy(separate)
    base: Any = shared.get_base_model()
    share_products(base)
    num_graphs = num_products = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal num_graphs, num_products
        num_graphs += 1
        num_products += sum(node.target is torch._C._nn.linear for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    for _ in range(2):
        base.base_model.layers.append(copy.deepcopy(base.base_model.layers[-1]))
    for layer in base.base_model.layers:
        layer.compile(dynamic=False, fullgraph=True, backend=count)
    loss_and_gradients(shared)
    # the input of the first layer needs no gradient: two graphs, however many layers there are
    assert num_graphs == 2
    # 7 linear layers, a matrix B for each of them, and a matrix A for each of 4 inputs
    assert num_products == num_graphs * (7 + 7 + 4)
